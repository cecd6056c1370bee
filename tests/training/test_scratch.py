"""Steps that compute in the memory of the step before: the same results, whatever lies there, and
no large array beside it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safepatch_jax.data.chat import Chat, training_batch
from safepatch_jax.io.hf import load_params
from safepatch_jax.models.decoder import Decoder
from safepatch_jax.models.table import param_table
from safepatch_jax.training.batch import put_batch
from safepatch_jax.training.step import Trainer
from tests.conftest import sharder_of

PAIRS = [(f"Question {i} of the day?", "An answer." * (1 + i)) for i in range(8)]
SCALARS = [jnp.float32(x) for x in (-1.0, 1e-3, 0.01, np.inf)]


class Near:
    """A loss that compares with a reference."""

    compares = True

    def __call__(self, logprobs_BA, batch, kl_BA):
        return jnp.sum(kl_BA - logprobs_BA, axis=-1)


def make(tiny, remat="dots", scope=None, dtype=jnp.float32, **options):
    """Return a trainer, what it trains, what it does not, and batches of two lengths."""
    sharder = sharder_of(1)
    config, params = load_params(tiny, sharder)
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    table = param_table(config)
    rows = table.scope(scope) if scope else None
    decoder = Decoder(config, jnp.float32, sharder, remat=remat)
    trainer = Trainer(decoder, table, sharder, rows=rows, **options)
    examples = Chat(tiny, config.vocab_size).encode_all(PAIRS, 96, 48).examples
    batches = [put_batch(training_batch(examples, length, 48), sharder) for length in (128, 96)]
    return trainer, *trainer._parted(params), batches


@pytest.fixture
def at_work(tiny):
    trainer, params, _, batches = make(tiny)
    return trainer, params, batches


def taken(step, state, batches, frozen, reference=None):
    """Return the state and the metrics after a step with each batch, three times over."""
    metrics = []
    for batch in batches * 3:
        state, measured = step(state, frozen, batch, *SCALARS, reference)
        metrics.append(measured)
    return state, metrics


def assert_close(ours, theirs):
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"remat": "none", "clip_norm": 0.0},
        {"remat": "full", "optimizer": "adafactor"},
        {"scope": "block_linear", "dtype": jnp.bfloat16},
        {"loss": Near(), "remat": "none"},
    ],
)
def test_steps_are_those_of_the_plain_program_with_batches_of_several_lengths(tiny, options):
    trainer, params, frozen, batches = make(tiny, **options)
    reference = jax.tree.map(jnp.copy, params) if "loss" in options else None
    given = [np.asarray(x) for x in jax.tree.leaves((frozen, reference))]
    ours = taken(trainer.stepper(), trainer._init(params), batches, frozen, reference)
    assert_close(ours, taken(trainer._step, trainer._init(params), batches, frozen, reference))
    assert len(trainer._in_scratch._programs) == 2
    for x, y in zip(jax.tree.leaves((frozen, reference)), given, strict=True):
        np.testing.assert_array_equal(np.asarray(x), y)  # not donated


def test_what_lies_in_the_scratch_is_never_read(at_work):
    trainer, params, (batch, _) = at_work
    inputs = {}, batch, *SCALARS
    program, scratch = trainer._in_scratch.program(trainer._init(params), *inputs)

    def after_a_step(value):
        memory = jax.tree.map(lambda x: jnp.full(x.shape, value, x.dtype), scratch)
        return program(trainer._init(params), memory, inputs)

    for x, y in zip(*map(jax.tree.leaves, (after_a_step(0.0), after_a_step(np.nan))), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_gradients_and_what_the_backward_pass_keeps_lie_in_the_scratch(at_work):
    trainer, params, (batch, _) = at_work
    state, inputs = trainer._init(params), ({}, batch, *SCALARS)
    program, scratch = trainer._in_scratch.program(state, *inputs)
    plain = trainer._step.lower(state, *inputs).compile().memory_analysis()
    ours = program.lower(state, scratch, inputs).compile().memory_analysis()
    moved = sum(x.size * 4 for x in jax.tree.leaves(scratch))
    weights = {x.shape for x in jax.tree.leaves(params)}
    assert scratch[1] and not any(x.shape in weights for x in scratch[1])
    assert ours.temp_size_in_bytes < plain.temp_size_in_bytes - 0.8 * moved
    assert ours.alias_size_in_bytes > plain.alias_size_in_bytes + 0.99 * moved
