"""The train step: both signs from one program, the ceiling, failures, and the same update on 8 devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safepatch_jax.data.chat import Chat, lengths, training_batch
from safepatch_jax.io.hf import load_params
from safepatch_jax.models.decoder import Decoder
from safepatch_jax.models.table import param_table, unnest
from safepatch_jax.training.objective import answer_logprobs, sequence_nll
from safepatch_jax.training.step import Recipe, Trainer, endless_batches
from tests.conftest import sharder_of

PAIRS = [(f"question {i}", "yes, number " * (1 + i % 2)) for i in range(8)]


def make(tiny, devices=1, loss="mean"):
    sharder = sharder_of(devices)
    config, params = load_params(tiny, sharder)
    examples = Chat(tiny, config.vocab_size).encode_all(PAIRS, 64, 32).examples
    decoder = Decoder(config, jnp.float32, sharder)
    trainer = Trainer(decoder, param_table(config), sharder, loss=loss)
    return trainer, decoder, params, examples


def batches(examples):
    return endless_batches([(examples, 8)], lengths(examples), seed=0)


def test_descent_lowers_and_ascent_raises_with_one_program(tiny):
    trainer, _, params, examples = make(tiny)
    before = {p: np.asarray(x) for p, x in unnest(params).items()}
    down, lowered = trainer.run(params, batches(examples), Recipe(1.0, 6, 1e-3), "down")
    up, raised = trainer.run(params, batches(examples), Recipe(-1.0, 6, 1e-3), "up")
    assert lowered.nll[0] == raised.nll[0]
    assert lowered.nll[-1] < lowered.nll[0] - 0.05 and raised.nll[-1] > raised.nll[0] + 0.05
    assert trainer._step._cache_size() == 1
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
    np.testing.assert_allclose(np.asarray(delta)[clear], -1e-3 * np.sign(np.asarray(gradient)[clear]), rtol=2e-2)


def test_mean_and_sum_of_answer_tokens():
    logprobs = jnp.array([[-1.0, -3.0, 0.0], [-2.0, 0.0, 0.0]])
    weights = jnp.array([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    np.testing.assert_allclose(sequence_nll(logprobs, weights, "mean"), [2.0, 2.0])
    np.testing.assert_allclose(sequence_nll(logprobs, weights, "sum"), [4.0, 2.0])


def test_ascent_stops_above_the_ceiling_and_says_so(tiny):
    trainer, _, params, examples = make(tiny)
    _, free = trainer.run(params, batches(examples), Recipe(-1.0, 8, 2e-3), "free")
    ceiling = (free.nll[2] + free.nll[3]) / 2
    stopped, outcome = trainer.run(params, batches(examples), Recipe(-1.0, 8, 2e-3, nll_ceiling=ceiling), "stopped")
    three, _ = trainer.run(params, batches(examples), Recipe(-1.0, 3, 2e-3), "three steps")
    assert outcome.stopped_by.startswith("answer NLL above") and outcome.nll == free.nll[:4]
    for a, b in zip(jax.tree.leaves(stopped), jax.tree.leaves(three)):  # nothing was updated at or after the stop
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_nan_loss_is_an_error_that_names_step_and_remedy(tiny):
    trainer, _, params, examples = make(tiny)
    params["layers"]["mlp"]["up"] = params["layers"]["mlp"]["up"].at[0, 0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match="NLL nan.*at step 1.*Lower the learning rate"):
        trainer.run(params, batches(examples), Recipe(1.0, 2, 1e-3), "broken")


def test_eight_devices_train_alike(tiny):
    results = []
    for devices in (1, 8):
        trainer, _, params, examples = make(tiny, devices)
        tuned, outcome = trainer.run(params, batches(examples), Recipe(1.0, 3, 1e-3), "mesh")
        results.append((unnest(tuned), outcome.nll))
    np.testing.assert_allclose(results[0][1], results[1][1], rtol=1e-5)
    moved = np.asarray(results[0][0]["layers/mlp/up"]), np.asarray(results[1][0]["layers/mlp/up"])
    assert np.mean(np.abs(moved[0] - moved[1]) > 1e-5) < 0.01
    sharding = results[1][0]["layers/mlp/up"].sharding
    assert len(sharding.device_set) == 8 and not sharding.is_fully_replicated


def test_batches_are_seeded_and_visit_every_example(tiny):
    examples = make(tiny)[-1]
    shape = lengths(examples)
    first, again = (next(endless_batches([(examples, 8)], shape, seed=4)) for _ in range(2))
    np.testing.assert_array_equal(first["tokens"], again["tokens"])
    rows = {row.tobytes() for row in first["tokens"]}
    assert rows == {row.tobytes() for row in training_batch(examples, *shape)["tokens"]}
