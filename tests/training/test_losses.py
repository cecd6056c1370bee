"""Losses against their published formulas, and NPO's way through the train step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safepatch_jax.data.pipeline import training_batches
from safepatch_jax.models.table import param_table
from safepatch_jax.training.losses import NPO, Likelihood, SimNPO
from safepatch_jax.training.reference import with_reference
from safepatch_jax.training.step import Recipe, Trainer
from tests.training.test_step import make

RANDOM = np.random.default_rng(0)
LENGTHS = np.array([5, 1, 3, 8])
WEIGHTS = (np.arange(8)[None] < LENGTHS[:, None]).astype(np.float32)
LOGPROBS = (-RANDOM.exponential(2.0, (4, 8)) * WEIGHTS).astype(np.float32)
REFERENCE = -RANDOM.exponential(8.0, 4)
BATCH = {"weights": jnp.asarray(WEIGHTS), "reference": jnp.asarray(REFERENCE[:, None], jnp.float32)}


def log_sigmoid(x):
    return -np.log1p(np.exp(-x.astype(np.float64)))


@pytest.mark.parametrize("loss, formula", [
    (Likelihood("mean"), lambda total: -total / LENGTHS),
    (Likelihood("sum"), lambda total: -total),
    (NPO(), lambda total: -2 / 0.1 * log_sigmoid(-0.1 * (total - REFERENCE))),
    (NPO(0.5), lambda total: -2 / 0.5 * log_sigmoid(-0.5 * (total - REFERENCE))),
    (SimNPO(), lambda total: -2 / 2.5 * log_sigmoid(-2.5 * total / LENGTHS)),
    (SimNPO(1.0, 0.3), lambda total: -2 * log_sigmoid(-total / LENGTHS - 0.3)),
])
def test_formulas(loss, formula):
    found = loss(jnp.asarray(LOGPROBS), BATCH)
    np.testing.assert_allclose(found, formula(LOGPROBS.astype(np.float64).sum(axis=1)), rtol=1e-5)


def test_npo_tends_to_ascent_as_beta_falls():
    """Zhang et al., proposition 1: up to a constant, its gradient is that of the NLL with the sign turned."""
    gradient = jax.grad(lambda x: jnp.sum(NPO(1e-4)(x, BATCH)))(jnp.asarray(LOGPROBS))
    np.testing.assert_allclose(gradient, jnp.ones_like(gradient), rtol=2e-3)


@pytest.mark.parametrize("devices", [1, 8])
def test_the_reference_is_what_the_start_gives_and_npo_lowers_the_likelihood(tiny, devices):
    _, decoder, params, examples = make(tiny, devices)
    examples = with_reference(decoder, params, examples, 8, decoder.sharder)
    batch = next(training_batches([(examples, 8)], 0))
    assert batch["reference"].shape == (8, 1) and (batch["reference"] < 0).all()
    trainer = Trainer(decoder, param_table(decoder.config), decoder.sharder, loss=NPO())
    _, outcome = trainer.run(params, training_batches([(examples, 8)], 0), Recipe(1.0, 5, 1e-3), "npo")
    assert outcome.nll[-1] > outcome.nll[0] + 0.02
    first = {tuple(e.prompt_ids): e.reference for e in examples}
    again = with_reference(decoder, params, examples[:3], 2, decoder.sharder)
    assert [e.reference for e in again] == pytest.approx([first[tuple(e.prompt_ids)] for e in again], rel=1e-5)
