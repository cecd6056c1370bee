"""A prefix that all sequences share is computed once: the same predictions, gradients and answers
as of whole sequences."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safepatch_jax.data.chat import Example, prompt_batch, shared_prefix, training_batch
from safepatch_jax.data.pipeline import training_batches
from safepatch_jax.evaluation import engine as evaluation_engine
from safepatch_jax.evaluation import likelihoods
from safepatch_jax.evaluation.batching import Batching
from safepatch_jax.evaluation.engine import Engine
from safepatch_jax.evaluation.generate import Prompts, Sampling
from safepatch_jax.evaluation.likelihoods import answer_likelihoods
from safepatch_jax.io.hf import load_params
from safepatch_jax.models.config import config_from_hf
from safepatch_jax.models.decoder import Decoder
from safepatch_jax.models.layerwise import Blocks
from safepatch_jax.models.table import param_table
from safepatch_jax.testing import write_tiny_model
from safepatch_jax.training.batch import micro_batches, put_batch
from safepatch_jax.training.journal import Recipe
from safepatch_jax.training.losses import NPO, Likelihood, Mismatch
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
    "options, given, message",
    [
        ({}, {"keep_kv": True}, "neither cache nor keep_kv"),
        ({"sharder": sharder_of(2)}, {}, "cannot be cut evenly over 2"),  # of five sequences
        ({"attention": "fused"}, {}, "fused is not possible here"),
    ],
)
def test_what_a_prefix_does_not_go_with_is_refused(tiny, sharder, options, given, message):
    config, params = load_params(tiny, sharder)
    decoder = Decoder(config, jnp.float32, **({"sharder": sharder} | options))
    batch = training_batch(EXAMPLES, 27, 9, prefix=len(PREFIX))
    inputs = batch["tokens"], jnp.arange(27)[None], batch["valid"]
    with pytest.raises(ValueError, match=message):
        decoder.apply({"params": params}, *inputs, prefix_1P=batch["prefix"], **given)


def test_a_batch_with_a_prefix_is_not_cut_into_parts(tiny, sharder):
    config, params = load_params(tiny, sharder)
    batch = put_batch(training_batch(EXAMPLES, 29, 9, prefix=11), sharder)
    with pytest.raises(ValueError, match="prefix=0"):
        Blocks(Decoder(config, jnp.float32, sharder)).begin(params, batch)
    with pytest.raises(ValueError, match="prefix=0"):
        micro_batches(batch, 5, sharder)


@pytest.mark.parametrize(
    "prompts, shared",
    [
        ([], 0),
        ([[1] * 9], 0),  # alone it has nothing to share
        ([[1] * 9 + [2], [1] * 9 + [3]], 8),  # in eights
        ([[1] * 17, [1] * 17], 16),
        ([[1] * 16, [1] * 16], 8),  # a token of each is left
        ([[1] * 7 + [2] * 9, [1] * 16], 0),
    ],
)
def test_what_prompts_share(prompts, shared):
    assert shared_prefix(prompts) == shared


def narrow(number):
    """Examples of several lengths that one multiple of 8 holds."""
    return [example(i, 3 + i % 8, 3) for i in range(number)]


@pytest.mark.parametrize(
    "examples, buckets", [(EXAMPLES, 1), (EXAMPLES, 3), (narrow(40), 3)], ids=str
)
def test_compact_batches_hold_the_same_examples_in_fewer_tokens(examples, buckets):
    plain = training_batches([(examples, 2)], 4, buckets)
    compact = training_batches([(examples, 2)], 4, buckets, compact=True)
    shared = list(PREFIX[:8])
    for _ in range(20):
        whole, batch = next(plain), next(compact)
        for row, of_whole in enumerate(whole["tokens"]):
            ids = batch["tokens"][row][batch["valid"][row]].tolist()
            assert shared + ids == of_whole[whole["valid"][row]].tolist()
        assert batch["tokens"].size + len(shared) < whole["tokens"].size
        assert (batch["weights"].sum(-1) == whole["weights"].sum(-1)).all()
        # Padding ends with an example.
        assert len(shared) + batch["tokens"].shape[1] in {e.length for e in examples}


@pytest.mark.parametrize("loss, scope", [("likelihood", True), ("npo", False), ("mismatch", False)])
def test_training_on_compact_batches_is_training_on_whole_sequences(tiny, loss, scope):
    sharder = sharder_of(1)
    config, params = load_params(tiny, sharder)
    table, examples, reference = param_table(config), EXAMPLES, None
    if scope:  # what is not trained stays as it is stored
        params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    if loss == "npo":
        examples = [dataclasses.replace(e, reference=-20.0) for e in examples]
    if loss == "mismatch":  # which compares
        examples = [dataclasses.replace(e, part=p) for e, p in zip(examples, (0, 1, 0, 2, 0))]
        reference = jax.tree.map(lambda x: 1.1 * x, params)
    losses = {"likelihood": Likelihood(), "npo": NPO(), "mismatch": Mismatch()}
    trainer = Trainer(
        Decoder(config, jnp.float32, sharder, remat="dots", attention="auto"),
        table,
        sharder,
        loss=losses[loss],
        rows=table.scope("block_linear") if scope else None,
    )
    assert trainer.compact
    tuned = []
    for compact in (False, True):
        batches = training_batches([(examples, 4)], 0, compact=compact)
        recipe = Recipe(1.0, 3, 1e-3)
        tuned.append(trainer.run(params, batches, recipe, "train", reference=reference))
    (whole, of_whole), (ours, of_ours) = tuned
    np.testing.assert_allclose(of_ours.nll, of_whole.nll, rtol=1e-5)
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4)
        # Where a gradient nearly vanishes, AdamW shows how it was rounded.
        assert np.mean(np.abs(x - y) > 2e-5) < 0.01


@pytest.fixture(scope="module")
def engines(tmp_path_factory, sharder):
    """Two engines of one model, with windows and two rotary bases: one reads a prefix once, the
    other whole prompts."""
    folder = tmp_path_factory.mktemp("prefix") / "model"
    write_tiny_model(folder, model_type="gemma3_text", sliding_window=5)
    loaded = load_params(folder, sharder)
    ours, whole = (Engine(*loaded, folder, sharder, batch_size=16) for _ in range(2))
    assert ours.batching.one_cpu
    whole.batching = dataclasses.replace(whole.batching, one_cpu=False)
    return ours, whole


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, seed=5)])
@pytest.mark.parametrize("new", [5, 70])
def test_answers_are_those_of_whole_prompts(engines, new, sampling):
    ours, whole = engines
    prompts = [e.prompt_ids for e in EXAMPLES] * 4  # rows are given on, and left out
    assert any(rows.prefix for rows, _ in ours.batching.pools(prompts, new, ours.model.groups))
    assert ours.batching.prefix(prompts) == 8 and not whole.batching.prefix(prompts)
    answers = ours.complete_ids(prompts, new, sampling=sampling)
    assert answers == whole.complete_ids(prompts, new, sampling=sampling)


def test_groups_of_prompts_have_their_prefix(engines):
    prompts = [e.prompt_ids for e in EXAMPLES]
    ((rows, _),) = engines[0].batching.pools(prompts, 10, 4)
    assert rows.group == 2 and rows.prefix == PREFIX[:8]
    ((rows, _),) = engines[0].batching.pools(prompts, 100, 8)
    assert rows.group == 1 and rows.prefix == ()  # a prompt alone is not read faster


@pytest.mark.parametrize("number, rows", [(1, 1), (5, 8), (36, 36), (48, 48), (80, 72)])
def test_a_cpu_has_few_idle_rows(number, rows):
    prompts = [[1] * 20] * number
    assert Batching(72, 1, one_cpu=True).pools(prompts, 24, 8)[0][0].number == rows


def test_likelihoods_and_scores_are_those_of_whole_prompts(engines, monkeypatch):
    results, sizes = [], []

    def noted(batch, sharder):
        sizes[-1] += batch["tokens"].size + batch.get("prefix", np.zeros(0)).size
        return put_batch(batch, sharder)

    monkeypatch.setattr(likelihoods, "put_batch", noted)
    monkeypatch.setattr(evaluation_engine, "put_batch", noted)
    for engine in engines:
        rows = [None] * len(EXAMPLES)
        sizes.append(0)
        answer_likelihoods(engine, EXAMPLES, engines[1], "nll", rows.__setitem__, forced=1)
        sizes.append(0)
        pairs = engine.score([(e.prompt_ids, e.answer_ids) for e in EXAMPLES])
        results.append([[*row.values()] + list(pair) for row, pair in zip(rows, pairs)])
    ours, whole = np.array(results, np.float64)
    np.testing.assert_allclose(ours, whole, rtol=1e-5, atol=1e-5)
    assert sizes[0] < sizes[2] and sizes[1] < sizes[3]


def test_on_a_mesh_prompts_are_read_whole(tiny):
    sharder = sharder_of(2)
    engine = Engine(*load_params(tiny, sharder), tiny, sharder)
    assert engine.batching.prefix([e.prompt_ids for e in EXAMPLES]) == 0
    batch = prompt_batch([e.prompt_ids for e in EXAMPLES], 40)
    prompts = Prompts(batch["tokens"], batch["lengths"], np.array([PREFIX]))
    with pytest.raises(ValueError, match="one CPU device"):
        engine.model.admit(None, prompts, None, None, None)
