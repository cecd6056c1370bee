"""The models of a run on the devices: derived ones, their sensitivities, patched ones, and what is
measured of them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from safepatch_jax.data.chat import Example
from safepatch_jax.data.pipeline import shapes
from safepatch_jax.data.prompt_forms import in_form
from safepatch_jax.data.records import DATA_ROLES
from safepatch_jax.data.windows import in_window
from safepatch_jax.evaluation.measures import measure_roles
from safepatch_jax.io.checkpoint import load_tree
from safepatch_jax.models.config import read_hf_config
from safepatch_jax.models.table import Param, nest, param_table, unnest
from safepatch_jax.patching import PATCH_ROLES
from safepatch_jax.patching.kept import KeptEntries, keep_entries, selection, weigh_entries
from safepatch_jax.patching.merge import apply_patching
from safepatch_jax.patching.options import scope_rows
from safepatch_jax.patching.selection import top_count
from safepatch_jax.patching.sensitivity import SensitivityMeter, mode_agreement, witness_row
from safepatch_jax.patching.statistics import refuse_no_op
from safepatch_jax.run.inputs import score_window
from safepatch_jax.run.scratch import Flat, derived, derived_weights, scores
from safepatch_jax.run.state import Run
from safepatch_jax.runtime import processes
from safepatch_jax.runtime.console import say
from safepatch_jax.settings import PatchSettings, ScoreSettings

MODES = ("per_sample", "batched")


class PatchResult(NamedTuple):
    """What the patch operation gives.

    Attributes:
      weights: the patched ones.
      others: the backbone's other parameters.
      statistics: by HF tensor name.
      mode_overlap: Jaccard index of the top sets of the two score modes, by patch.
    """

    weights: Flat
    others: Flat
    statistics: dict[str, dict[str, Any]]
    mode_overlap: dict[str, float]


def training_examples(run: Run, role: str, window: str) -> list[Example]:
    """Return the harmful training pairs of a patch, of whose answers a window carries loss (see
    `data.windows` and `data.prompt_forms`)."""
    examples = run.context.encoded(run.imported, "harmful", "train").examples
    form = getattr(run.settings.derive, f"{role}_prompts")
    return in_window(in_form(examples, form), window)


def calibration(run: Run, score: ScoreSettings, role: str) -> list[Example]:
    """Return the harmful training pairs over which sensitivities of a patch are summed."""
    examples = training_examples(run, role, score_window(run.settings, role))
    order = np.random.default_rng(run.settings.run.seed).permutation(len(examples))
    return [examples[i] for i in order[: score.samples]]


def sensitivity(run: Run, role: str, score: ScoreSettings) -> Flat:
    """Return the summed gradient magnitudes of a derived model that is in place, float32, flat over
    the scope."""
    meter = run.context.meter(read_hf_config(run.backbone))
    samples = calibration(run, score, role)
    return measure_sensitivity(run, meter, role, samples, score, score.mode)


def measure_sensitivity(
    run: Run,
    meter: SensitivityMeter,
    role: str,
    samples: Sequence[Example],
    score: ScoreSettings,
    mode: str,
) -> Flat:
    """Return what `sensitivity` does, for some samples, by one of MODES, over the meter's scope."""
    examples = training_examples(run, role, score_window(run.settings, role))
    # One CPU takes as long as tokens are many.
    compact = run.context.sharder.one_cpu
    padded = shapes(examples, run.settings.data.length_buckets, compact)
    size = score.batch_size if mode == "batched" else 1
    return meter.measure(derived(run, role), samples, padded, f"score {role.upper()} {mode}", size)


def patched(
    run: Run,
    patch: PatchSettings,
    seed: int | None = None,
    sensitivities: Mapping[str, Flat] | None = None,
) -> Flat:
    """Return the flat parameters of a patched model in their storage dtype; nothing is written.

    Args:
      patch: settings; derived models and scores must be in place.
      seed: of random retention and stochastic rounding, if not the run's.
      sensitivities: {'se', 'osm'}: take the place of the stored ones, see `sensitivity`.

    Raises:
      ValueError: the patch changes nothing.
    """
    result = apply_patch(run, patch, "patch", seed, sensitivities)
    refuse_no_op(result.statistics, patch)
    return in_storage_dtype(run, result.others) | result.weights


def weights_hash(flat: Flat) -> str:
    """Return the SHA-256 of a model's weights, '' where a process holds only its part of them."""
    if processes.several():
        return ""
    digest = hashlib.sha256()
    for path in sorted(flat):
        x = processes.fetch(flat[path])
        digest.update(f"{path} {x.dtype} {x.shape}".encode())
        digest.update(np.ascontiguousarray(x).view(np.uint8))
    return digest.hexdigest()


def measure(run: Run, flat: Flat, title: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Measure a model on the evaluation records of all data roles.

    Args:
      flat: its parameters, any float dtype.
      title: of the progress bars.

    Returns:
      (measures, judged answers), see `evaluation.measures`.
    """
    settings, folder = run.settings.evaluate, run.imported
    # All roles first: records that cannot be used are refused before anything is generated.
    encoded = {role: run.context.encoded(folder, role, settings.split) for role in DATA_ROLES}
    engine = run.context.engine(folder, nest(flat))
    return measure_roles(engine, encoded, settings.max_new_tokens, title)


def apply_patch(
    run: Run,
    patch: PatchSettings,
    title: str,
    seed: int | None = None,
    sensitivities: Mapping[str, Mapping[str, jax.Array]] | None = None,
) -> PatchResult:
    """Run the patch operation on a freshly loaded backbone, whose buffers it takes over."""
    rows, abstract, backbone, models = _parts(run, patch)
    if sensitivities is None:
        sensitivities = {role: scores(run, role, abstract) for role in PATCH_ROLES}
    overlap = {}
    if patch is run.settings.patch:  # for the report; other patches are tried many times
        overlap = _mode_overlap(run, backbone, models, abstract, witness_row(rows))
    weights, statistics = apply_patching(
        backbone,
        models,
        sensitivities,
        rows,
        patch,
        run.settings.run.seed if seed is None else seed,
        run.context.sharder,
        title,
        run.settings.export.dtype,
        run.settings.export.rounding,
        compare=patch is run.settings.patch,  # they stand as they do, however they are merged
    )
    others = {path: x for path, x in backbone.items() if path not in weights}
    return PatchResult(weights, others, statistics, overlap)


def _parts(
    run: Run, patch: PatchSettings
) -> tuple[Sequence[Param], dict[str, Any], Flat, dict[str, Mapping[str, jax.Array]]]:
    """Return what a patch is made from: (rows of its scope, their shapes, nested; a freshly loaded
    backbone, flat; the derived models)."""
    config, params = run.context.load(run.backbone)
    rows = scope_rows(param_table(config), patch)
    table = unnest(param_table(config).abstract(run.context.sharder))
    abstract = nest({row.path: table[row.path] for row in rows})
    # Read weight by weight: the backbone is all that is held whole.
    backbone = unnest(params)
    models = {role: derived_weights(run, role, abstract, backbone) for role in PATCH_ROLES}
    return rows, abstract, backbone, models


def keep(run: Run, patch: PatchSettings, seed: int) -> KeptEntries | None:
    """Select what a patch keeps, for `weigh`; None where that cannot be done apart from its
    weights, on a mesh of several devices, or where `patched` raises an error over the models."""
    if selection(patch, seed) is None or run.context.sharder.mesh.size > 1:
        return None
    rows, abstract, backbone, models = _parts(run, patch)
    sensitivities = {role: scores(run, role, abstract) for role in PATCH_ROLES}
    return keep_entries(backbone, models, sensitivities, rows, patch, seed, "selection")


def weigh(run: Run, patch: PatchSettings, kept: KeptEntries) -> Flat | None:
    """Return what `patched` does, from entries that were selected before; None where `patched`
    raises an error."""
    rows, _, backbone, models = _parts(run, patch)
    export = run.settings.export
    merged = weigh_entries(
        kept, backbone, models, rows, patch, "patch", export.dtype, export.rounding
    )
    if merged is None:
        return None
    others = {path: x for path, x in backbone.items() if path not in merged}
    return in_storage_dtype(run, others) | merged


def in_storage_dtype(run: Run, flat: Flat) -> Flat:
    """Cast the backbone's parameters to the storage dtype of the result."""
    dtype = run.settings.export.dtype
    if dtype == "keep":
        return flat
    return {path: x.astype(jnp.dtype(dtype)) for path, x in flat.items()}


def _mode_overlap(
    run: Run,
    backbone: Flat,
    models: Mapping[str, Mapping[str, jax.Array]],
    abstract: Any,
    row: Param,
) -> dict[str, float]:
    """Return the Jaccard index of the top sets by batched and per-sample scores, taken in each
    matrix of one weight; nothing where scores are per sample."""
    patch = run.settings.patch
    if run.settings.score.mode != "batched" or not patch.needs_sensitivity:
        return {}
    one = nest({row.path: unnest(abstract)[row.path]})
    theta = row.as_matrices(backbone[row.path])
    overlaps = {}
    for role, rate in (("se", patch.top_rate_se), ("osm", patch.top_rate_osm)):
        folder = run.runner.folder(f"score_{role}") / "compared"
        trees = load_tree(folder, dict.fromkeys(MODES, one))
        by_mode = tuple(row.as_matrices(unnest(trees[mode])[row.path]) for mode in MODES)
        count = top_count(rate, math.prod(row.hf_shape))
        model = row.as_matrices(models[role][row.path])
        counts = mode_agreement(theta, model, by_mode, count, kind=patch.importance)
        both, either = (int(processes.fetch(n).sum(dtype=np.int64)) for n in counts)
        overlaps[f"mode_overlap_{role}"] = both / max(1, either)
    shares = ", ".join(
        f"{role.upper()} {overlaps[f'mode_overlap_{role}']:.1%}" for role in PATCH_ROLES
    )
    say(f"  top sets by batched and per-sample scores, Jaccard index on {row.path}: {shares}")
    return overlaps
