"""A prefix that all sequences share is computed once: the same predictions, gradients and answers
as of whole sequences."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safepatch_jax.data.chat import Example, shared_prefix, training_batch
from safepatch_jax.data.pipeline import training_batches
from safepatch_jax.evaluation.engine import Engine
from safepatch_jax.evaluation.generate import Sampling
from safepatch_jax.evaluation.likelihoods import answer_likelihoods
from safepatch_jax.io.hf import load_params
from safepatch_jax.models.config import config_from_hf
from safepatch_jax.models.decoder import Decoder
from safepatch_jax.models.layerwise import Blocks
from safepatch_jax.models.table import param_table
from safepatch_jax.training.batch import put_batch
from safepatch_jax.training.journal import Recipe
from safepatch_jax.training.losses import NPO
from safepatch_jax.training.objective import answer_logprobs
from safepatch_jax.training.step import Trainer
from tests.conftest import sharder_of
from tests.models.families import FAMILIES, tiny_raw

RNG = np.random.default_rng(0)
PREFIX = tuple(RNG.integers(0, 256, 11).tolist())


def example(number, prompt, answer):
    # Right after the prefix no two are alike.
    prompt = (*PREFIX, number, *RNG.integers(0, 256, prompt).tolist())
    return Example(prompt, tuple(RNG.integers(0, 256, answer).tolist()))


EXAMPLES = [example(i, *sizes) for i, sizes in enumerate([(0, 1), (3, 9), (9, 2), (20, 6), (7, 7)])]


@pytest.mark.parametrize(
    "family, remat", [*((name, "none") for name in FAMILIES), ("llama", "dots")]
)
def test_log_probabilities_and_gradients_are_those_of_whole_sequences(family, remat, sharder):
    config = config_from_hf(tiny_raw(family), family)  # with windows shorter than the prefix
    params = param_table(config).init(jax.random.key(0))
    params = jax.tree.map(lambda x: x + 0.1 * RNG.standard_normal(x.shape, np.float32), params)
    decoder = Decoder(config, jnp.float32, sharder, remat=remat)

    @jax.jit
    def measured(params, batch):
        def total(params):
            logprobs_BA = answer_logprobs(decoder, params, batch, chunk=4)
            return jnp.sum(logprobs_BA), logprobs_BA

        return jax.grad(total, has_aux=True)(params)

    whole, whole_BA = measured(params, training_batch(EXAMPLES, 40, 9))
    batch = training_batch(EXAMPLES, 27, 9, prefix=len(PREFIX))
    assert batch["prefix"].tolist() == [list(PREFIX)] and batch["tokens"].shape == (5, 27)
    ours, ours_BA = measured(params, batch)
    np.testing.assert_allclose(ours_BA, whole_BA, rtol=1e-5, atol=1e-5)
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5 * float(jnp.abs(y).max()))


@pytest.mark.parametrize(
    "prompts, shared",
    [
        ([], 0),
        ([[1, 2, 3]], 0),  # alone it has nothing to share
        ([[1, 2, 3], [1, 2, 4, 5]], 2),
        ([[1, 2, 3], [1, 2, 3]], 2),  # a token of each is left
        ([[1, 2], [1, 2, 3, 4], [1, 2, 3, 4]], 1),
        ([[1, 2], [2, 2]], 0),
    ],
)
def test_what_prompts_share(prompts, shared):
    assert shared_prefix(prompts) == shared


@pytest.mark.parametrize("buckets", [1, 3])
def test_dense_batches_hold_the_same_examples_in_fewer_tokens(buckets):
    plain, dense = (
        training_batches([(EXAMPLES, 2)], 4, buckets, dense=dense) for dense in (False, True)
    )
    for _ in range(20):
        whole, batch = next(plain), next(dense)
        for row, of_whole in enumerate(whole["tokens"]):
            ids = batch["tokens"][row][batch["valid"][row]].tolist()
            assert [*PREFIX, *ids] == of_whole[whole["valid"][row]].tolist()
        assert batch["tokens"].size + len(PREFIX) < whole["tokens"].size
        assert (batch["weights"].sum(-1) == whole["weights"].sum(-1)).all()
    longest = max(e.length for e in EXAMPLES)
    if buckets == 1:
        assert batch["tokens"].shape[1] == longest - len(PREFIX)
        assert batch["targets"].shape[1] == 9


@pytest.mark.parametrize("loss", [None, NPO()])
def test_training_on_dense_batches_is_training_on_whole_sequences(tiny, loss):
    sharder = sharder_of(1)
    config, params = load_params(tiny, sharder)
    examples = EXAMPLES
    if loss:
        examples = [dataclasses.replace(e, reference=-20.0) for e in examples]
    trainer = Trainer(
        Decoder(config, jnp.float32, sharder, remat="dots"),
        param_table(config),
        sharder,
        **({"loss": loss} if loss else {}),
    )
    assert trainer.dense
    tuned = []
    for dense in (False, True):
        batches = training_batches([(examples, 4)], 0, dense=dense)
        tuned.append(trainer.run(params, batches, Recipe(1.0, 3, 1e-3), "train"))
    (whole, of_whole), (ours, of_ours) = tuned
    np.testing.assert_allclose(of_ours.nll, of_whole.nll, rtol=1e-5)
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5)


def test_a_batch_with_a_prefix_is_not_taken_block_by_block(tiny, sharder):
    config, params = load_params(tiny, sharder)
    batch = put_batch(training_batch(EXAMPLES, 29, 9, prefix=11), sharder)
    with pytest.raises(ValueError, match="prefix=0"):
        Blocks(Decoder(config, jnp.float32, sharder)).begin(params, batch)


@pytest.fixture(scope="module")
def engines(tiny, sharder):
    """Two engines of one model: one reads a prefix once, the other whole prompts."""
    loaded = load_params(tiny, sharder)
    ours, whole = (Engine(*loaded, tiny, sharder, batch_size=8) for _ in range(2))
    assert ours.batching.once
    whole.batching = dataclasses.replace(whole.batching, once=False)
    return ours, whole


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, seed=5)])
@pytest.mark.parametrize("new", [5, 70])
def test_answers_are_those_of_whole_prompts(engines, new, sampling):
    ours, whole = engines
    prompts = [e.prompt_ids for e in EXAMPLES] * 2
    assert ours.batching.prefix(prompts) == 8 and not whole.batching.prefix(prompts)
    answers = ours.complete_ids(prompts, new, sampling=sampling)
    assert answers == whole.complete_ids(prompts, new, sampling=sampling)


def test_groups_of_prompts_have_their_prefix(engines):
    batching = dataclasses.replace(engines[0].batching, size=8)
    prompts = [e.prompt_ids for e in EXAMPLES]
    ((rows, _),) = batching.pools(prompts, 10, 4)
    assert rows.group == 2 and rows.prefix == PREFIX[:8]
    ((rows, _),) = batching.pools(prompts, 100, 8)
    assert rows.group == 1 and rows.prefix == ()  # a prompt alone is not read faster


def test_likelihoods_and_scores_are_those_of_whole_prompts(engines):
    results = []
    for engine in engines:
        rows = [None] * len(EXAMPLES)
        answer_likelihoods(engine, EXAMPLES, engines[1], "nll", rows.__setitem__, forced=1)
        pairs = engine.score([(e.prompt_ids, e.answer_ids) for e in EXAMPLES])
        results.append([[*row.values()] + list(pair) for row, pair in zip(rows, pairs)])
    ours, whole = np.array(results, np.float64)
    np.testing.assert_allclose(ours, whole, rtol=1e-5, atol=1e-5)


def test_on_a_mesh_prompts_are_read_whole(tiny):
    sharder = sharder_of(2)
    engine = Engine(*load_params(tiny, sharder), tiny, sharder)
    assert engine.batching.prefix([e.prompt_ids for e in EXAMPLES]) == 0
