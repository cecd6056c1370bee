"""SNIP sensitivities: absolute value per sample, and the same ranking at a common model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safepatch_jax.data.chat import Chat, lengths, training_batch
from safepatch_jax.io.hf import load_params
from safepatch_jax.models.decoder import Decoder
from safepatch_jax.models.table import nest, param_table, unnest
from safepatch_jax.patching.methods import combine_sets
from safepatch_jax.patching.selection import top_mask
from safepatch_jax.patching.sensitivity import SensitivityMeter, mode_agreement
from safepatch_jax.planning.programs import abstract_batch
from safepatch_jax.testing import write_tiny_model
from tests.conftest import sharder_of
from tests.patching import oracle

PAIRS = [("one", "first answer"), ("two two", "second"), ("three", "third answer of some length")]


def measure(tiny, devices=1, batch_size=1, tensor=1, scope="block_linear", in_flight=1):
    sharder = sharder_of(devices, tensor)
    config, params = load_params(tiny, sharder)
    examples = Chat(tiny, config.vocab_size).encode_all(PAIRS, 64, 32).examples
    rows = param_table(config).scope(scope)
    decoder = Decoder(config, jnp.float32, sharder)
    total = SensitivityMeter(decoder, rows, sharder, in_flight=in_flight).measure(
        unnest(params), examples, [lengths(examples)], "test", batch_size
    )
    result = {path: np.asarray(x) for path, x in total.items()}
    return decoder, unnest(load_params(tiny, sharder)[1]), examples, result


@pytest.mark.parametrize(
    "devices, tensor, scope",
    [(1, 1, "block_linear"), (2, 1, "block_linear"), (1, 1, "all"), (4, 2, "all")],
)  # the embedding is the head too
def test_sum_of_absolute_sample_gradients(tiny, devices, tensor, scope):
    _, _, _, total = measure(tiny, devices, tensor=tensor, scope=scope)
    decoder, params, examples, _ = measure(tiny)
    assert ("embedder/embedding" in total) == (scope == "all")
    shape = lengths(examples)

    def nll(params, example):
        """Straight from the definition: mean over answer tokens of -log p."""
        batch = training_batch([example], *shape)
        positions = jnp.arange(shape[0])[None]
        logits, _ = decoder.apply(
            {"params": nest(params)}, batch["tokens"], positions, batch["valid"]
        )
        logprobs = jax.nn.log_softmax(logits[0])
        start = len(example.prompt_ids) - 1
        return -jnp.mean(
            jnp.stack([logprobs[start + i, t] for i, t in enumerate(example.answer_ids)])
        )

    gradients = [jax.grad(nll)(params, e) for e in examples]
    for path, value in total.items():
        faithful = sum(np.abs(np.asarray(g[path])) for g in gradients)
        np.testing.assert_allclose(value, faithful, rtol=2e-4, atol=1e-7)
    if devices > 1 or scope == "all":
        return
    batched = np.abs(sum(np.asarray(g["layers/mlp/up"]) for g in gradients))
    assert not np.allclose(total["layers/mlp/up"], batched, rtol=0.1)
    by_two = measure(tiny, batch_size=2)[
        -1
    ]  # the second batch has one sample and one row without answer tokens
    for path, value in by_two.items():
        g = [np.asarray(g[path]) for g in gradients]
        np.testing.assert_allclose(value, np.abs(g[0] + g[1]) + np.abs(g[2]), rtol=2e-4, atol=1e-7)


def test_chunks_and_inputs_that_are_made_again_change_no_sum(tmp_path):
    """Of 48 samples what enters the blocks takes more than one and a half times what the weights
    take, so that the inputs of every third block alone are kept; of one sample all are."""
    folder = write_tiny_model(tmp_path / "deep", num_hidden_layers=10, intermediate_size=512)
    config, _ = load_params(folder, sharder_of(1))
    rows = param_table(config).scope("block_linear")
    pairs = [(f"{i} " * (1 + i % 5), f"answer {i} " * (1 + i % 3)) for i in range(48)]
    examples = Chat(folder, config.vocab_size).encode_all(pairs, 64, 32).examples
    shape = lengths(examples)
    decoder = Decoder(config, jnp.float32, sharder_of(1))
    meters = {n: SensitivityMeter(decoder, rows, sharder_of(1), in_flight=n) for n in (1, 3)}

    def inputs(samples):
        batch = abstract_batch(1, shape, sharder_of(1))
        return meters[1].holds(batch, samples)["what enters the blocks"]

    assert inputs(48) == 48 * inputs(1) * 7 // 11  # 4 + 3 blocks' of 10, or 10 + 1 blocks'

    def measured(in_flight, few):
        params = unnest(load_params(folder, sharder_of(1))[1])
        total = meters[in_flight].measure(params, few, [shape], "test")
        assert not params  # taken over
        return {path: np.asarray(x, np.float64) for path, x in total.items()}

    together = measured(3, examples)
    singly = [measured(1, [example]) for example in examples]
    for row in rows:
        total = sum(part[row.path] for part in singly)
        np.testing.assert_allclose(together[row.path], total, rtol=1e-4, atol=1e-8)


def test_agreement_of_the_score_modes():
    rng = np.random.default_rng(0)
    backbone, derived, one, two = (rng.random((3, 6, 7)).astype(np.float32) for _ in range(4))
    both, either = mode_agreement(backbone, derived, (one, two), 8, kind="delta")
    tops = []
    for sensitivity in (one, two):
        importance = np.abs(derived - backbone) * sensitivity
        tops.append(np.stack([oracle.largest(matrix, 8) for matrix in importance]))
    assert both.tolist() == (tops[0] & tops[1]).sum((1, 2)).tolist()
    assert either.tolist() == (tops[0] | tops[1]).sum((1, 2)).tolist()


def test_common_model_gives_an_empty_difference(tiny):
    *_, first = measure(tiny)
    _, params, _, second = measure(tiny)
    for path in first:
        tops = []
        for sensitivity in (first[path], second[path]):
            importance = np.abs(np.asarray(params[path])) * sensitivity
            tops.append(np.asarray(top_mask(jnp.asarray(importance), importance.size // 10)))
        se, osm = tops
        assert se.sum() == se.size // 10
        assert not any(d.any() for d in combine_sets(se, osm, "difference"))


@pytest.mark.parametrize("devices, tensor", [(4, 2), (8, 1)])
def test_any_mesh_gives_the_same_sensitivities(tiny, devices, tensor):
    one = measure(tiny)[-1]
    many = measure(tiny, devices, tensor=tensor, in_flight=2)[-1]
    for path in one:
        np.testing.assert_allclose(one[path], many[path], rtol=1e-4, atol=1e-7)
