"""Inputs of the patch operation, as NumPy, and the operation on a mesh of simulated devices."""

import jax
import numpy as np

from safepatch_jax.models.config import config_from_hf
from safepatch_jax.models.table import Param, param_table
from safepatch_jax.patching.merge import apply_patching
from safepatch_jax.testing import tiny_config
from tests.conftest import sharder_of

ROWS = param_table(config_from_hf(tiny_config())).scope("block_linear")
FEW = (ROWS[0], ROWS[-1])
ODD = (
    Param("one_row", ("layers", "mlp", "embed"), (2, 1, 13), "{layer}.one_row", 1, "linear"),
    Param("one_column", ("layers", "mlp", "embed"), (2, 13, 1), "{layer}.one_column", 1, "linear"),
    Param(
        "heads",
        ("layers", "heads", "head_dim", "embed"),
        (3, 2, 3, 5),
        "{layer}.heads",
        2,
        "linear",
    ),
    Param("vector", ("embed",), (7,), "vector", 1, "norm"),
)
SEED = 5
KINDS = ("plain", "ties", "zeros", "equal", "denormal", "huge")


def inputs(dtype=np.float32, step=1e-3, rows=ROWS):
    """Random backbone, derived models and sensitivities with ties and zeros."""
    rng = np.random.default_rng(0)
    theta, derived, sensitivity = {}, {"se": {}, "osm": {}}, {"se": {}, "osm": {}}
    for row in rows:
        theta[row.path] = (0.05 * rng.standard_normal(row.shape)).astype(dtype)
        for role in derived:
            patch = step * rng.standard_normal(row.shape) * (rng.random(row.shape) < 0.9)
            model = theta[row.path].astype(np.float32) + patch
            derived[role][row.path] = model.astype(np.float32)
            sensitivity[role][row.path] = np.round(rng.random(row.shape), 1).astype(np.float32)
    return theta, derived, sensitivity


def place(tree, sharder, rows=ROWS):
    placed = {}
    for row in rows:
        placed[row.path] = jax.device_put(tree[row.path], sharder.sharding(row.axes, row.shape))
    return placed


def run(theta, derived, sensitivity, patch, devices=1, dtype="keep", rounding="nearest", rows=ROWS):
    """Patch on so many devices; return merged weights as NumPy, and statistics."""
    sharder = sharder_of(devices)
    merged, statistics = apply_patching(
        place(theta, sharder, rows),
        {role: place(tree, sharder, rows) for role, tree in derived.items()},
        {role: place(tree, sharder, rows) for role, tree in sensitivity.items()},
        rows,
        patch,
        SEED,
        sharder,
        "test",
        dtype,
        rounding,
    )
    return {path: np.asarray(x) for path, x in merged.items()}, statistics


def draw_tensor(kind, shape, rng):
    """Backbone, derived models and sensitivities of one of the KINDS of values, for the oracle."""

    def random():
        return rng.standard_normal(shape)

    def ties():
        return rng.integers(0, 3, shape) / 2

    def huge():
        return random() * 10.0 ** rng.integers(-44, 37, shape)

    ones, zeros = np.ones(shape), np.zeros(shape)
    with np.errstate(under="ignore"):
        if kind == "plain":
            values = random(), random(), random(), rng.random(shape), rng.random(shape)
        elif kind == "ties":
            values = ties(), ties(), ties(), ties(), ties()
        elif kind == "zeros":
            values = zeros, zeros, random(), random() * 0, rng.random(shape)
        elif kind == "equal":
            values = ones, 1.5 * ones, 0.5 * ones, ones, ones
        elif kind == "denormal":
            models = [1e-38 * random(), 1e-38 * random(), 1e-30 * random()]
            values = *models, 1e-8 * rng.random(shape), 1e-9 * rng.random(shape)
        else:
            values = random(), huge(), huge(), ties(), ties()
        names = ("theta", "se", "osm", "sensitivity_se", "sensitivity_osm")
        arrays = {name: np.asarray(x, np.float32) for name, x in zip(names, values)}
    return arrays | {"kind": kind}


def draw(rng, kinds, rows=ODD):
    """One tensor of a given kind for each HF tensor of the rows, in their order."""
    tensors, kinds = [], iter(kinds)
    for row in rows:
        for name in row.hf_names:
            tensors.append(draw_tensor(next(kinds), row.hf_shape, rng) | {"name": name})
    return tensors


def as_trees(tensors, rows):
    """Turn a list of HF tensors into the trees that the patch operation takes."""
    remaining = iter(tensors)
    trees = {name: {} for name in ("theta", "se", "osm", "sensitivity_se", "sensitivity_osm")}
    for row in rows:
        layers = [next(remaining) for _ in row.hf_names]
        for name, tree in trees.items():
            tree[row.path] = np.stack([tensor[name] for tensor in layers]).reshape(row.shape)
    derived = {role: trees[role] for role in ("se", "osm")}
    return trees["theta"], derived, {role: trees[f"sensitivity_{role}"] for role in derived}


def as_list(theta, derived, sensitivity, rows):
    """Inverse of `as_trees`."""
    trees = {"theta": theta} | derived
    trees |= {f"sensitivity_{role}": tree for role, tree in sensitivity.items()}
    tensors = []
    for row in rows:
        for layer, hf_name in enumerate(row.hf_names):
            tensor = {"name": hf_name}
            for name, tree in trees.items():
                tensor[name] = row.as_matrices(tree[row.path])[layer]
            tensors.append(tensor)
    return tensors


def matrices(merged, rows):
    """List what `run` returns as HF tensors."""
    result = []
    for row in rows:
        result += list(row.as_matrices(merged[row.path]))
    return result


def label(options):
    """Name a dictionary of options in a test's id."""
    return "-".join(map(str, options.values())) or "default"
