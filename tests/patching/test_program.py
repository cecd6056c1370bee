"""What the compiled patch program does on 8 devices: which collectives, how much memory."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safepatch_jax.patching import PATCH_ROLES
from safepatch_jax.patching.options import Knobs, program_options
from safepatch_jax.patching.programs import KEYED, compare_patches, count_at_least, patch_matrices
from safepatch_jax.patching.settings import PatchSettings
from tests.conftest import sharder_of
from tests.patching.cases import label

OUT, IN, DEVICES = 512, 1024, 8
MATRIX = OUT * IN * 4 // DEVICES  # bytes of one HF matrix in float32 on each device
MOVES = re.compile(
    r"= (\(?[a-z0-9]+\[[^=]*?) "
    r"(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|sort|gather)"
    r"(?:-start)?\("
)


def arguments(layers, dtype=jnp.float32):
    sharding = sharder_of(DEVICES, tensor=2).sharding(("layers", "mlp", "embed"))
    theta, float32 = (
        jax.ShapeDtypeStruct((layers, OUT, IN), x, sharding=sharding) for x in (dtype, jnp.float32)
    )
    models = dict.fromkeys(PATCH_ROLES, float32)
    keys = dict.fromkeys(KEYED, jax.ShapeDtypeStruct((layers, 2), jnp.uint32))
    counts = dict.fromkeys(PATCH_ROLES, jax.ShapeDtypeStruct((layers,), jnp.int32))
    return (theta, models, models, keys, counts), sharding


def compiled(options, layers=4, dtype=jnp.float32):
    patch = PatchSettings(**options)
    arrays, sharding = arguments(layers, dtype)
    lowered = patch_matrices.lower(
        *arrays,
        Knobs.of(patch, OUT * IN).traced(),
        options=program_options(patch),
        shape=(layers, OUT, IN),
        dtype=str(jnp.dtype(dtype)),
        sharding=sharding,
    )
    return lowered.compile()


def moved(program):
    """{operation: largest number of entries that one such operation moves}."""
    largest = {}
    for shapes, name in MOVES.findall(program.as_text()):
        entries = 0
        for dims in re.findall(r"\[([\d,]*)\]", shapes):
            entries += math.prod(map(int, filter(None, dims.split(","))))
        largest[name] = max(largest.get(name, 0), entries)
    return largest


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"granularity": "row"},
        {"support": "fill"},
        {"importance": "random"},
        {"merge": "ties"},
        {"merge": "dare_ties"},
    ],
    ids=label,
)
def test_only_counts_cross_devices(options):
    # A few counts for each row, or a few numbers.
    most = 4 * OUT if options.get("granularity") == "row" else 32
    largest = moved(compiled(options))
    assert max(largest.values()) <= most, largest
    # Counts taken several at a time, as on CPU alone, are gathered and added up; on TPU there is no
    # gather (tests/planning).
    assert set(largest) <= {"all-reduce", "all-gather"}, largest


@pytest.mark.parametrize("kind", ["delta", "random"])
def test_global_counts_are_all_that_crosses(kind):
    (theta, derived, sensitivity, keys, _), _ = arguments(4, jnp.bfloat16)
    program = count_at_least.lower(
        theta,
        derived["se"],
        sensitivity["se"],
        keys["top_se"],
        np.int32(1),
        kind=kind,
        shape=theta.shape,
    ).compile()
    assert moved(program) == {"all-reduce": 1}
    assert program.memory_analysis().temp_size_in_bytes < 3 * MATRIX


@pytest.mark.parametrize("layers", [4, 32])
def test_comparing_the_patches_moves_sums_and_holds_few_matrices(layers):
    (theta, derived, *_), _ = arguments(layers, jnp.bfloat16)
    program = compare_patches.lower(theta, derived, np.int32(0), shape=theta.shape).compile()
    largest = moved(program)
    # At most a number for each row, on CPU from each of the four devices that hold a part of it, of
    # the half of the rows that they hold.
    assert set(largest) <= {"all-reduce", "all-gather"}, largest
    assert max(largest.values()) <= 4 * (OUT // 2), largest
    assert program.memory_analysis().temp_size_in_bytes < 12 * MATRIX


def test_the_pattern_finds_what_must_not_be_there():
    (theta, *_), sharding = arguments(4)
    whole = jax.NamedSharding(sharding.mesh, jax.P())
    assert moved(jax.jit(lambda x: x, out_shardings=whole).lower(theta).compile()) == {
        "all-gather": 4 * OUT * IN
    }
    assert "sort" in moved(jax.jit(lambda x: jnp.sort(x, axis=0)).lower(theta).compile())


@pytest.mark.parametrize(
    "options, most",
    [
        ({}, 2.6),
        ({"granularity": "row"}, 2.6),
        ({"merge": "ties"}, 2.6),
        ({"merge": "dare"}, 1.1),
        ({"support": "fill"}, 7.2),
    ],
    ids=["matrix", "row", "ties", "dare", "fill"],
)
def test_memory_is_that_of_few_matrices_however_many_layers_there_are(options, most):
    """The result takes the backbone's buffer. Beside it a CPU holds the tensor as it was, the keys
    of one role and marks of a byte each."""
    for layers in (4, 32):
        memory = compiled(options, layers).memory_analysis()
        assert memory.alias_size_in_bytes == layers * MATRIX
        # Rows and counts of a matrix this small are a share of it.
        assert memory.temp_size_in_bytes < (most + 0.2) * MATRIX, memory.temp_size_in_bytes / MATRIX
