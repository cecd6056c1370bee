"""What each stage of a run does: import, align, derive, score, patch, export, certify, evaluate,
report."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from safepatch_jax.data.chat import Chat, Example
from safepatch_jax.data.pipeline import Pool, shapes
from safepatch_jax.data.records import DATA_ROLES as EVALUATED
from safepatch_jax.data.records import Record, load_records
from safepatch_jax.evaluation.measures import evaluate_model
from safepatch_jax.io.checkpoint import StoredTree, load_tree, read_description, save_tree
from safepatch_jax.io.folder import Checkpoint, stored_dtypes, tensor_hashes
from safepatch_jax.io.hf import check_keys, save_model
from safepatch_jax.models.config import read_hf_config
from safepatch_jax.models.table import nest, param_table, unnest
from safepatch_jax.patch_file.file import create
from safepatch_jax.patching.importance import SensitivityMeter, mode_agreement, witness_row
from safepatch_jax.patching.merge import ROLES, apply_patching
from safepatch_jax.patching.selection import top_count
from safepatch_jax.patching.statistics import refuse_no_op, totals
from safepatch_jax.patching.tensor import UNSCORED
from safepatch_jax.run import card, certificate, report
from safepatch_jax.run.context import Context
from safepatch_jax.run.convert import Place, convert
from safepatch_jax.run.figures import PATCH, draw_patch
from safepatch_jax.run.metrics import Metrics
from safepatch_jax.run.stages import Runner, versions
from safepatch_jax.runtime import files, processes
from safepatch_jax.runtime.console import say
from safepatch_jax.settings import PatchSettings, ScoreSettings, Settings
from safepatch_jax.training.step import Recipe, TrainingOutcome, ignore

_MODES = ("per_sample", "batched")


class Work:
    """The bodies of a run's stages. Each fills the empty folder it is given and returns what its
    manifest records."""

    runner: Runner
    metrics: Metrics | None = None

    def __init__(self, settings: Settings, read: Callable[..., Sequence[Record]] = load_records):
        self.settings, self.context = settings, Context(settings, read)

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
            return {
                str(p.relative_to(path)): files.file_sha256(p)
                for p in sorted(path.rglob("*"))
                if p.is_file()
            }
        read_hf_config(path)
        Checkpoint(path)
        return {p.name: files.file_sha256(p) for p in sorted(path.iterdir()) if p.is_file()}

    def folder(self, name: str) -> pathlib.Path:
        """Return the model folder that a stage stands for."""
        if name == "import" and self.place.kind == "hf":
            return self.place.path
        return self.runner.folder(name) / "model"

    @property
    def backbone(self) -> pathlib.Path:
        return self.folder("align" if self.settings.align.enabled else "import")

    def _import(self, out: pathlib.Path) -> Mapping[str, Any]:
        """Convert another source into a Hugging Face folder; check a folder in that format where it
        lies."""
        place, folder = self.place, self.folder("import")
        if place.kind != "hf":
            folder = out / "model"
            say(f"  converting {place.path.name} into a Hugging Face folder, once, in the cache")
            convert(
                f"{place.kind}:{place.path}",
                f"hf:{folder}",
                mesh=self.settings.mesh.shape,
                certify="hashes",
            )
        config = read_hf_config(folder)
        table = param_table(config)
        check_keys(Checkpoint(folder), table, config)
        Chat(folder, config.vocab_size)  # a bad tokenizer is found now, not after training
        say(
            f"  {config.family}, {table.size:,} parameters, {config.num_layers} layers, "
            f"{config.num_heads} heads over "
            f"{config.num_kv_heads} KV heads, head {'tied' if config.tied_head else 'untied'}"
        )
        return {
            "parameters": table.size,
            "tensors": len(table.hf_names()),
            "config": dataclasses.asdict(config),
        }

    def _certify_import(self, out: pathlib.Path) -> Mapping[str, Any]:
        """Examine the source as it lies on disk."""
        return self._certify(self.folder("import"), out, "import")

    def _certify_export(self, out: pathlib.Path) -> Mapping[str, Any]:
        """Examine what was written, and that the patched tensors alone differ from the backbone."""
        before = processes.on_first(lambda: tensor_hashes(Checkpoint(self.backbone).tensors))
        found = self._certify(self.folder("export"), out, "export", before)
        if self.settings.export.dtype == "keep":
            self._check_changes(found["changed"])
        return found

    def _certify(
        self,
        folder: pathlib.Path,
        out: pathlib.Path,
        kind: str,
        before: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        logits = self.settings.run.certify == "logits"
        found = certificate.certify(
            folder, self.context.sharder, logits=logits, kind=kind, before=before
        )
        processes.on_first(lambda: files.write_json(out / certificate.FILE, found))
        say(f"  {certificate.summary(found)}")
        return {"logits": found["logits"], "changed": found.get("changed")}

    def _refuse_mixed_dtypes(self) -> None:
        """Refuse layers of one patched parameter in different dtypes: they are merged in one dtype,
        and cast once."""
        if self.settings.export.dtype != "keep":
            return
        folder = self.folder("import")
        stored = stored_dtypes(folder)
        mixed = [
            row.hf_name
            for row in param_table(read_hf_config(folder)).scope(self.settings.patch.scope)
            if len({stored[name] for name in row.hf_names}) > 1
        ]
        if mixed:
            raise ValueError(
                f"{folder}: the layers of {', '.join(mixed)} are stored in different dtypes. Use "
                "--export.dtype=float32 (or another), or convert the model to one dtype first: "
                "python -m launch.convert --source=hf:DIR --target=hf:DIR2 --dtype=..."
            )

    def _align(self, out: pathlib.Path) -> Mapping[str, Any]:
        """Tune the imported model on refusals and ordinary answers, with the train step of the
        patches."""
        align, source = self.settings.align, self.folder("import")
        refusals = self.context.encoded(source, "harmful", "train", "refusal").examples
        ordinary = self.context.encoded(source, "ordinary", "train").examples
        share = round(align.batch_size * align.ordinary_share)
        pools = [
            (pool, rows)
            for pool, rows in ((refusals, align.batch_size - share), (ordinary, share))
            if rows
        ]
        config = read_hf_config(source)
        tuned, outcome = self._tune(
            "align", source, pools, Recipe(1.0, align.steps, align.learning_rate)
        )
        save_model(out / "model", tuned, config, source, stored=stored_dtypes(source))
        return _outcome(outcome)

    def _derive(self, role: str, out: pathlib.Path) -> Mapping[str, Any]:
        """Fine-tune a copy of the backbone on harmful answers: up the loss (SE) or down it
        (OSM)."""
        derive = self.settings.derive
        examples = self.context.encoded(self.folder("import"), "harmful", "train").examples
        recipe = Recipe(
            sign=-1.0 if role == "se" else 1.0,
            steps=getattr(derive, f"{role}_steps"),
            learning_rate=getattr(derive, f"{role}_learning_rate"),
            nll_ceiling=derive.se_nll_ceiling if role == "se" else float("inf"),
            weight_decay=derive.weight_decay,
        )
        tuned, outcome = self._tune(
            f"derive_{role}", self.backbone, [(examples, derive.batch_size)], recipe
        )
        say(
            f"  stopped by {outcome.stopped_by}: answer NLL {outcome.nll[0]:.2f} -> "
            f"{outcome.nll[-1]:.2f}"
        )
        save_tree(out / "params", tuned)
        return _outcome(outcome)

    def _tune(
        self, stage: str, folder: pathlib.Path, pools: Sequence[Pool], recipe: Recipe
    ) -> tuple[Any, TrainingOutcome]:
        """Tune the model of a folder, with checkpoints beside the stage's folder."""
        verb, _, role = stage.partition("_")
        record = self.metrics.recorder(stage) if self.metrics else ignore
        return self.context.tune(
            folder,
            pools,
            recipe,
            f"{verb} {role.upper()}".strip(),
            self.runner.aside(stage),
            record,
        )

    def _score(self, role: str, out: pathlib.Path) -> Mapping[str, Any]:
        """Sum gradient magnitudes of the derived model, of each sample or of each batch, over
        calibration samples."""
        score = self.settings.score
        chosen = self._samples(score)
        if len(chosen) < score.samples:
            say(
                f"  only {len(chosen)} of score.samples = {score.samples} samples are there; all "
                "are used"
            )
        save_tree(out / "sensitivity", nest(self.sensitivity(role, score)))
        if score.mode == "batched":  # both modes over two batches, on one weight: see _mode_overlap
            meter = self.context.meter(read_hf_config(self.backbone), witness=True)
            save_tree(
                out / "compared",
                {
                    mode: nest(
                        self._sensitivity(meter, role, chosen[: 2 * score.batch_size], mode, score)
                    )
                    for mode in _MODES
                },
            )
        return {"samples": len(chosen)}

    def sensitivity(self, role: str, score: ScoreSettings) -> dict[str, jax.Array]:
        """Return the summed gradient magnitudes of a derived model that is in place, flat, float32,
        over the scope."""
        meter = self.context.meter(read_hf_config(self.backbone))
        return self._sensitivity(meter, role, self._samples(score), score.mode, score)

    def _samples(self, score: ScoreSettings) -> list[Example]:
        examples = self.context.encoded(self.folder("import"), "harmful", "train").examples
        order = np.random.default_rng(self.settings.run.seed).permutation(len(examples))
        return [examples[i] for i in order[: score.samples]]

    def _sensitivity(
        self,
        meter: SensitivityMeter,
        role: str,
        chosen: Sequence[Example],
        mode: str,
        score: ScoreSettings,
    ) -> dict[str, jax.Array]:
        examples = self.context.encoded(self.folder("import"), "harmful", "train").examples
        padded = shapes(examples, self.settings.data.length_buckets)
        size = score.batch_size if mode == "batched" else 1
        return meter.measure(
            self.derived(role), chosen, padded, f"score {role.upper()} {mode}", size
        )

    def _patch(self, out: pathlib.Path) -> Mapping[str, Any]:
        """Merge the kept entries of both patches into the backbone."""
        merged, _, statistics, modes = self._apply(self.settings.patch, "patch")
        refuse_no_op(statistics, self.settings.patch)
        total = totals(statistics) | modes
        say(
            f"  kept {total['kept']:,} of {total['size']:,} entries (SE {total['kept_se']:,}, OSM "
            f"{total['kept_osm']:,}); "
            f"overlap of the top sets {total['overlap']:.1%}; {total['survival']:.1%} survive the "
            "cast"
        )
        if total["survival"] < 0.5:
            say(
                f"  WARNING: {1 - total['survival']:.0%} of the kept entries are too small for "
                "the storage dtype and are "
                "lost. Use --export.dtype=float32 or --export.rounding=stochastic."
            )
        save_tree(out / "merged", nest(merged))
        return {"total": total, "tensors": statistics}

    def _export(self, out: pathlib.Path) -> Mapping[str, Any]:
        """Write the patched model as a Hugging Face folder."""
        export = self.settings.export
        config, params = self.context.load(self.backbone)
        flat = unnest(params)
        del params
        # The backbone's matrices make room before the patched ones are loaded.
        patched = {
            row.path: flat.pop(row.path)
            for row in param_table(config).scope(self.settings.patch.scope)
        }
        patched = {
            path: jax.ShapeDtypeStruct(
                x.shape,
                x.dtype if export.dtype == "keep" else jnp.dtype(export.dtype),
                sharding=x.sharding,
            )
            for path, x in patched.items()
        }
        flat |= unnest(load_tree(self.runner.folder("patch") / "merged", nest(patched)))
        written = save_model(
            out / "model",
            nest(flat),
            config,
            self.backbone,
            stored=stored_dtypes(self.backbone),
            dtype=export.dtype,
            shard_bytes=export.shard_bytes,
        )
        return {"tensors": len(written)}

    def _patch_file(self, out: pathlib.Path) -> Mapping[str, Any]:
        """Write down where the exported model differs from the backbone."""
        return processes.on_first(lambda: self._create_patch_file(out))

    def _create_patch_file(self, out: pathlib.Path) -> Mapping[str, Any]:
        told = self.settings.to_dict()
        patch = create(
            self.backbone,
            self.folder("export"),
            out / "patch.safetensors",
            {
                "settings": {
                    group: told[group] for group in ("derive", "score", "patch", "export")
                },
                "seed": self.settings.run.seed,
                "data": dict(self.context.data_hashes),
                "versions": versions(),
                "statistics": self.runner.result("patch")["total"],
            },
        )
        size = patch.path.stat().st_size
        say(
            f"  {patch.entries():,} entries in {len(patch.changed())} tensors, {size / 1e6:,.1f} "
            "MB, "
            f"{size / patch.entries():.2f} bytes an entry"
        )
        return {"entries": patch.entries(), "bytes": size}

    def _check_changes(self, changed: Sequence[str]) -> None:
        """Refuse an export that changes nothing, or a tensor that the patch does not touch."""
        patched = {
            name for name, s in self.runner.result("patch")["tensors"].items() if s["survived"]
        }
        wrong = sorted(set(changed) - patched)
        if wrong or not changed:
            raise ValueError(
                f"The exported files differ from the backbone in {len(changed)} tensors, "
                f"{len(wrong)} of which the "
                f"patch does not touch ({wrong[:6]}). Did the backbone's folder change during the "
                "run? Run again."
            )

    def _evaluate(self, variant: str, out: pathlib.Path) -> Mapping[str, Any]:
        """Measure one model of the comparison."""
        folder = {"shipped": self.folder("import"), "safepatching": self.folder("export")}.get(
            variant, self.backbone
        )
        if variant in ROLES:
            flat = self.derived(
                variant, self.settings.model.compute_dtype
            )  # to which it would be cast at each use
        elif variant == "intersection":
            patch = dataclasses.replace(
                self.settings.patch, merge="safepatching", combine="intersection"
            )
            merged, rest, *_ = self._apply(patch, "intersection")
            flat = self._cast(rest) | merged
        else:
            flat = unnest(self.context.load(folder)[1])
        measures, answers = self._measure(flat, variant)
        processes.on_first(
            lambda: files.write_text(
                out / "answers.jsonl",
                "".join(json.dumps(a, ensure_ascii=False) + "\n" for a in answers),
            )
        )
        return measures

    def try_patch(self, patch: PatchSettings, seed: int | None = None) -> dict[str, Any]:
        """Return the measures of a patched model without writing anything; see `patched`."""
        return self._measure(self.patched(patch, seed), "patched")[0]

    def patched(
        self,
        patch: PatchSettings,
        seed: int | None = None,
        sensitivity: Mapping[str, Mapping[str, jax.Array]] | None = None,
    ) -> dict[str, jax.Array]:
        """Return the flat parameters of a patched model in their storage dtype, without writing
        anything.

        Args:
          patch: settings; derived models and scores must be in place.
          seed: of the random retention and the stochastic rounding, if not the run's.
          sensitivity: {'se', 'osm'}: takes the place of the stored scores, see `sensitivity`.

        Raises:
          ValueError: the patch changes nothing.
        """
        merged, rest, statistics, _ = self._apply(patch, "patch", seed, sensitivity)
        refuse_no_op(statistics, patch)
        return self._cast(rest) | merged

    def _report(self, out: pathlib.Path) -> Mapping[str, Any]:
        return processes.on_first(lambda: self._write_report(out))

    def _write_report(self, out: pathlib.Path) -> Mapping[str, Any]:
        answers = {
            v: files.read_jsonl(self.runner.folder(f"evaluate_{v}") / "answers.jsonl")
            for v in ("backbone", "safepatching")
        }
        patch = self.runner.result("patch")
        content = report.gather(
            self.settings,
            {v: self.runner.result(f"evaluate_{v}") for v in self.variants},
            patch["total"],
            {
                name: self.runner.result(name)
                for name in self.runner.stages
                if name.startswith(("align", "derive"))
            },
            answers,
        )
        report.write(content, out)
        exported = files.read_json(self.runner.folder("certify_export") / certificate.FILE)
        files.write_text(
            out / card.NAME,
            card.model_card(content, exported, self.context.data_hashes, versions()),
        )
        files.write_json(out / "statistics.json", patch["tensors"])
        draw_patch(patch["tensors"], out / PATCH)
        return {"orderings": content["orderings"]}

    # -- shared parts
    # -------------------------------------------------------------------------------------------------

    def _measure(self, flat, title):
        source = self.folder(
            "import"
        )  # alignment and patching carry over its tokenizer and architecture
        encoded = {
            role: self.context.encoded(source, role, self.settings.evaluate.split)
            for role in EVALUATED
        }
        decoder = self.context.decoder(read_hf_config(source))
        return evaluate_model(
            decoder,
            nest(flat),
            self.context.chat(source),
            encoded,
            self.context.stop_ids(source),
            self.settings.evaluate,
            decoder.sharder,
            title,
        )

    def derived(self, role: str, dtype: str = "float32") -> dict[str, jax.Array]:
        """Return the flat parameters of a derived model; its stage must be in place."""
        abstract = param_table(read_hf_config(self.backbone)).abstract(
            self.context.sharder, jnp.dtype(dtype)
        )
        return unnest(load_tree(self.runner.folder(f"derive_{role}") / "params", abstract))

    def _apply(self, patch, title, seed=None, sensitivity=None):
        """Run the patch operation on a freshly loaded backbone, whose buffers it takes over.

        Returns:
          (the patched weights, the backbone's other parameters, statistics by tensor, overlap of
          the score modes).
        """
        config, params = self.context.load(self.backbone)
        rows = param_table(config).scope(patch.scope)
        table = unnest(param_table(config).abstract(self.context.sharder))
        abstract = nest({r.path: table[r.path] for r in rows})
        stored = (
            lambda stage, name: {  # read weight by weight: the backbone is all that is held whole
                role: StoredTree(self.runner.folder(f"{stage}_{role}") / name, abstract)
                for role in ROLES
            }
        )
        derived, sensitivity = (
            stored("derive", "params"),
            sensitivity or stored("score", "sensitivity"),
        )
        backbone = unnest(params)
        modes = (
            self._mode_overlap(backbone, derived, abstract, witness_row(rows))
            if patch is self.settings.patch
            else {}
        )
        merged, statistics = apply_patching(
            backbone,
            derived,
            sensitivity,
            rows,
            patch,
            self.settings.run.seed if seed is None else seed,
            self.context.sharder,
            title,
            self.settings.export.dtype,
            self.settings.export.rounding,
        )
        return (
            merged,
            {path: x for path, x in backbone.items() if path not in merged},
            statistics,
            modes,
        )

    def _mode_overlap(self, backbone, derived, abstract, row) -> dict[str, float]:
        """Return the Jaccard index of the top sets by batched and per-sample scores, taken in each
        matrix of one weight."""
        if self.settings.score.mode != "batched" or self.settings.patch.importance in UNSCORED:
            return {}
        patch, overlaps = self.settings.patch, {}
        one = nest({row.path: unnest(abstract)[row.path]})
        for role, rate in (("se", patch.top_rate_se), ("osm", patch.top_rate_osm)):
            trees = load_tree(
                self.runner.folder(f"score_{role}") / "compared",
                {"per_sample": one, "batched": one},
            )
            both, either = mode_agreement(
                *(row.as_matrices(tree[row.path]) for tree in (backbone, derived[role])),
                tuple(row.as_matrices(unnest(tree)[row.path]) for tree in trees.values()),
                top_count(rate, math.prod(row.hf_shape)),
                kind=patch.importance,
            )
            both, either = (int(processes.fetch(n).sum(dtype=np.int64)) for n in (both, either))
            overlaps[f"mode_overlap_{role}"] = both / max(1, either)
        say(
            "  top sets by batched and per-sample scores, Jaccard index on "
            + row.path
            + ": "
            + ", ".join(f"{name[13:].upper()} {value:.1%}" for name, value in overlaps.items())
        )
        return overlaps

    def _cast(self, flat):
        """Cast the backbone to the storage dtype of the result."""
        dtype = self.settings.export.dtype
        return (
            flat
            if dtype == "keep"
            else {path: x.astype(jnp.dtype(dtype)) for path, x in flat.items()}
        )


def _outcome(outcome) -> dict[str, Any]:
    return {"steps": len(outcome.nll), "stopped_by": outcome.stopped_by, "nll": list(outcome.nll)}
