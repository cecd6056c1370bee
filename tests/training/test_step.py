"""The train step: both signs from one program, the ceiling, failures, and the same update on 8
devices."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import subjaxprs

from safepatch_jax.data.chat import Chat, lengths, training_batch
from safepatch_jax.data.pipeline import training_batches
from safepatch_jax.io.hf import load_params
from safepatch_jax.models.decoder import Decoder
from safepatch_jax.models.table import param_table, unnest
from safepatch_jax.planning.programs import abstract_batch
from safepatch_jax.training.journal import Recipe
from safepatch_jax.training.losses import Likelihood
from safepatch_jax.training.objective import answer_logprobs, sequence_nll
from safepatch_jax.training.step import Trainer
from tests.conftest import sharder_of

PAIRS = [(f"question {i}", "yes, number " * (1 + i % 2)) for i in range(8)]


def make(tiny, devices=1, loss="mean", remat="none", tensor=1, **options):
    sharder = sharder_of(devices, tensor)
    config, params = load_params(tiny, sharder)
    examples = Chat(tiny, config.vocab_size).encode_all(PAIRS, 64, 32).examples
    decoder = Decoder(config, jnp.float32, sharder, remat=remat)
    trainer = Trainer(decoder, param_table(config), sharder, loss=Likelihood(loss), **options)
    return trainer, decoder, params, examples


def batches(examples):
    return training_batches([(examples, 8)], seed=0)


def test_descent_lowers_and_ascent_raises_with_one_program(tiny):
    trainer, _, params, examples = make(tiny)
    before = {p: np.asarray(x) for p, x in unnest(params).items()}
    down, lowered = trainer.run(params, batches(examples), Recipe(1.0, 6, 1e-3), "down")
    up, raised = trainer.run(params, batches(examples), Recipe(-1.0, 6, 1e-3), "up")
    assert lowered.nll[0] == raised.nll[0]
    assert lowered.nll[-1] < lowered.nll[0] - 0.05 and raised.nll[-1] > raised.nll[0] + 0.05
    assert len(trainer._in_scratch._programs) == 1
    for path, x in unnest(params).items():  # the backbone is copied, not trained in place
        np.testing.assert_array_equal(np.asarray(x), before[path])
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(down))


def test_first_step_moves_each_weight_by_the_learning_rate(tiny):
    trainer, decoder, params, examples = make(tiny)
    tuned, _ = trainer.run(params, batches(examples), Recipe(1.0, 1, 1e-3), "one step")
    batch = next(batches(examples))

    def nll(p):
        return jnp.mean(sequence_nll(answer_logprobs(decoder, p, batch), batch["weights"], "mean"))

    gradient = unnest(jax.grad(nll)(params))["layers/mlp/up"]
    delta = unnest(tuned)["layers/mlp/up"] - unnest(params)["layers/mlp/up"]
    clear = jnp.abs(gradient) > 1e-5  # Adam's first step is lr * g / (|g| + eps)
    np.testing.assert_allclose(
        np.asarray(delta)[clear], -1e-3 * np.sign(np.asarray(gradient)[clear]), rtol=2e-2
    )


def test_mean_and_sum_of_answer_tokens():
    logprobs = jnp.array([[-1.0, -3.0, 0.0], [-2.0, 0.0, 0.0]])
    weights = jnp.array([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    np.testing.assert_allclose(sequence_nll(logprobs, weights, "mean"), [2.0, 2.0])
    np.testing.assert_allclose(sequence_nll(logprobs, weights, "sum"), [4.0, 2.0])


def test_ascent_stops_above_the_ceiling_and_says_so(tiny):
    trainer, _, params, examples = make(tiny)
    _, free = trainer.run(params, batches(examples), Recipe(-1.0, 8, 2e-3), "free")
    ceiling = (free.nll[2] + free.nll[3]) / 2
    stopped, outcome = trainer.run(
        params, batches(examples), Recipe(-1.0, 8, 2e-3, nll_ceiling=ceiling), "stopped"
    )
    three, _ = trainer.run(params, batches(examples), Recipe(-1.0, 3, 2e-3), "three steps")
    assert outcome.stopped_by.startswith("answer NLL above") and outcome.nll == free.nll[:4]
    # Nothing was updated at or after the stop.
    for a, b in zip(jax.tree.leaves(stopped), jax.tree.leaves(three)):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_nan_loss_is_an_error_that_names_step_and_remedy(tiny):
    trainer, _, params, examples = make(tiny)
    params["layers"]["mlp"]["up"] = params["layers"]["mlp"]["up"].at[0, 0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match="NLL nan.*at step 1.*Lower the learning rate"):
        trainer.run(params, batches(examples), Recipe(1.0, 2, 1e-3), "broken")


@pytest.mark.parametrize("devices, tensor", [(2, 1), (4, 2), (8, 1), (8, 2)])
def test_any_mesh_trains_alike(tiny, devices, tensor):
    results = []
    for place in ({}, {"devices": devices, "tensor": tensor}):
        trainer, _, params, examples = make(tiny, **place)
        tuned, outcome = trainer.run(params, batches(examples), Recipe(1.0, 3, 1e-3), "mesh")
        results.append((unnest(tuned), outcome.nll))
    np.testing.assert_allclose(results[0][1], results[1][1], rtol=1e-5)
    moved = np.asarray(results[0][0]["layers/mlp/up"]), np.asarray(results[1][0]["layers/mlp/up"])
    assert np.mean(np.abs(moved[0] - moved[1]) > 1e-5) < 0.01
    sharding = results[1][0]["layers/mlp/up"].sharding
    assert len(sharding.device_set) == devices and not sharding.is_fully_replicated


@pytest.mark.parametrize(
    "devices, options",
    [
        (1, {"accumulate": 4}),
        (4, {"accumulate": 2}),
        (1, {"chunk": 8}),
        (1, {"chunk": 12}),
        (1, {"remat": "dots"}),
        (1, {"remat": "full", "chunk": 8, "accumulate": 2}),
    ],
)
def test_what_saves_memory_changes_nothing_else(tiny, devices, options):
    results = []
    for changes in ({}, options):
        trainer, _, params, examples = make(tiny, devices, **changes)
        tuned, outcome = trainer.run(params, batches(examples), Recipe(1.0, 2, 1e-3), "memory")
        results.append((unnest(tuned), outcome.nll))
    np.testing.assert_allclose(results[0][1], results[1][1], rtol=1e-5)
    for path, x in results[0][0].items():
        far = np.abs(np.asarray(x) - np.asarray(results[1][0][path])) > 1e-5
        # Where a gradient is nearly zero, Adam turns its last bit into a step.
        assert np.mean(far) < 0.01, path


def largest_with(jaxpr, size):
    """Most elements of an array in a program, sub-programs included, that has a dimension of this
    size."""
    sizes = [0]
    for eqn in jaxpr.eqns:
        shapes = [getattr(v.aval, "shape", ()) for v in eqn.outvars]
        sizes += [math.prod(shape) for shape in shapes if size in shape]
    sizes += [largest_with(inner, size) for inner in subjaxprs(jaxpr)]
    return max(sizes)


def test_logits_exist_for_one_chunk_of_answer_positions_alone(tiny):
    config, _ = load_params(tiny, sharder_of(1))
    parameters = config.vocab_size * config.embed_dim
    batch = abstract_batch(64, (48, 32), sharder_of(1))
    for chunk, positions in ((32, 32), (8, 8)):
        trainer = make(tiny, chunk=chunk)[0]
        largest = largest_with(trainer.trace(batch).jaxpr.jaxpr, config.vocab_size)
        assert largest == max(parameters, 64 * positions * config.vocab_size)


def test_adafactor_learns_with_next_to_no_moments(tiny):
    trainer, _, params, examples = make(tiny, optimizer="adafactor", devices=8)
    _, lowered = trainer.run(params, batches(examples), Recipe(1.0, 6, 1e-3), "down")
    assert lowered.nll[-1] < lowered.nll[0] - 0.05


def test_a_batch_that_accumulation_does_not_divide_is_an_error(tiny):
    trainer, _, params, examples = make(tiny, devices=4, accumulate=4)
    with pytest.raises(ValueError, match="A batch of 8 .*derive.accumulate.*multiple of 16"):
        trainer.run(params, batches(examples), Recipe(1.0, 1, 1e-3), "uneven")


class Given:
    """Training batches one after another."""

    def __init__(self, *batches):
        self._left = list(batches)

    def __next__(self):
        return self._left.pop(0)

    def get_state(self):
        return {}


def test_the_decay_is_a_share_of_each_weight(tiny):
    trainer, _, params, examples = make(tiny)
    tuned = {}
    for decay in (0.0, 0.5):
        recipe = Recipe(1.0, 1, 1e-3, weight_decay=decay)
        tuned[decay] = unnest(trainer.run(params, batches(examples), recipe, "one step")[0])
    for path, x in unnest(params).items():
        taken = np.asarray(tuned[0.0][path]) - np.asarray(tuned[0.5][path])
        np.testing.assert_allclose(taken, 1e-3 * 0.5 * np.asarray(x), atol=2e-7)


def test_what_has_stopped_takes_no_step_on_a_batch_below_the_ceiling(tiny):
    """The host reads a step late, so the step after the one that stopped is run too."""
    trainer, _, params, examples = make(tiny)
    shape = lengths(examples)
    first, second = (training_batch([e] * 8, *shape) for e in examples[:2])
    nll = []
    for batch in (first, second):
        outcome = trainer.run(params, Given(batch), Recipe(1.0, 1, 0.0), "measure")[1]
        nll.append(outcome.nll[0])
    if nll[0] < nll[1]:
        first, second = second, first
    assert abs(nll[0] - nll[1]) > 1e-3
    recipe = Recipe(-1.0, 3, 1e-3, nll_ceiling=sum(nll) / 2)
    tuned, outcome = trainer.run(params, Given(first, second, second), recipe, "stop")
    assert outcome.nll == (max(nll),) and "above" in outcome.stopped_by
    for path, x in unnest(params).items():
        np.testing.assert_array_equal(np.asarray(unnest(tuned)[path]), np.asarray(x))
