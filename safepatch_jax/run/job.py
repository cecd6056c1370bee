"""The main job: which stages a run has, in which workdir, and what it says and publishes; `Work`
has what each does."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable, Sequence

from safepatch_jax.data.records import Record, load_records
from safepatch_jax.models.config import read_hf_config
from safepatch_jax.models.table import param_table
from safepatch_jax.patching import PATCH_ROLES
from safepatch_jax.run import card, certificate, environment, metrics, report
from safepatch_jax.run.convert import source_facts
from safepatch_jax.run.stages import FINISHED, Runner, Stage, version_of, versions
from safepatch_jax.run.steps import Work
from safepatch_jax.runtime import files, processes
from safepatch_jax.runtime.console import say
from safepatch_jax.settings import Settings, settings_differences

# Models compared in the report, in its order.
VARIANTS = ("shipped", "backbone", "se", "osm", "intersection", "safepatching")
# Settings that say where and how a run is done, not what comes out.
PLACE = (
    "run.keep_scratch",
    "run.cache_dir",
    "run.certify",
    "run.checkpoint_minutes",
    "mesh.",
    "model.remat",
    "model.loss_chunk",
    "model.architecture",
    "derive.accumulate",
    "data.manual_dir",
)


class Job(Work):
    """One run: builds its stages from the settings and runs them in a workdir.

    Args:
      update: other settings may take the workdir over.
      read: reads records, as `Context` takes it.

    Raises:
      ValueError: bad settings, model or data; a workdir that other settings made; processes that
        differ in any of it.
    """

    def __init__(
        self,
        settings: Settings,
        workdir: str | pathlib.Path,
        *,
        update: bool = False,
        read: Callable[..., Sequence[Record]] = load_records,
    ):
        if not settings.model.source:
            raise ValueError(
                "No model given. Set --model.source to a Hugging Face folder, a .gguf file, or "
                "'smollm2'."
            )
        super().__init__(settings, read)
        self.context.check_batches()
        self.workdir, self._update = pathlib.Path(workdir).expanduser().absolute(), update
        self._agree(update)
        processes.on_first(lambda: self._claim_workdir(update))
        self.runner = Runner(self._stages(), self.workdir, self.context.cache_dir)

    @property
    def variants(self) -> tuple[str, ...]:
        return VARIANTS if self.settings.align.enabled else VARIANTS[1:]

    @property
    def patch_file(self) -> pathlib.Path | None:
        """The difference between backbone and result; None where their dtypes differ."""
        return (
            self.runner.folder("patch_file") / "patch.safetensors"
            if "patch_file" in self.runner.stages
            else None
        )

    def run(self, command: Sequence[str] = ()) -> pathlib.Path:
        """Run every stage that is not up to date; return the path of the report.

        Args:
          command: with which the run was started; it is noted.

        Raises:
          ValueError: another run is at work in the workdir; or what a stage finds wrong.
        """
        for folder in (self.workdir, self.context.cache_dir):
            processes.shared(folder)
        with processes.claimed(self.workdir):
            processes.on_first(lambda: self._begin(command))
            for line in self.plan():
                say(line)
            return self._run_claimed()

    def _run_claimed(self) -> pathlib.Path:
        try:
            with metrics.Metrics(self.workdir) as self.metrics:
                return self._run_stages()
        except BaseException:
            if left := self.runner.scratch_left():
                say(
                    "The run did not finish. Derived models or scores lie in "
                    f"{', '.join(map(str, left))}: the same command "
                    "goes on from there; else delete them, they are jailbroken or broken models."
                )
            raise

    def _begin(self, command: Sequence[str]) -> None:
        self._claim_workdir(self._update)  # again: another run may have been at work here meanwhile
        for left in filter(lambda p: files.half_written(p.name), self.workdir.iterdir()):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        if self.runner.status("report") not in FINISHED:
            for name in (
                *report.FILES,
                "manifest.json",
            ):  # of other settings, or of a run that was not finished
                (self.workdir / name).unlink(missing_ok=True)
        files.write_json(self.workdir / "settings.json", self.settings.to_dict())
        environment.write(self.workdir, command, self.context.sharder)

    def _run_stages(self) -> pathlib.Path:
        self.runner.finish(["import", "certify_import"])
        self._refuse_mixed_dtypes()
        written = (
            ["export"]
            + [name for name in ("patch_file",) if name in self.runner.stages]
            + ["certify_export"]
        )
        self.runner.finish(
            (["align"] if self.settings.align.enabled else [])
            + written
            + [*(f"evaluate_{v}" for v in self.variants), "report"]
        )
        processes.on_first(self._publish)
        if not self.settings.run.keep_scratch:
            processes.on_first(self.runner.delete_scratch)
            say(
                "Scratch deleted: derived models, scores and their answers (keep with "
                "--run.keep_scratch)."
            )
        return self.workdir / "report.md"

    def plan(self) -> list[str]:
        """Describe the run: devices, model, data, settings that matter, and which stages will
        run."""
        settings, mesh = self.settings, self.context.sharder.mesh
        device = mesh.devices.flat[0]
        hosts = f" in {processes.count()} processes" if processes.several() else ""
        lines = [
            f"Devices: {mesh.devices.size} x {device.device_kind}{hosts}, mesh "
            + ", ".join(f"{a} {n}" for a, n in mesh.shape.items())
            + f"; compute {settings.model.compute_dtype}, weights and moments float32",
            f"Model:   {settings.model.source}"
            + (
                f", first aligned for {settings.align.steps} steps on refusals and ordinary answers"
                if settings.align.enabled
                else ""
            ),
            "Data:    "
            + "; ".join(
                f"{role} {report.data_text(settings.to_dict(), role)} ({len(records)} records)"
                for role, records in self.context.records.items()
            ),
            f"Derive:  SE by ascent, at most {settings.derive.se_steps} steps or answer NLL "
            f"{settings.derive.se_nll_ceiling:g}; OSM by descent, {settings.derive.osm_steps} "
            "steps",
            "Patch:   " + report.describe_patch(settings.to_dict()),
            "Stages:  "
            + ", ".join(f"{name} ({self.runner.status(name)})" for name in self.runner.stages),
        ]
        if self.place.kind == "hf" or self.runner.status("import") == "done":
            size = param_table(read_hf_config(self.folder("import"))).size
            scratch, steps = 16 * size / 2**30, 36 * size / 2**30
            lines.insert(
                2,
                f"         {size / 1e6:,.1f} M parameters; derived models and scores take "
                f"{scratch:.1f} GiB of scratch on "
                f"disk, checkpoints of training up to {steps:.1f} GiB more",
            )
        ways = self.context.sharder.batch_ways
        for name in ("align.batch_size", "derive.batch_size"):
            if (rows := settings.flat()[name]) % ways:
                lines.append(
                    f"Note:    {name} = {rows} does not divide by data*fsdp = {ways}, so each "
                    "device computes the whole "
                    f"batch; a multiple of {ways} is faster."
                )
        return lines

    def examples(self, count: int = 2) -> list[str]:
        """Return lines that show the first training examples as the model is given them, answer
        tokens green."""
        if self.place.kind != "hf":
            self.runner.need("import")
        source, lines = self.folder("import"), []
        chat = self.context.chat(source)
        text = lambda ids: chat.tokenizer.decode(ids, skip_special_tokens=False)
        kinds = [("harmful", "answer"), ("harmful", "refusal"), ("ordinary", "answer")]
        for role, field in kinds if self.settings.align.enabled else kinds[:1]:
            for example in self.context.encoded(source, role, "train", field).examples[:count]:
                lines += [
                    f"--- {role}, {field}: {len(example.prompt_ids)} + {len(example.answer_ids)} "
                    "tokens",
                    f"{text(example.prompt_ids)}\033[32m{text(example.answer_ids)}\033[0m",
                ]
        return lines

    def _stages(self) -> list[Stage]:
        s, data = self.settings, self.context.data_hashes
        compute = {"compute_dtype": s.model.compute_dtype}
        train = (
            compute
            | {
                "attention": s.model.attention,
                "loss": s.derive.loss,
                "optimizer": s.derive.optimizer,
                "seed": s.run.seed,
            }
            | {
                k: getattr(s.data, k)
                for k in ("max_prompt_tokens", "max_answer_tokens", "train_limit", "length_buckets")
            }
        )
        derive = train | {
            k: getattr(s.derive, k) for k in ("batch_size", "weight_decay", "clip_norm")
        }
        patch = dataclasses.asdict(s.patch) | {
            "dtype": s.export.dtype,
            "rounding": s.export.rounding,
            "seed": s.run.seed,
        }
        evaluate = dataclasses.asdict(s.evaluate) | {
            k: getattr(s.data, k) for k in ("max_prompt_tokens", "max_answer_tokens", "eval_limit")
        }
        score = {"samples": s.score.samples, "scope": s.patch.scope, "mode": s.score.mode} | (
            {"batch_size": s.score.batch_size} if s.score.mode == "batched" else {}
        )
        harmful = {"harmful": data["harmful"]}
        base = "align" if s.align.enabled else "import"
        certify = {"certify": s.run.certify}
        witness = {name: version_of(name) for name in ("torch", "transformers")}
        stages = [
            Stage(
                "import", (), {}, processes.on_first(self._source_hashes), self._import, shared=True
            ),
            Stage(
                "certify_import", ("import",), certify, witness, self._certify_import, shared=True
            ),
        ]
        if s.align.enabled:
            stages.append(
                Stage(
                    "align",
                    ("import",),
                    dataclasses.asdict(s.align) | train | {"clip_norm": s.derive.clip_norm},
                    harmful | {"ordinary": data["ordinary"]},
                    self._align,
                    shared=True,
                )
            )
        for role in PATCH_ROLES:
            own = {
                k: v for k, v in dataclasses.asdict(s.derive).items() if k.startswith(role + "_")
            }
            stages.append(
                Stage(
                    f"derive_{role}",
                    (base,),
                    derive | own,
                    harmful,
                    lambda out, role=role: self._derive(role, out),
                    scratch=True,
                )
            )
        for role in PATCH_ROLES:
            stages.append(
                Stage(
                    f"score_{role}",
                    (f"derive_{role}",),
                    train | score,
                    harmful,
                    lambda out, role=role: self._score(role, out),
                    scratch=True,
                )
            )
        parts = (base, "derive_se", "derive_osm", "score_se", "score_osm")
        stages.append(Stage("patch", parts, patch, {}, self._patch, scratch=True))
        stages.append(
            Stage("export", (base, "patch"), dataclasses.asdict(s.export), {}, self._export)
        )
        if s.export.dtype == "keep":  # a patch file holds differences of bits
            stages.append(
                Stage("patch_file", (base, "export"), {}, {}, self._patch_file, results=("patch",))
            )
        stages.append(
            Stage(
                "certify_export",
                (base, "export"),
                certify,
                witness,
                self._certify_export,
                results=("patch",),
            )
        )
        reads = {
            "shipped": ("import",),
            "backbone": (base,),
            "se": (base, "derive_se"),
            "osm": (base, "derive_osm"),
            "intersection": parts,
            "safepatching": (base, "export"),
        }
        for variant in self.variants:
            extra = {"patch": patch} if variant == "intersection" else {}
            stages.append(
                Stage(
                    f"evaluate_{variant}",
                    reads[variant],
                    evaluate | compute | extra,
                    data,
                    lambda out, v=variant: self._evaluate(v, out),
                    scratch=variant in ("se", "osm", "intersection"),
                )
            )
        answers = ("evaluate_backbone", "evaluate_safepatching")
        reads_for_report = (*answers, "certify_export")
        results = tuple(stage.name for stage in stages if stage.name not in reads_for_report)
        told = {k: v for k, v in s.flat().items() if not k.startswith(PLACE)}
        stages.append(Stage("report", reads_for_report, told, {}, self._report, results=results))
        return stages

    def _agree(self, update: bool) -> None:
        """Refuse processes that would not do the same work."""
        if not processes.several():
            return
        processes.agree(
            self.settings.flat()
            | {
                "run.cache_dir": str(self.context.cache_dir.absolute()),
                "--workdir": str(self.workdir),
                "--update": update,
            },
            "Start every process with the same command, in the same folder.",
        )
        processes.agree_on_devices()
        processes.agree(
            {f"version of {name}": version for name, version in versions().items()},
            "Install the same packages on every host.",
        )
        processes.agree(
            source_facts(self.place)
            | {
                f"records of data.{role}": digest
                for role, digest in self.context.data_hashes.items()
            },
            "Give every host the same model and data files, best from one file system.",
        )

    def _claim_workdir(self, update: bool) -> None:
        path = self.workdir / "settings.json"
        if not path.is_file():
            held = {p.name for p in self.workdir.iterdir()} if self.workdir.is_dir() else set()
            sweeps = {"stages", files.LOCK, environment.FILE, metrics.FILE, metrics.EVENTS}
            if not all(
                name in sweeps or name.startswith("sweep") or files.half_written(name)
                for name in held
            ):
                raise ValueError(
                    f"{self.workdir} holds files that are not of a run; use a new or empty "
                    "--workdir."
                )
            return
        try:
            old = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(old, dict) or not all(
                isinstance(group, dict) for group in old.values()
            ):
                raise ValueError("it holds no settings")
        except ValueError as error:
            raise ValueError(
                f"{path} is damaged ({error}). Delete the workdir or use another."
            ) from error
        differences = [
            d for d in settings_differences(old, self.settings.to_dict()) if not d.startswith(PLACE)
        ]
        if differences and not update:
            raise ValueError(
                f"The workdir {self.workdir} was made by other settings: "
                + "; ".join(differences)
                + ". Use another --workdir, or --update to run again the stages that these "
                "settings change."
            )

    def _publish(self) -> None:
        """Copy the report beside the settings and write the run's manifest."""
        source = self.runner.folder("report")
        for name in report.FILES:
            files.copy(source / name, self.workdir / name)
        files.copy(source / card.NAME, self.folder("export") / card.NAME)
        files.copy(
            self.runner.folder("certify_export") / certificate.FILE,
            self.folder("export") / certificate.FILE,
        )
        files.write_json(
            self.workdir / "manifest.json",
            {
                "model": str(self.folder("export").relative_to(self.workdir)),
                "versions": versions(),
                "stages": {
                    name: {k: v for k, v in self.runner.manifest(name).items() if k != "settings"}
                    for name in self.runner.stages
                },
            },
        )


def align_model(settings: Settings, out: str | pathlib.Path) -> None:
    """Align a model and copy the result, which stays in the cache, to a new folder.

    Raises:
      ValueError: bad settings, model or data; `out` exists and is not empty.
    """
    out = pathlib.Path(out).expanduser()
    processes.on_first(lambda: files.refuse_full_folder(out))
    job = Job(settings.override({"align.enabled": True}), out)
    job.runner.finish(["import", "align"])
    with processes.new_folder(out) as folder:
        processes.on_first(
            lambda: str(shutil.copytree(job.folder("align"), folder, dirs_exist_ok=True))
        )
        found = certificate.certify(
            folder, job.context.sharder, logits=settings.run.certify == "logits", kind="export"
        )
        processes.on_first(lambda: files.write_json(folder / certificate.FILE, found))
    say(certificate.summary(found))
