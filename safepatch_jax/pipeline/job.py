"""The main job: import, align (optional), derive both patches, score, patch, export, evaluate, report."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import shutil
from typing import Any, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from safepatch_jax import files
from safepatch_jax.console import say
from safepatch_jax.data.chat import Chat, lengths
from safepatch_jax.data.records import ROLES as EVALUATED
from safepatch_jax.evaluation.measures import evaluate_model
from safepatch_jax.io.checkpoint import load_tree, read_description, save_tree
from safepatch_jax.io.hf import Checkpoint, check_keys, save_model, stored_dtypes
from safepatch_jax.models.config import read_hf_config
from safepatch_jax.models.table import nest, param_table, unnest
from safepatch_jax.patching.merge import ROLES, apply_patching
from safepatch_jax.patching.statistics import refuse_no_op, totals
from safepatch_jax.pipeline import card, certificate, report
from safepatch_jax.pipeline.context import Context
from safepatch_jax.pipeline.convert import Place, convert
from safepatch_jax.pipeline.stages import FINISHED, Runner, Stage, version_of, versions
from safepatch_jax.settings import PatchSettings, Settings, settings_differences
from safepatch_jax.training.step import Recipe, endless_batches

# Models compared in the report, in its order.
VARIANTS = ("shipped", "backbone", "se", "osm", "intersection", "safepatching")
# Settings that say where and how a run is done, not what comes out.
PLACE = ("run.keep_scratch", "run.cache_dir", "run.certify", "mesh.")


class Job:
    """One run: builds its stages from the settings and runs them in a workdir.

    Raises:
      ValueError: bad settings, model or data; a workdir that other settings made.
    """

    def __init__(self, settings: Settings, workdir: str | pathlib.Path, *, update: bool = False):
        if not settings.model.source:
            raise ValueError("No model given. Set --model.source to a Hugging Face folder, a .gguf file, or 'smollm2'.")
        self.settings, self.workdir = settings, pathlib.Path(workdir).expanduser().absolute()
        self._claim_workdir(update)
        self.context = Context(settings)
        self.runner = Runner(self._stages(), self.workdir, self.context.cache_dir)

    @property
    def variants(self) -> tuple[str, ...]:
        return VARIANTS if self.settings.align.enabled else VARIANTS[1:]

    def run(self) -> pathlib.Path:
        """Run every stage that is not up to date; return the path of the report."""
        if self.runner.status("report") not in FINISHED:
            for name in (*report.FILES, "manifest.json"):  # of other settings, or of a run that was not finished
                (self.workdir / name).unlink(missing_ok=True)
        files.write_json(self.workdir / "settings.json", self.settings.to_dict())
        for line in self.plan():
            say(line)
        try:
            return self._run_stages()
        except BaseException:
            if left := self.runner.scratch_left():
                say(f"The run did not finish. Derived models or scores lie in {', '.join(map(str, left))}: the same command "
                    "goes on from there; else delete them, they are jailbroken or broken models.")
            raise

    def _run_stages(self) -> pathlib.Path:
        self.runner.finish(["import", "certify_import"])
        self._refuse_mixed_dtypes()
        self.runner.finish((["align"] if self.settings.align.enabled else [])
                           + ["export", "certify_export", *(f"evaluate_{v}" for v in self.variants), "report"])
        self._publish()
        if not self.settings.run.keep_scratch:
            self.runner.delete_scratch()
            say("Scratch deleted: derived models, scores and their answers (keep with --run.keep_scratch).")
        return self.workdir / "report.md"

    def plan(self) -> list[str]:
        """Describe the run: devices, model, data, settings that matter, and which stages will run."""
        settings, mesh = self.settings, self.context.sharder.mesh
        device = mesh.devices.flat[0]
        lines = [
            f"Devices: {mesh.devices.size} x {device.device_kind}, mesh "
            + ", ".join(f"{a} {n}" for a, n in mesh.shape.items())
            + f"; compute {settings.model.compute_dtype}, weights and moments float32",
            f"Model:   {settings.model.source}" + (
                f", first aligned for {settings.align.steps} steps on refusals and ordinary answers"
                if settings.align.enabled else ""),
            "Data:    " + "; ".join(
                f"{role} {getattr(settings.data, role)} ({len(records)} records)"
                for role, records in self.context.records.items()),
            f"Derive:  SE by ascent, at most {settings.derive.se_steps} steps or answer NLL "
            f"{settings.derive.se_nll_ceiling:g}; OSM by descent, {settings.derive.osm_steps} steps",
            f"Patch:   a {settings.patch.top_rate_se:g}, b {settings.patch.top_rate_osm:g}, p {settings.patch.retention:g}, "
            f"alpha {settings.patch.alpha:g}, beta {settings.patch.beta:g}; {settings.patch.combine} of the top sets by "
            f"SNIP on '{settings.patch.importance}', scope {settings.patch.scope}",
            "Stages:  " + ", ".join(f"{name} ({self.runner.status(name)})" for name in self.runner.stages),
        ]
        if self.place.kind == "hf" or self.runner.status("import") == "done":
            size = param_table(read_hf_config(self.folder("import"))).size
            lines.insert(2, f"         {size / 1e6:,.1f} M parameters; about {20 * size / 2**30:.1f} GiB of arrays over "
                            f"{mesh.devices.size} device(s), and as much scratch on disk")
        ways = self.context.sharder.batch_ways
        for name in ("align.batch_size", "derive.batch_size", "evaluate.batch_size"):
            if (rows := settings.flat()[name]) % ways:
                lines.append(f"Note:    {name} = {rows} does not divide by data*fsdp = {ways}, so each device computes the whole "
                             f"batch; a multiple of {ways} is faster.")
        return lines

    def folder(self, name: str) -> pathlib.Path:
        """Return the model folder that a stage stands for."""
        if name == "import" and self.place.kind == "hf":
            return self.place.path
        return self.runner.folder(name) / "model"

    @property
    def backbone(self) -> pathlib.Path:
        return self.folder("align" if self.settings.align.enabled else "import")

    # -- the stages ---------------------------------------------------------------------------------------------------

    def _stages(self) -> list[Stage]:
        s, data = self.settings, self.context.data_hashes
        compute = {"compute_dtype": s.model.compute_dtype}
        train = compute | {"loss": s.derive.loss, "seed": s.run.seed} | {
            k: getattr(s.data, k) for k in ("max_prompt_tokens", "max_answer_tokens", "train_limit")}
        derive = train | {k: getattr(s.derive, k) for k in ("batch_size", "weight_decay", "clip_norm")}
        patch = dataclasses.asdict(s.patch) | {
            "dtype": s.export.dtype, "rounding": s.export.rounding, "seed": s.run.seed}
        evaluate = dataclasses.asdict(s.evaluate) | {
            k: getattr(s.data, k) for k in ("max_prompt_tokens", "max_answer_tokens", "eval_limit")}
        harmful = {"harmful": data["harmful"]}
        base = "align" if s.align.enabled else "import"
        certify = {"certify": s.run.certify}
        witness = {name: version_of(name) for name in ("torch", "transformers")}
        stages = [Stage("import", (), {}, self._source_hashes(), self._import, shared=True),
                  Stage("certify_import", ("import",), certify, witness, self._certify_import, shared=True)]
        if s.align.enabled:
            stages.append(Stage(
                "align", ("import",), dataclasses.asdict(s.align) | train | {"clip_norm": s.derive.clip_norm},
                harmful | {"ordinary": data["ordinary"]}, self._align, shared=True))
        for role in ROLES:
            own = {k: v for k, v in dataclasses.asdict(s.derive).items() if k.startswith(role + "_")}
            stages.append(Stage(f"derive_{role}", (base,), derive | own, harmful,
                                lambda out, role=role: self._derive(role, out), scratch=True))
        for role in ROLES:
            stages.append(Stage(
                f"score_{role}", (f"derive_{role}",), train | {"samples": s.score.samples, "scope": s.patch.scope}, harmful,
                lambda out, role=role: self._score(role, out), scratch=True))
        parts = (base, "derive_se", "derive_osm", "score_se", "score_osm")
        stages.append(Stage("patch", parts, patch, {}, self._patch, scratch=True))
        stages.append(Stage("export", (base, "patch"), dataclasses.asdict(s.export), {}, self._export))
        stages.append(Stage("certify_export", (base, "export"), certify, witness, self._certify_export, results=("patch",)))
        reads = {"shipped": ("import",), "backbone": (base,), "se": (base, "derive_se"), "osm": (base, "derive_osm"),
                 "intersection": parts, "safepatching": (base, "export")}
        for variant in self.variants:
            extra = {"patch": patch} if variant == "intersection" else {}
            stages.append(Stage(
                f"evaluate_{variant}", reads[variant], evaluate | compute | extra, data,
                lambda out, v=variant: self._evaluate(v, out), scratch=variant in ("se", "osm", "intersection")))
        answers = ("evaluate_backbone", "evaluate_safepatching")
        reads_for_report = (*answers, "certify_export")
        results = tuple(stage.name for stage in stages if stage.name not in reads_for_report)
        told = {k: v for k, v in s.flat().items() if not k.startswith(PLACE)}
        stages.append(Stage("report", reads_for_report, told, {}, self._report, results=results))
        return stages

    def _import(self, out: pathlib.Path) -> Mapping[str, Any]:
        """Convert another source into a Hugging Face folder; check a folder in that format where it lies."""
        place, folder = self.place, self.folder("import")
        if place.kind != "hf":
            folder = out / "model"
            say(f"  converting {place.path.name} into a Hugging Face folder, once, in the cache")
            convert(f"{place.kind}:{place.path}", f"hf:{folder}", mesh=self.settings.mesh.shape, certify="hashes")
        config = read_hf_config(folder)
        table = param_table(config)
        check_keys(Checkpoint(folder), table, config)
        Chat(folder, config.vocab_size)  # a bad tokenizer is found now, not after training
        say(f"  {config.family}, {table.size:,} parameters, {config.num_layers} layers, {config.num_heads} heads over "
            f"{config.num_kv_heads} KV heads, head {'tied' if config.tied_head else 'untied'}")
        return {"parameters": table.size, "tensors": len(table.hf_names()), "config": dataclasses.asdict(config)}

    def _certify_import(self, out: pathlib.Path) -> Mapping[str, Any]:
        """Examine the source as it lies on disk."""
        return self._certify(self.folder("import"), out, "import")

    def _certify_export(self, out: pathlib.Path) -> Mapping[str, Any]:
        """Examine what was written, and that the patched tensors alone differ from the backbone."""
        before = certificate.tensor_hashes(Checkpoint(self.backbone))
        found = self._certify(self.folder("export"), out, "export", before)
        if self.settings.export.dtype == "keep":
            self._check_changes(found["changed"])
        return found

    def _certify(self, folder: pathlib.Path, out: pathlib.Path, kind: str, before: Mapping[str, str] | None = None,
                 ) -> dict[str, Any]:
        logits = self.settings.run.certify == "logits"
        found = certificate.certify(folder, self.context.sharder, logits=logits, kind=kind, before=before)
        files.write_json(out / certificate.FILE, found)
        say(f"  {certificate.summary(found)}")
        return {"logits": found["logits"], "changed": found.get("changed")}

    def _refuse_mixed_dtypes(self) -> None:
        """Refuse layers of one patched parameter in different dtypes: they are merged in one dtype, and cast once."""
        if self.settings.export.dtype != "keep":
            return
        folder = self.folder("import")
        stored = stored_dtypes(folder)
        mixed = [row.hf_name for row in param_table(read_hf_config(folder)).scope(self.settings.patch.scope)
                 if len({stored[name] for name in row.hf_names}) > 1]
        if mixed:
            raise ValueError(f"{folder}: the layers of {', '.join(mixed)} are stored in different dtypes. Use "
                             "--export.dtype=float32 (or another), or convert the model to one dtype first: "
                             "python -m launch.convert --source=hf:DIR --target=hf:DIR2 --dtype=...")

    def _align(self, out: pathlib.Path) -> Mapping[str, Any]:
        """Tune the imported model on refusals and ordinary answers, with the train step of the patches."""
        align, source = self.settings.align, self.folder("import")
        refusals = self.context.encoded(source, "harmful", "train", "refusal").examples
        ordinary = self.context.encoded(source, "ordinary", "train").examples
        share = round(align.batch_size * align.ordinary_share)
        pools = [(pool, rows) for pool, rows in ((refusals, align.batch_size - share), (ordinary, share)) if rows]
        shape = lengths([e for pool, _ in pools for e in pool])
        config, params = self.context.load(source)
        stored = jax.tree.map(lambda x: x.dtype, params)
        tuned, outcome = self.context.trainer(config).run(
            params, endless_batches(pools, shape, self.settings.run.seed),
            Recipe(1.0, align.steps, align.learning_rate), "align")
        save_model(out / "model", jax.tree.map(lambda x, dtype: x.astype(dtype), tuned, stored), config, source,
                   stored=stored_dtypes(source))
        return _outcome(outcome)

    def _derive(self, role: str, out: pathlib.Path) -> Mapping[str, Any]:
        """Fine-tune a copy of the backbone on harmful answers: up the loss (SE) or down it (OSM)."""
        derive = self.settings.derive
        examples = self.context.encoded(self.folder("import"), "harmful", "train").examples
        config, params = self.context.load(self.backbone)
        recipe = Recipe(
            sign=-1.0 if role == "se" else 1.0, steps=getattr(derive, f"{role}_steps"),
            learning_rate=getattr(derive, f"{role}_learning_rate"),
            nll_ceiling=derive.se_nll_ceiling if role == "se" else float("inf"), weight_decay=derive.weight_decay)
        batches = endless_batches([(examples, derive.batch_size)], lengths(examples), self.settings.run.seed)
        tuned, outcome = self.context.trainer(config).run(params, batches, recipe, f"derive {role.upper()}")
        say(f"  stopped by {outcome.stopped_by}: answer NLL {outcome.nll[0]:.2f} -> {outcome.nll[-1]:.2f}")
        save_tree(out / "params", tuned)
        return _outcome(outcome)

    def _score(self, role: str, out: pathlib.Path) -> Mapping[str, Any]:
        """Sum the per-sample gradient magnitudes of the derived model over calibration samples."""
        examples = self.context.encoded(self.folder("import"), "harmful", "train").examples
        config = read_hf_config(self.backbone)
        order = np.random.default_rng(self.settings.run.seed).permutation(len(examples))
        chosen = [examples[i] for i in order[:self.settings.score.samples]]
        if len(chosen) < self.settings.score.samples:
            say(f"  only {len(chosen)} of score.samples = {self.settings.score.samples} samples are there; all are used")
        total = self.context.meter(config).measure(
            self._derived(role), chosen, lengths(examples), f"score {role.upper()}")
        save_tree(out / "sensitivity", nest(total))
        return {"samples": len(chosen)}

    def _patch(self, out: pathlib.Path) -> Mapping[str, Any]:
        """Merge the kept entries of both patches into the backbone."""
        merged, statistics = self._apply(self.settings.patch, "patch")
        refuse_no_op(statistics, self.settings.patch)
        total = totals(statistics)
        say(f"  kept {total['kept']:,} of {total['size']:,} entries (SE {total['kept_se']:,}, OSM {total['kept_osm']:,}); "
            f"overlap of the top sets {total['overlap']:.1%}; {total['survival']:.1%} survive the cast")
        if total["survival"] < 0.5:
            say(f"  WARNING: {1 - total['survival']:.0%} of the kept entries are too small for the storage dtype and are "
                "lost. Use --export.dtype=float32 or --export.rounding=stochastic.")
        save_tree(out / "merged", nest(merged))
        return {"total": total, "tensors": statistics}

    def _export(self, out: pathlib.Path) -> Mapping[str, Any]:
        """Write the patched model as a Hugging Face folder."""
        export = self.settings.export
        config, params = self.context.load(self.backbone)
        flat = unnest(params)
        del params
        # The backbone's matrices make room before the patched ones are loaded.
        patched = {row.path: flat.pop(row.path) for row in param_table(config).scope(self.settings.patch.scope)}
        patched = {path: jax.ShapeDtypeStruct(x.shape, x.dtype if export.dtype == "keep" else jnp.dtype(export.dtype),
                                              sharding=x.sharding) for path, x in patched.items()}
        flat |= unnest(load_tree(self.runner.folder("patch") / "merged", nest(patched)))
        written = save_model(out / "model", nest(flat), config, self.backbone, stored=stored_dtypes(self.backbone),
                             dtype=export.dtype, shard_bytes=export.shard_bytes)
        return {"tensors": len(written)}

    def _check_changes(self, changed: Sequence[str]) -> None:
        """Refuse an export that changes nothing, or a tensor that the patch does not touch (METHOD 4.2, 4.6)."""
        patched = {name for name, s in self.runner.result("patch")["tensors"].items() if s["survived"]}
        wrong = sorted(set(changed) - patched)
        if wrong or not changed:
            raise ValueError(f"The exported files differ from the backbone in {len(changed)} tensors, {len(wrong)} of which the "
                             f"patch does not touch ({wrong[:6]}). Did the backbone's folder change during the run? Run again.")

    def _evaluate(self, variant: str, out: pathlib.Path) -> Mapping[str, Any]:
        """Measure one model of the comparison."""
        folder = {"shipped": self.folder("import"), "safepatching": self.folder("export")}.get(variant, self.backbone)
        if variant in ROLES:
            flat = self._derived(variant)
        elif variant == "intersection":
            flat = self._cast(unnest(self.context.load(folder)[1]))
            flat |= self._apply(dataclasses.replace(self.settings.patch, combine="intersection"), "intersection")[0]
        else:
            flat = unnest(self.context.load(folder)[1])
        measures, answers = self._measure(flat, variant)
        files.write_text(out / "answers.jsonl", "".join(json.dumps(a, ensure_ascii=False) + "\n" for a in answers))
        return measures

    def try_patch(self, patch: PatchSettings) -> dict[str, Any]:
        """Return the measures of a patched model without writing anything; the scores must be in place."""
        flat = self._cast(unnest(self.context.load(self.backbone)[1]))
        return self._measure(flat | self._apply(patch, "patch")[0], "patched")[0]

    def _report(self, out: pathlib.Path) -> Mapping[str, Any]:
        answers = {v: files.read_jsonl(self.runner.folder(f"evaluate_{v}") / "answers.jsonl")
                   for v in ("backbone", "safepatching")}
        patch = self.runner.result("patch")
        content = report.gather(
            self.settings, {v: self.runner.result(f"evaluate_{v}") for v in self.variants}, patch["total"],
            {name: self.runner.result(name) for name in self.runner.stages if name.startswith(("align", "derive"))}, answers)
        report.write(content, out)
        exported = files.read_json(self.runner.folder("certify_export") / certificate.FILE)
        files.write_text(out / card.NAME, card.model_card(content, exported, self.context.data_hashes, versions()))
        files.write_json(out / "statistics.json", patch["tensors"])
        return {"orderings": content["orderings"]}

    # -- shared parts -------------------------------------------------------------------------------------------------

    def _measure(self, flat, title):
        source = self.folder("import")  # alignment and patching carry over its tokenizer and architecture
        encoded = {role: self.context.encoded(source, role, self.settings.evaluate.split) for role in EVALUATED}
        return evaluate_model(
            self.context.decoder(read_hf_config(source)), nest(flat), self.context.chat(source), encoded,
            self.context.stop_ids(source), self.settings.evaluate, self.context.sharder, title)

    def _derived(self, role: str) -> dict[str, jax.Array]:
        abstract = param_table(read_hf_config(self.backbone)).abstract(self.context.sharder)
        return unnest(load_tree(self.runner.folder(f"derive_{role}") / "params", abstract))

    def _apply(self, patch, title):
        """Run the patch operation on a freshly loaded backbone, whose buffers it takes over."""
        config, params = self.context.load(self.backbone)
        rows = param_table(config).scope(patch.scope)
        table = unnest(param_table(config).abstract(self.context.sharder))
        abstract = nest({r.path: table[r.path] for r in rows})
        sensitivity = {role: unnest(load_tree(self.runner.folder(f"score_{role}") / "sensitivity", abstract))
                       for role in ROLES}
        derived = {role: self._derived(role) for role in ROLES}
        return apply_patching(unnest(params), derived, sensitivity, rows, patch, self.settings.run.seed,
                              self.context.sharder, title, self.settings.export.dtype, self.settings.export.rounding)

    def _cast(self, flat):
        """Cast the backbone to the storage dtype of the result."""
        dtype = self.settings.export.dtype
        return flat if dtype == "keep" else {path: x.astype(jnp.dtype(dtype)) for path, x in flat.items()}

    @functools.cached_property
    def place(self) -> Place:
        """Where the source is."""
        place = Place.parse(self.settings.model.source)
        return dataclasses.replace(place, path=place.path.absolute())

    def _source_hashes(self) -> dict[str, str]:
        kind, path = self.place.kind, self.place.path
        if kind == "gguf":
            if not path.is_file():
                raise ValueError(f"No model file '{self.settings.model.source}'.")
            return {"gguf": files.file_sha256(path)}
        if kind == "orbax":
            read_description(path)  # says what is wrong with the folder, if anything
            return {str(p.relative_to(path)): files.file_sha256(p) for p in sorted(path.rglob("*")) if p.is_file()}
        read_hf_config(path)
        Checkpoint(path)
        return {p.name: files.file_sha256(p) for p in sorted(path.iterdir()) if p.is_file()}

    def _claim_workdir(self, update: bool) -> None:
        path = self.workdir / "settings.json"
        if not path.is_file():
            if self.workdir.is_dir() and {p.name for p in self.workdir.iterdir()} - {"stages", "sweep.jsonl"}:
                raise ValueError(f"{self.workdir} holds files that are not of a run; use a new or empty --workdir.")
            return
        try:
            old = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(old, dict) or not all(isinstance(group, dict) for group in old.values()):
                raise ValueError("it holds no settings")
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}). Delete the workdir or use another.") from error
        differences = [d for d in settings_differences(old, self.settings.to_dict())
                       if not d.startswith(PLACE)]
        if differences and not update:
            raise ValueError(
                f"The workdir {self.workdir} was made by other settings: " + "; ".join(differences)
                + ". Use another --workdir, or --update to run again the stages that these settings change.")

    def _publish(self) -> None:
        """Copy the report beside the settings and write the run's manifest."""
        source = self.runner.folder("report")
        for name in report.FILES:
            files.copy(source / name, self.workdir / name)
        files.copy(source / card.NAME, self.folder("export") / card.NAME)
        files.copy(self.runner.folder("certify_export") / certificate.FILE, self.folder("export") / certificate.FILE)
        files.write_json(self.workdir / "manifest.json", {
            "model": str(self.folder("export").relative_to(self.workdir)),
            "versions": versions(),
            "stages": {name: {k: v for k, v in self.runner.manifest(name).items() if k != "settings"}
                       for name in self.runner.stages},
        })


def align_model(settings: Settings, out: str | pathlib.Path) -> None:
    """Align a model and copy the result, which stays in the cache, to a new folder.

    Raises:
      ValueError: bad settings, model or data; `out` exists and is not empty.
    """
    out = pathlib.Path(out).expanduser()
    files.refuse_full_folder(out)
    job = Job(settings.override({"align.enabled": True}), out)
    job.runner.finish(["import", "align"])
    with files.new_folder(out) as folder:
        shutil.copytree(job.folder("align"), folder, dirs_exist_ok=True)
        found = certificate.certify(folder, job.context.sharder, logits=settings.run.certify == "logits", kind="export")
        files.write_json(folder / certificate.FILE, found)
    say(certificate.summary(found))


def _outcome(outcome) -> dict[str, Any]:
    return {"steps": len(outcome.nll), "stopped_by": outcome.stopped_by, "nll": list(outcome.nll)}
