"""What each stage of a run does: import, align, derive, score, patch, export, certify, evaluate,
report.

Each function fills the empty folder it is given and returns what the stage's manifest records.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from safepatch_jax.data.pipeline import Pool
from safepatch_jax.data.windows import ALL
from safepatch_jax.evaluation.measures import ANSWERS
from safepatch_jax.io.beside import say_notes
from safepatch_jax.io.checkpoint import save_tree
from safepatch_jax.io.folder import Checkpoint, stored_dtypes, tensor_hashes
from safepatch_jax.io.hf import check_keys, save_model
from safepatch_jax.models.config import read_hf_config
from safepatch_jax.models.table import nest, param_table, unnest
from safepatch_jax.patch_file.create import create
from safepatch_jax.patching import PATCH_ROLES
from safepatch_jax.patching.agreement import describe_agreement
from safepatch_jax.patching.options import scope_rows
from safepatch_jax.patching.statistics import describe_totals, one_sided, refuse_no_op, totals
from safepatch_jax.run import card, certificate, models, report, scratch
from safepatch_jax.run.card_data import base_of
from safepatch_jax.run.convert import convert
from safepatch_jax.run.figures import PATCH, draw_patch
from safepatch_jax.run.published import CARD, CERTIFICATE
from safepatch_jax.run.stages import MANIFEST, versions
from safepatch_jax.run.state import Run
from safepatch_jax.runtime import files, processes
from safepatch_jax.runtime.console import say, some
from safepatch_jax.training.journal import Recipe, ignore
from safepatch_jax.training.step import TrainingOutcome

Result = Mapping[str, Any]


def import_model(run: Run, out: pathlib.Path) -> Result:
    """Convert another source into a Hugging Face folder; check such a folder where it lies."""
    source, folder = run.source, run.imported
    if source.kind != "hf":
        folder = out / "model"
        say(f"  converting {source.path.name} into a Hugging Face folder, once, in the cache")
        mesh = run.settings.mesh.shape
        convert(f"{source.kind}:{source.path}", f"hf:{folder}", mesh=mesh, certify="hashes")
    config = read_hf_config(folder)
    table = param_table(config)
    checkpoint = Checkpoint(folder)
    check_keys(checkpoint, table, config)
    say_notes(folder, checkpoint.notes)
    run.context.chat(folder)  # a bad tokenizer is found now, not after training
    head = "tied" if config.tied_head else "untied"
    say(
        f"  {config.family}, {table.size:,} parameters, {config.num_layers} layers, "
        f"{config.num_heads} heads over {config.num_kv_heads} KV heads, head {head}"
    )
    return {
        "parameters": table.size,
        "tensors": len(table.hf_names()),
        "config": dataclasses.asdict(config),
    }


def certify_import(run: Run, out: pathlib.Path) -> Result:
    """Examine the source as it lies on disk."""
    return _certify(run, run.imported, out, "import")


def certify_export(run: Run, out: pathlib.Path) -> Result:
    """Examine what was written, and that the patched tensors alone differ from the backbone."""
    hashes = processes.on_first(tensor_hashes, Checkpoint(run.backbone).tensors)
    result = _certify(run, run.folder("export"), out, "export", hashes, run.source.origin)
    if run.settings.export.dtype == "keep":
        _check_changes(run, result["changed"])
    return result


def _certify(
    run: Run,
    folder: pathlib.Path,
    out: pathlib.Path,
    kind: str,
    before: Mapping[str, str] | None = None,
    origin: str = "",
) -> dict[str, Any]:
    logits = run.settings.run.certify == "logits"
    content = certificate.certify(
        folder, run.context.sharder, logits=logits, kind=kind, before=before
    )
    if origin:
        content["source"] = origin
    processes.on_first(files.write_json, out / CERTIFICATE, content)
    say(f"  {certificate.summary(content)}")
    return {"logits": content["logits"], "changed": content.get("changed")}


def _check_changes(run: Run, changed: Sequence[str]) -> None:
    """Refuse an export that changes nothing, or a tensor that the patch does not touch."""
    patched = set()
    for name, statistics in run.runner.result("patch")["tensors"].items():
        if statistics["survived"]:
            patched.add(name)
    strangers = sorted(set(changed) - patched)
    if strangers or not changed:
        raise ValueError(
            f"The exported files differ from the backbone in {len(changed)} tensors, "
            f"{len(strangers)} of which the patch does not touch ({some(strangers, ', ')}). Did "
            "the backbone's folder change during the run? Run again."
        )


def refuse_mixed_dtypes(run: Run) -> None:
    """Refuse layers of one patched parameter in different dtypes: they are merged in one dtype, and
    cast once."""
    if run.settings.export.dtype != "keep":
        return
    folder = run.imported
    stored = stored_dtypes(folder)
    mixed = []
    for row in scope_rows(param_table(read_hf_config(folder)), run.settings.patch):
        if len({stored[name] for name in row.hf_names}) > 1:
            mixed.append(row.hf_name)
    if mixed:
        raise ValueError(
            f"{folder}: the layers of {', '.join(mixed)} are stored in different dtypes. Use "
            "--export.dtype=float32 (or another), or convert the model to one dtype first: "
            "python -m launch.convert --source=hf:DIR --target=hf:DIR2 --dtype=..."
        )


def align(run: Run, out: pathlib.Path) -> Result:
    """Tune the imported model on refusals and ordinary answers, with the patches' train step."""
    settings, source = run.settings.align, run.imported
    refusals = run.context.encoded(source, "harmful", "train", "refusal").examples
    ordinary = run.context.encoded(source, "ordinary", "train").examples
    share = round(settings.batch_size * settings.ordinary_share)
    pools = []
    for examples, rows in ((refusals, settings.batch_size - share), (ordinary, share)):
        if rows:
            pools.append((examples, rows))
    recipe = Recipe(1.0, settings.steps, settings.learning_rate)
    tuned, outcome = _tune(run, "align", source, pools, recipe)
    config = read_hf_config(source)
    save_model(out / "model", tuned, config, source, stored=stored_dtypes(source))
    return _summary(outcome)


def derive(run: Run, role: str, out: pathlib.Path) -> Result:
    """Fine-tune a copy of the backbone on harmful answers: ascent (SE) or descent (OSM)."""
    settings = run.settings.derive
    window, form = getattr(settings, f"{role}_tokens"), getattr(settings, f"{role}_prompts")
    examples = models.training_examples(run, role, window)
    if (window, form) != (ALL, "all"):
        say(f"  loss on the answer tokens {window} of {len(examples)} examples, prompts: {form}")
    if role == "se":
        recipe = Recipe(
            -1.0,
            settings.se_steps,
            settings.se_learning_rate,
            settings.se_nll_ceiling,
            settings.weight_decay,
        )
    else:
        recipe = Recipe(
            1.0,
            settings.osm_steps,
            settings.osm_learning_rate,
            weight_decay=settings.weight_decay,
        )
    pools = [(examples, settings.batch_size)]
    seed = _own_seed(run) if role == "osm" else None
    tuned, outcome = _tune(run, f"derive_{role}", run.backbone, pools, recipe, seed)
    first, last = outcome.nll[0], outcome.nll[-1]
    say(f"  stopped by {outcome.stopped_by}: answer NLL {first:.2f} -> {last:.2f}")
    weights = unnest(tuned)
    del tuned  # they go one by one
    scratch.save_derived(run, weights, out)
    return _summary(outcome)


def _own_seed(run: Run) -> int | None:
    """Return the seed of the OSM patch's batch order where it has one of its own.

    It is drawn from both numbers: run.seed, which studies count up, may come to equal
    derive.osm_seed, and the two orders would be one again.
    """
    own = run.settings.derive.osm_seed
    if own < 0:
        return None
    return int(np.random.SeedSequence((run.settings.run.seed, own)).generate_state(1)[0])


def _tune(
    run: Run,
    stage: str,
    folder: pathlib.Path,
    pools: Sequence[Pool],
    recipe: Recipe,
    seed: int | None = None,
) -> tuple[Any, TrainingOutcome]:
    """Tune the model of a folder, with checkpoints beside the stage's folder; see `Context.tune`
    for the seed."""
    record = ignore if run.metrics is None else run.metrics.recorder(stage)
    verb, _, role = stage.partition("_")
    title = f"{verb} {role.upper()}".strip()
    steps = run.runner.aside(stage)
    patches = stage != "align"
    return run.context.tune(folder, pools, recipe, title, steps, record, seed=seed, patches=patches)


def _summary(outcome: TrainingOutcome) -> Result:
    return {
        "steps": len(outcome.nll),
        "stopped_by": outcome.stopped_by,
        "nll": list(outcome.nll),
    }


def score(run: Run, role: str, out: pathlib.Path) -> Result:
    """Sum gradient magnitudes of the derived model over calibration samples."""
    settings = run.settings.score
    samples = models.calibration(run, settings, role)
    if len(samples) < settings.samples:
        say(f"  all {len(samples)} samples are used, fewer than score.samples={settings.samples}")
    scratch.save_scores(run, models.sensitivity(run, role, settings), out)
    if settings.mode == "batched":
        # Both modes over two batches, on one weight: see `models._mode_overlap`.
        meter = run.context.meter(read_hf_config(run.backbone), witness=True)
        few = samples[: 2 * settings.batch_size]
        compared = {}
        for mode in models.MODES:
            flat = models.measure_sensitivity(run, meter, role, few, settings, mode)
            compared[mode] = nest(flat)
        save_tree(out / "compared", compared)
    return {"samples": len(samples)}


def patch(run: Run, out: pathlib.Path) -> Result:
    """Merge the kept entries of both patches into the backbone."""
    result = models.apply_patch(run, run.settings.patch, "patch")
    refuse_no_op(result.statistics, run.settings.patch)
    total = totals(result.statistics) | result.mode_overlap
    say(f"  {describe_agreement(total)}")
    say(f"  {describe_totals(total)}")
    if warning := one_sided(total, run.settings.patch):
        say(f"  {warning}")
    if total["survival"] < 0.5:
        say(
            f"  WARNING: {1 - total['survival']:.0%} of the kept entries are too small for the "
            "storage dtype and are lost. Use --export.dtype=float32 or "
            "--export.rounding=stochastic."
        )
    flat = result.others | result.weights
    _save(run, flat, out / "model")
    return {
        "total": total,
        "tensors": result.statistics,
        "shard_bytes": run.settings.export.shard_bytes,
    }


def _save(run: Run, flat: models.Flat, folder: pathlib.Path) -> None:
    settings = run.settings.export
    save_model(
        folder,
        nest(flat),
        read_hf_config(run.backbone),
        run.backbone,
        stored=stored_dtypes(run.backbone),
        dtype=settings.dtype,
        shard_bytes=settings.shard_bytes,
    )


def export(run: Run, out: pathlib.Path) -> Result:
    """Put the patched model in its place, a Hugging Face folder.

    Its files are those of the patch stage, linked, so that they lie on the disk once; where a file
    system has no links, or files are to be cut otherwise, written anew.
    """
    made, cut = run.folder("patch"), run.runner.result("patch").get("shard_bytes")
    if cut is None:  # an earlier version's, which kept the patched weights alone
        _save(run, models.patched(run, run.settings.patch), out / "model")
    elif cut != run.settings.export.shard_bytes:
        _save(run, unnest(run.context.load(made)[1]), out / "model")
    else:
        processes.on_first(_link_or_copy, made, out / "model")
    return {"tensors": processes.on_first(_count, out / "model")}


def _count(folder: pathlib.Path) -> int:
    return len(stored_dtypes(folder))


def _link_or_copy(source: pathlib.Path, target: pathlib.Path) -> None:
    copied: list[str] = []

    def place(path: str, other: str) -> None:
        try:
            os.link(path, other)
        except OSError:
            shutil.copyfile(path, other)
            copied.append(path)

    shutil.copytree(source, target, copy_function=place)
    if copied:
        say("  This file system has no links: the model lies in the workdir twice until the end.")
    with contextlib.suppress(OSError):  # links count as a change of the patch stage's files
        os.utime(source.parent / MANIFEST)


def write_patch_file(run: Run, out: pathlib.Path) -> Result:
    """Write down where the exported model differs from the backbone."""
    return processes.on_first(_write_patch_file, run, out)


def _write_patch_file(run: Run, out: pathlib.Path) -> Result:
    settings = run.settings.to_dict()
    about = {
        "settings": {group: settings[group] for group in ("derive", "score", "patch", "export")},
        "seed": run.settings.run.seed,
        "data": dict(run.context.data_hashes),
        "versions": versions(),
        "statistics": run.runner.result("patch")["total"],
    }
    if prompts := run.context.prompt_format.key():
        about["prompts"] = prompts
    if run.source.origin:
        about["source"] = run.source.origin
    file = create(run.backbone, run.folder("export"), out / "patch.safetensors", about)
    size, entries = file.path.stat().st_size, file.entries()
    say(
        f"  {entries:,} entries in {len(file.changed())} tensors, {size / 1e6:,.1f} MB, "
        f"{size / entries:.2f} bytes an entry"
    )
    return {"entries": entries, "bytes": size}


def evaluate(run: Run, variant: str, out: pathlib.Path) -> Result:
    """Measure one model of the report."""
    measures, answers = models.measure(run, _variant(run, variant), variant)
    processes.on_first(files.write_jsonl, out / ANSWERS, answers)
    return measures


def _variant(run: Run, variant: str) -> models.Flat:
    """Return the flat parameters of a model of the report."""
    if variant in PATCH_ROLES:
        # In the dtype to which each use would cast it.
        return scratch.derived(run, variant, run.settings.model.compute_dtype)
    if variant == "intersection":
        settings = dataclasses.replace(
            run.settings.patch, merge="safepatching", combine="intersection"
        )
        result = models.apply_patch(run, settings, "intersection")
        return models.in_storage_dtype(run, result.others) | result.weights
    folders = {
        "shipped": run.imported,
        "backbone": run.backbone,
        "safepatching": run.folder("export"),
    }
    return unnest(run.context.load(folders[variant])[1])


def write_report(run: Run, variants: Sequence[str], out: pathlib.Path) -> Result:
    """Write the report, the model card and the pictures."""
    return processes.on_first(_write_report, run, variants, out)


def _write_report(run: Run, variants: Sequence[str], out: pathlib.Path) -> Result:
    answers = {}
    for variant in ("backbone", "safepatching"):
        answers[variant] = files.read_jsonl(run.runner.outputs(f"evaluate_{variant}") / ANSWERS)
    training = {}
    for name in run.runner.stages:
        if name.startswith(("align", "derive")):
            training[name] = run.runner.result(name)
    statistics = run.runner.result("patch")
    measures = {variant: run.runner.result(f"evaluate_{variant}") for variant in variants}
    content = report.gather(run.settings, measures, statistics["total"], training, answers)
    report.write(content, out)
    exported = files.read_json(run.runner.outputs("certify_export") / CERTIFICATE)
    context = run.context
    base = base_of(run.settings.model.source, run.source.origin, run.imported)
    text = card.model_card(
        content, exported, context.data_hashes, versions(), context.prompt_format, base
    )
    files.write_text(out / CARD, text)
    files.write_json(out / "statistics.json", statistics["tensors"])
    draw_patch(statistics["tensors"], out / PATCH)
    return {"orderings": content["orderings"]}
