"""The main job: a run, its workdir, its plan, and what it publishes."""

from __future__ import annotations

import contextlib
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from safepatch_jax.data.records import load_records
from safepatch_jax.models.config import read_hf_config
from safepatch_jax.outcome import settings_differences
from safepatch_jax.run import environment
from safepatch_jax.run.agreement import agree_on_run
from safepatch_jax.run.metrics import EVENTS, FILE, Metrics
from safepatch_jax.run.pace import work
from safepatch_jax.run.pins import pinned
from safepatch_jax.run.published import CARD, CERTIFICATE, FILES, data_text, describe_patch
from safepatch_jax.run.stages import CACHE, FINISHED, Runner, versions
from safepatch_jax.run.state import Read, Run, check_source
from safepatch_jax.run.table import Evaluate, evaluate_variant, stage_table, variants
from safepatch_jax.runtime import addresses, files, mirror, processes
from safepatch_jax.runtime.console import example, say, some
from safepatch_jax.runtime.paths import resolve
from safepatch_jax.runtime.reading import Refused
from safepatch_jax.runtime.records import read_record
from safepatch_jax.runtime.workdir import Workdir
from safepatch_jax.settings import DeriveSettings, Settings

if TYPE_CHECKING:
    from safepatch_jax.run.room import Disk

SETTINGS, MANIFEST = "settings.json", "manifest.json"
# What may lie in a workdir that is no run's yet: a sweep's may become one.
_OF_SWEEPS = ("stages", "sweep*", "slope*", "openings.json", "backbone_margins.json")
NAMES = (FILE, EVENTS, environment.FILE, *_OF_SWEEPS)


def open_run(
    settings: Settings,
    folder: pathlib.Path,
    *,
    read: Read = load_records,
    evaluate: Evaluate = evaluate_variant,
    flags: Mapping[str, Any] | None = None,
    verify: bool = False,
    idle: bool = False,
) -> Run:
    """Lay out the stages of a run in a folder; nothing is run, and no folder is made.

    Args:
      settings: of the run.
      folder: of its stages.
      read: reads records, see `Context`.
      evaluate: measures a model of the report; a chain measures its models only once.
      flags: what else the command was given, JSON-able: the same in all processes.
      verify: compare the outputs of all finished stages by SHA-256.
      idle: nothing may be left to run, so leave the devices alone; before a stage runs, the caller
        calls `Run.check_batches`.

    Raises:
      ValueError: bad settings, model or data; processes that differ in any of it.
    """
    run = Run(settings, folder, read)
    processes.on_first(files.refuse_unusable, run.inputs.cache_dir, CACHE)
    if not idle:
        run.context.check_batches()
    flags = {"--workdir": addresses.name_of(folder)} | dict(flags or {})
    agree_on_run(settings, run.source, flags, lambda: run.inputs.data_hashes)
    processes.on_first(check_source, run.source)
    run.runner = Runner(stage_table(run, evaluate), folder, run.inputs.cache_dir, verify)
    return run


class Job:
    """One run with a workdir of its own: what launch.safepatch does.

    Args:
      settings: of the run.
      workdir: its folder.
      update: other settings may take the workdir over.
      verify: compare the outputs of all finished stages by SHA-256.
      read, evaluate: see `open_run`.

    Attributes:
      state: what the steps share: context, stages, model folders.
      workdir: absolute path.

    Raises:
      ValueError: as `open_run`; a workdir that other settings made.
    """

    def __init__(
        self,
        settings: Settings,
        workdir: str | pathlib.Path,
        *,
        update: bool = False,
        verify: bool = False,
        read: Read = load_records,
        evaluate: Evaluate = evaluate_variant,
    ):
        self._folder = Workdir(
            workdir,
            "a run",
            SETTINGS,
            NAMES,
            refuse=self._refuse_other_settings,
            declared=(SETTINGS, environment.FILE),
        )
        self.workdir, self._update = self._folder.path, update
        self.settings = settings = pinned(settings, self.workdir / SETTINGS, afresh=update)
        self._idle = False  # whether nothing is left to run
        self._folder.check()  # before data are read, and with several processes the model is hashed
        self.state = open_run(
            settings,
            self.workdir,
            read=read,
            evaluate=evaluate,
            flags={"--update": update, "--verify": verify},
            verify=verify,
            idle=(self.workdir / MANIFEST).is_file() and not processes.several(),
        )

    @property
    def runner(self) -> Runner:
        return self.state.runner

    def run(self, command: Sequence[str] = ()) -> pathlib.Path:
        """Run every stage that is not up to date; return the path of the report.

        Args:
          command: with which the run was started; it is noted.

        Raises:
          ValueError: another run is at work in the workdir; the disk has less room than the run
            needs; or what a stage finds wrong.
        """
        with self._folder.claimed(self.state.inputs.cache_dir):
            self._idle = not self.runner.waiting()
            if not self._idle:
                self.state.context.check_batches()
                if self.state.source.kind == "hf":
                    self._refuse_small_disk()
                self.runner.expect(
                    self.runner.waiting(), work(self.settings, self.state.inputs.records)
                )
            processes.on_first(self._begin, command)
            for line in self.plan():
                say(line)
            try:
                with Metrics(self.workdir) as self.state.metrics:
                    return self._run_stages()
            except BaseException:
                self._warn_of_scratch()
                raise

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Be the only one at work in the workdir while the block runs. Raises ValueError if another
        run is."""
        with self._folder.claimed(self.state.inputs.cache_dir):
            yield

    def make(self, names: Sequence[str]) -> None:
        """Bring some stages up to date, and what they read; nothing is published, and derived
        models and scores stay.

        Raises:
          ValueError: as `run`.
        """
        if all(self.runner.status(name) in FINISHED for name in names):
            return
        from safepatch_jax.run import notes

        with self.at_work():
            self._idle = False
            self.state.context.check_batches()
            processes.on_first(self._begin, ())
            try:
                with Metrics(self.workdir) as self.state.metrics:
                    self.runner.need("import")  # of another format it is not known before
                    if "derive_se" in names:
                        notes.tell(self.state)
                    self._refuse_small_disk()
                    self._refuse_mixed_dtypes()
                    for name in ("certify_import", *names):
                        if self.runner.status(name) not in FINISHED:
                            self.runner.finish([name])
            except BaseException:
                self._warn_of_scratch()
                raise

    def _warn_of_scratch(self) -> None:
        if scratch := self.runner.scratch_left():
            say(
                "The run did not finish. Derived models or scores lie in "
                f"{', '.join(map(addresses.name_of, scratch))}: the same command resumes from "
                "there; else delete them, they are jailbroken or broken models."
            )

    def _begin(self, command: Sequence[str]) -> None:
        if self.runner.status("report") not in FINISHED:
            for name in (*FILES, MANIFEST):  # of other settings, or of an unfinished run
                (self.workdir / name).unlink(missing_ok=True)
        files.write_json(self.workdir / SETTINGS, self.settings.to_dict())
        sharder = None if self._idle else self.state.context.sharder
        environment.write(self.workdir, command, sharder)

    def _refuse_small_disk(self) -> None:
        """Raise ValueError if what is still missing does not fit on its disks."""
        from safepatch_jax.run import room

        disk = room.disk_bytes(self.settings, read_hf_config(self.state.imported))
        waiting = self.runner.waiting()
        processes.on_first(self._compare_room, disk, waiting)

    def _compare_room(self, disk: Disk, waiting: Sequence[str]) -> None:
        from safepatch_jax.run import room

        needed = room.missing(self.runner, disk, waiting)
        free = {folder: room.free_bytes(folder) for folder in needed}
        room.refuse_small_disk(needed, free, self.settings)

    def _run_stages(self) -> pathlib.Path:
        if not self._idle and self.state.source.kind != "hf":
            from safepatch_jax.run import notes

            notes.tell(self.state)  # imported, for its architecture is not known before
            self._refuse_small_disk()
        self.runner.finish(["import", "certify_import"])
        if not self._idle:
            self._refuse_mixed_dtypes()
        names = ["align", "export", "patch_file", "certify_export"]
        names += [f"evaluate_{variant}" for variant in variants(self.settings)]
        names.append("report")
        self.runner.finish(name for name in names if name in self.runner.stages)
        self.runner.complete()
        processes.on_first(self._publish)
        if not self.settings.run.keep_scratch:
            processes.on_first(self.runner.delete_scratch)
            if not processes.first():
                mirror.forget(self.workdir)  # scratch must not outlive the run on other hosts
            say(
                "Scratch deleted: derived models, scores and their answers (keep with "
                "--run.keep_scratch)."
            )
        return self.workdir / "report.md"

    def _refuse_mixed_dtypes(self) -> None:
        from safepatch_jax.run import steps

        steps.refuse_mixed_dtypes(self.state)

    def plan(self, statuses: bool = True) -> list[str]:
        """Describe the run: devices, model, data, settings that matter, stages; without devices
        where nothing is left to run.

        Args:
          statuses: say which stages will run. For that the source is hashed; else only one that is
            no Hugging Face folder is, to find it in the cache.
        """
        settings = self.settings
        model = settings.model.source
        if settings.align.enabled:
            model += (
                f", first aligned for {settings.align.steps} steps on refusals and ordinary answers"
            )
        data = []
        for role, records in self.state.inputs.records.items():
            source = data_text(settings.to_dict(), role)
            data.append(f"{role} {source} ({len(records)} records)")
        derive = settings.derive
        lines = [
            *self._devices(),
            f"Model:   {model}",
            *self._size(),
            f"Data:    {'; '.join(data)}",
            f"Derive:  SE by ascent, at most {derive.se_steps} steps or answer NLL "
            f"{derive.se_nll_ceiling:g}; OSM by descent, {derive.osm_steps} steps",
            *self._derived(),
            f"Patch:   {describe_patch(settings.to_dict())}",
        ]
        stages = list(self.runner.stages)
        if statuses:
            stages = [f"{name} ({self.runner.status(name)})" for name in stages]
        lines.append(f"Stages:  {', '.join(stages)}")
        return lines + self._notes()

    def _devices(self) -> list[str]:
        if self._idle:
            return []
        mesh = self.state.context.sharder.mesh
        kind = mesh.devices.flat[0].device_kind
        hosts = f" in {processes.count()} processes" if processes.several() else ""
        axes = ", ".join(f"{axis} {n}" for axis, n in mesh.shape.items())
        return [
            f"Devices: {mesh.devices.size} x {kind}{hosts}, mesh {axes}; compute "
            f"{self.settings.model.compute_dtype}, trained weights and moments float32"
        ]

    def _derived(self) -> list[str]:
        """Say how patches are derived where that is not the default."""
        default, lines = DeriveSettings(), []
        names = "train backward store se_tokens osm_tokens se_prompts osm_prompts"
        for name in names.split():
            value = getattr(self.settings.derive, name)
            if value != getattr(default, name):
                lines.append(f"{name} {value}")
        return [f"         {', '.join(lines)}"] if lines else []

    def _size(self) -> list[str]:
        """Say how large the model and its scratch are, where the model is at hand."""
        unknown = self.state.source.kind != "hf" and self.runner.status("import") != "done"
        if self._idle or unknown:
            return []
        from safepatch_jax.models.table import param_table
        from safepatch_jax.run import room

        config = read_hf_config(self.state.imported)
        disk = room.disk_bytes(self.settings, config)
        gib = {name: f"{number / 2**30:,.1f} GiB" for name, number in disk._asdict().items()}
        when = "up to" if self.settings.run.checkpoint_minutes else "at SIGTERM"
        free = processes.on_first(room.free_bytes, self.workdir)
        lines = [
            f"{param_table(config).size / 1e6:,.1f} M parameters; scratch on disk: derived models "
            f"{gib['derived']}, scores {gib['scores']}, checkpoints of training {when} "
            f"{gib['checkpoints']}",
            f"result: model {gib['model']}, patch file up to {gib['patch_file']}; a new run has at "
            f"most {disk.most / 2**30:,.1f} GiB there at once"
            + (f", free now {free / 2**30:,.1f} GiB" if free is not None else ""),
        ]
        return [f"         {line}" for line in lines]

    def _notes(self) -> list[str]:
        if self._idle:
            return []
        from safepatch_jax.run import notes

        lines = notes.batch_notes(self.settings, self.state.context.sharder)
        if self.state.source.kind == "hf":  # of others see `_run_stages`
            lines += notes.model_notes(self.settings, read_hf_config(self.state.imported))
        return lines

    def examples(self, count: int = 2) -> list[str]:
        """Return lines that show the first training examples as the model is given them, answer
        tokens green."""
        if self.state.source.kind != "hf":
            self.runner.need("import")
        context, source = self.state.context, self.state.imported
        tokenizer = context.chat(source).tokenizer
        kinds = [("harmful", "answer")]
        if self.settings.align.enabled:
            kinds += [("harmful", "refusal"), ("ordinary", "answer")]
        lines = []
        for role, field in kinds:
            for pair in context.encoded(source, role, "train", field).examples[:count]:
                prompt = tokenizer.decode(pair.prompt_ids, skip_special_tokens=False)
                answer = tokenizer.decode(pair.answer_ids, skip_special_tokens=False)
                lengths = f"{len(pair.prompt_ids)} + {len(pair.answer_ids)}"
                lines.append(f"--- {role}, {field}: {lengths} tokens")
                lines.append(example(prompt, answer))
                if pair.asked:
                    asked = tokenizer.decode(pair.asked, skip_special_tokens=False)
                    lines.append(f"asked for an answer of its own after: ...{asked[-80:]!r}")
        return lines

    def _refuse_other_settings(self) -> None:
        """Raise ValueError if the workdir was made by settings that give another outcome."""
        path = self.workdir / SETTINGS
        if not path.is_file():
            return
        fix = (
            f"Copy {SETTINGS} back from a backup, or use another --workdir; nothing was changed in "
            "this one."
        )
        settings = read_record(path, {}, fix)
        if not is_of_run(settings):
            raise Refused(f"{path} is no settings file of a run, or damaged. {fix}")
        differences = settings_differences(settings, self.settings.to_dict())
        if differences and not self._update:
            shown = some([f"{line:.200}" for line in differences])
            raise ValueError(
                f"The workdir {self.workdir} was made by other settings: {shown}. "
                "Use another --workdir, or --update to run again the stages that these settings "
                "change."
            )

    def _publish(self) -> None:
        """Copy the report beside the settings and write the run's manifest."""
        runner, export = self.runner, self.state.folder("export")
        source = runner.outputs("report")
        for name in FILES:
            files.copy(source / name, self.workdir / name)
        files.copy(source / CARD, export / CARD)
        files.copy(runner.outputs("certify_export") / CERTIFICATE, export / CERTIFICATE)
        for name in (CARD, CERTIFICATE):
            mirror.written(export / name)
        stages = {}
        for name in runner.stages:
            stages[name] = dict(runner.manifest(name))
            del stages[name]["settings"]
        manifest = {
            "model": str(export.relative_to(self.workdir)),
            "versions": versions(),
            "stages": stages,
        }
        if self.state.source.origin:
            manifest["source"] = self.state.source.origin
        files.write_json(self.workdir / MANIFEST, manifest)


def is_of_run(settings: Mapping[str, Any]) -> bool:
    """Return whether a settings.json was written by a run, of this version or an earlier one: it
    has all groups, each with options of its own."""
    for group, options in Settings().to_dict().items():
        stored = settings.get(group)
        if not isinstance(stored, dict) or not stored.keys() & options.keys():
            return False
    return all(isinstance(group, dict) for group in settings.values())


def align_model(settings: Settings, out: str | pathlib.Path) -> None:
    """Align a model and copy the result, which stays in the cache, to a new folder, with
    metrics.jsonl of its training.

    Raises:
      ValueError: bad settings, model or data; `out` exists and is not empty.
    """
    from safepatch_jax.run import certificate

    out = resolve(out)
    processes.on_first(files.refuse_full_folder, out)
    # What comes out of the cache leaves it here.
    run = open_run(pinned(settings).override({"align.enabled": True}), out, verify=True)
    with processes.new_folder(out) as folder:
        with Metrics(folder) as run.metrics:
            run.runner.finish(["import", "align"])
        nll = run.runner.result("align")["nll"]
        processes.on_first(Metrics(folder).complete, "align", nll)
        processes.on_first(_copy_into, run.folder("align"), folder)
        logits = settings.run.certify == "logits"
        content = certificate.certify(folder, run.context.sharder, logits=logits, kind="export")
        processes.on_first(files.write_json, folder / CERTIFICATE, content)
    say(certificate.summary(content))


def _copy_into(source: pathlib.Path, target: pathlib.Path) -> None:
    shutil.copytree(source, target, dirs_exist_ok=True)
