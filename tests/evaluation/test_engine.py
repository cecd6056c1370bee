"""The engine: greedy as Hugging Face's, draws that depend on seed and number alone, likelihoods,
refusals."""

import functools

import jax
import numpy as np
import pytest

from safepatch_jax.evaluation.engine import Engine, first_stop
from safepatch_jax.evaluation.generate import Sampling
from safepatch_jax.evaluation.timing import seconds_per_token
from safepatch_jax.io.hf import load_params

RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, 256, n).tolist() for n in (1, 2, 7, 8, 9, 20, 41, 90)]
WARM = Sampling(temperature=1.0, top_p=0.9, seed=3)
MOST = 512  # positions of the tiny model


def cut_at(text, until):
    for stop in until:
        if stop and stop in text:
            text = text[: text.index(stop)]
    return text


def up_to(ids, stop):
    return ids[: ids.index(stop)] if stop in ids else ids


@pytest.fixture(scope="module")
def loaded(tiny, sharder):
    return load_params(tiny, sharder)


@pytest.fixture(scope="module")
def open_engine(tiny, sharder, loaded):
    return lambda batch_size: Engine(*loaded, tiny, sharder, batch_size=batch_size)


@pytest.fixture(scope="module")
def engine(open_engine):
    return open_engine(3)


@pytest.fixture(scope="module")
def torch_model(tiny):
    torch = pytest.importorskip("torch", reason="the reference is torch: pip install torch")
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()


def logits_of(engine, ids):
    """Return the logits [T, V] of one sequence, float64; all are padded to one length, so that one
    program is compiled."""
    tokens, valid = np.zeros((1, 192), np.int32), np.arange(192)[None] < len(ids)
    tokens[valid] = ids
    logits = _apply(engine.decoder, engine.params, tokens, np.arange(192)[None], valid)
    return np.asarray(logits[0, : len(ids)], np.float64)


@functools.partial(jax.jit, static_argnums=0)
def _apply(decoder, params, *inputs):
    return decoder.apply({"params": params}, *inputs)[0]


def logprobs_of(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def pairs_of(lengths):
    rng, pairs = np.random.default_rng(1), []
    for n, m in lengths:
        pairs.append((rng.integers(0, 256, n).tolist(), rng.integers(0, 256, m).tolist()))
    return pairs


# Continuations.


def test_greedy_is_that_of_torch(engine, torch_model):
    import torch

    answers = engine.complete_ids(PROMPTS, 12)
    for prompt, answer in zip(PROMPTS, answers):
        ids = torch_model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=list(engine.stop_ids),
            pad_token_id=258,
        )
        assert answer == [t for t in ids[0, len(prompt) :].tolist() if t not in engine.stop_ids]
    # The model does not say the same of everything.
    assert len({tuple(answer) for answer in answers}) > 4


def test_a_stop_token_ends_an_answer_and_is_left_out(open_engine):
    engine = open_engine(8)
    free = engine.complete_ids(PROMPTS, 12)
    stop = free[3][4]
    engine.stop_ids = (stop,)
    for with_stop, without in zip(engine.complete_ids(PROMPTS, 12), free):
        assert with_stop == up_to(without, stop)


@pytest.mark.parametrize("sampling", [Sampling(), WARM], ids=["greedy", "sampled"])
def test_stop_texts_end_a_batch_early_and_change_nothing_before_them(open_engine, sampling):
    engine, prompts = open_engine(4), PROMPTS[2:6]

    def text(ids):
        return engine.tokenizer.decode(ids, skip_special_tokens=True)

    engine.stop_ids = ()
    free = engine.complete_ids(prompts, 200, sampling=sampling)
    # Each answer holds one in its first piece.
    until = [text(ids)[10 + i : 12 + i] for i, ids in enumerate(free)]
    ended = engine.complete_ids(prompts, 200, sampling=sampling, until=["", *until])
    for whole, short in zip(free, ended):
        assert len(whole) == 200 and short == whole[: len(short)] and len(short) == 33
        assert cut_at(text(short), until) == cut_at(text(whole), until)
    # One answer continues to its third or fourth piece; the others hold their stop texts already.
    first, *others = map(text, free)
    for at in range(70, 110):
        late = first[at : at + 8]
        if first.index(late) >= 60 and not any(late in other for other in others):
            break
    until = [late, *(stop for stop in until[1:] if stop not in first[:120])]
    holding = [ids for ids in free[1:] if cut_at(text(ids)[:28], until) != text(ids)[:28]]
    mixed = engine.complete_ids(prompts, 200, sampling=sampling, until=until)
    assert holding and all(short == whole[: len(short)] for short, whole in zip(mixed, free))
    assert 64 <= len(mixed[0]) < 200 and late in text(mixed[0])
    assert all(len(mixed[free.index(ids)]) == 33 for ids in holding)
    assert engine.complete_ids(prompts, 200, sampling=sampling, until=["no such text"]) == free


def test_a_stop_text_that_begins_earlier_still_counts(open_engine):
    """'c' ends an answer only when 'b c d', which begins before it, can no longer come."""
    engine = open_engine(1)
    engine.stop_ids = ()
    (free,) = engine.complete_ids([PROMPTS[3]], 100, sampling=WARM)
    text = engine.tokenizer.decode(free, skip_special_tokens=True)
    until = [text[20:70], text[24:26]]
    assert text.index(until[0]) == 20 and 20 < text.index(until[1]) < 30 and len(text) > 80
    (ended,) = engine.complete_ids([PROMPTS[3]], 100, sampling=WARM, until=until)
    assert (
        cut_at(engine.tokenizer.decode(ended, skip_special_tokens=True), until)
        == cut_at(text, until)
        == text[:20]
    )
    assert len(ended) > 64  # the longer one ends in the third piece


@pytest.mark.parametrize("sampling", [Sampling(), WARM], ids=["greedy", "sampled"])
def test_batch_size_and_order_do_not_matter(engine, open_engine, sampling):
    numbers = [10 * i for i in range(len(PROMPTS))]
    answers = engine.complete_ids(PROMPTS, 10, sampling=sampling, numbers=numbers)
    order, done = [5, 0, 7, 2, 1, 6, 3, 4], {}
    other = open_engine(8).complete_ids(
        [PROMPTS[i] for i in order],
        10,
        "shuffled",
        sampling,
        done.__setitem__,
        [numbers[i] for i in order],
    )
    assert [other[order.index(i)] for i in range(len(order))] == answers
    assert [done[k] for k in range(len(order))] == other
    alone = engine.complete_ids(PROMPTS[4:5], 10, sampling=sampling, numbers=numbers[4:5])
    assert alone == answers[4:5]


def test_draws_follow_seed_and_number(engine):
    prompts = [PROMPTS[3]] * 3

    def draw(seed, numbers):
        return engine.complete_ids(prompts, 10, sampling=Sampling(1.0, 1.0, seed), numbers=numbers)

    same, others = draw(0, [7, 7, 7]), draw(0, [7, 8, 9])
    assert same[0] == same[1] == same[2] == others[0] and len(set(map(tuple, others))) == 3
    assert draw(1, [7, 8, 9])[0] != others[0]
    # Without numbers they are the indices.
    assert draw(0, [0, 1, 2]) == engine.complete_ids(prompts, 10, sampling=Sampling(1.0))


def test_a_tiny_top_p_is_greedy(engine):
    sampled = engine.complete_ids(PROMPTS, 10, sampling=Sampling(2.0, 1e-6))
    assert sampled == engine.complete_ids(PROMPTS, 10)


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.5, 0.5)])
def test_draws_have_the_models_distribution(open_engine, temperature, top_p):
    n = 2048
    engine = open_engine(n)
    drawn = engine.complete_ids([PROMPTS[2]] * n, 1, sampling=Sampling(temperature, top_p))
    share = np.exp(logprobs_of(logits_of(engine, PROMPTS[2])[-1] / temperature))
    order = np.argsort(-share)
    # the fewest that reach top_p
    kept = order[: np.searchsorted(np.cumsum(share[order]), top_p) + 1]
    expected = np.zeros_like(share)
    expected[kept] = share[kept] / share[kept].sum()
    tokens = [ids[0] if ids else engine.stop_ids[0] for ids in drawn]
    counts = np.bincount(tokens, minlength=len(share))
    assert not counts[expected == 0].any()
    spread = np.sqrt(n * expected * (1 - expected))
    assert np.all(np.abs(counts - n * expected) <= 5 * spread + 1)


@pytest.mark.parametrize(
    "temperature, top_p",
    [
        (-0.1, 1.0),
        (float("nan"), 1.0),
        (float("inf"), 1.0),
        (1.0, 0.0),
        (1.0, 1.5),
        (1.0, float("nan")),
        (1e-38, 1.0),  # logits divided by it are infinite in float32
        (1e-50, 1.0),  # 0 in float32
        (1.0, 1e-50),
    ],
)
def test_sampling_refuses_what_is_no_probability(temperature, top_p):
    message = r"temperature must be 0 \(greedy\) or at least 1e-06 and top_p in \[1e-06, 1\], got"
    with pytest.raises(ValueError, match=message):
        Sampling(temperature, top_p)


def test_the_lowest_temperature_takes_the_most_likely_token(engine):
    cold = engine.complete_ids(PROMPTS, 10, sampling=Sampling(1e-6, seed=3))
    assert cold == engine.complete_ids(PROMPTS, 10)


def test_prompts_that_do_not_fit_are_refused(engine):
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        engine.complete_ids([[1], []], 4)
    with pytest.raises(
        ValueError,
        match="prompt 0 has 510 tokens, and 4 more are asked for; the model has 512 positions",
    ):
        engine.complete_ids([[1] * 510], 4)
    assert len(engine.complete_ids([[1] * (MOST - 4)], 4)[0]) <= 4
    assert engine.complete_ids([], 4) == []


def test_text_in_text_out(engine):
    (answer,) = engine.complete(["<|im_start|>user\nSay a word."], 6)
    ids = engine.tokenizer("<|im_start|>user\nSay a word.")["input_ids"]
    assert ids[0] == 256 and answer == engine.decode(engine.complete_ids([ids], 6)[0])
    # The template's generation prompt.
    assert engine.ask("Hello")[-len("assistant\n") - 1 :][0] == 256


def test_the_first_stop_text():
    assert first_stop("one. two; three", [";", ".", ""]) == 3 and first_stop("one", ["x"]) == 3


# Likelihoods.


def test_score_is_the_sum_of_log_softmax(engine):
    pairs = pairs_of([(1, 1), (5, 3), (30, 9), (8, 17), (60, 64), (4, 65), (9, 70), (3, 130)])
    done = {}
    results = engine.score(pairs, done=done.__setitem__)
    assert [done[i] for i in range(len(pairs))] == results
    for (context, continuation), (logprob, greedy) in zip(pairs, results):
        of_each = logprobs_of(logits_of(engine, context + continuation[:-1]))[len(context) - 1 :]
        assert logprob == pytest.approx(
            of_each[range(len(continuation)), continuation].sum(), rel=1e-5
        )
        assert greedy is bool((of_each.argmax(-1) == continuation).all())


@pytest.mark.parametrize(
    "number, batches",
    [(24, [24]), (36, [12] * 3), (37, [24] * 2), (60, [12] * 5), (13, [6] * 3), (5, [6]), (1, [3])],
)
def test_few_rows_are_idle_and_batches_are_alike(open_engine, number, batches):
    groups = open_engine(24).batching.groups([20] * number, few_idle=True)
    assert [rows for rows, _ in groups] == batches
    assert [i for _, group in groups for i in group] == list(range(number))


def test_long_texts_run_in_batches_of_their_own_size(open_engine):
    groups = open_engine(16).batching.groups([20] * 20 + [1000] * 4, few_idle=True)
    assert [rows for rows, _ in groups] == [4, 4, 4, 4, 4, 4]
    assert groups[0][1] == [20, 21, 22, 23]


def test_score_is_that_of_torch(engine, torch_model):
    import torch

    pairs = pairs_of([(5, 3), (9, 70)])
    for (context, continuation), (logprob, _) in zip(pairs, engine.score(pairs)):
        with torch.inference_mode():
            output = torch_model(torch.tensor([context + continuation[:-1]]))
        logprobs = torch.log_softmax(output.logits[0, len(context) - 1 :].double(), -1)
        expected = logprobs[range(len(continuation)), continuation].sum().item()
        assert logprob == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("new", [6, 64, 66, 130])
def test_greedy_flag(engine, new):
    engine_ends = engine.stop_ids
    engine.stop_ids = ()
    try:
        answers = engine.complete_ids(PROMPTS[:3], new)
    finally:
        engine.stop_ids = engine_ends
    assert [len(answer) for answer in answers] == [new] * 3
    assert [greedy for _, greedy in engine.score(list(zip(PROMPTS, answers)))] == [True] * 3
    # One other token, also beyond the first 64, which are computed together.
    for at in {0, new // 2, new - 1}:
        changed = [[*answer[:at], (answer[at] + 1) % 256, *answer[at + 1 :]] for answer in answers]
        assert [greedy for _, greedy in engine.score(list(zip(PROMPTS, changed)))] == [False] * 3


def test_pairs_that_do_not_fit_are_refused(engine):
    for pair in (([], [1, 2]), ([1], [])):
        with pytest.raises(
            ValueError,
            match="context or continuation 1 is empty; give the context a token to begin with",
        ):
            engine.score([([1], [2]), pair])
    with pytest.raises(
        ValueError,
        match="prompt 0 has 513 tokens, and 0 more are asked for; the model has 512 positions",
    ):
        engine.score([([1] * MOST, [1, 2])])
    assert np.isfinite(engine.score([([1] * (MOST - 1), [1, 2])])[0][0])


def test_weights_that_are_nan_are_named(tiny, sharder, loaded):
    config, params = loaded
    engine = Engine(config, jax.tree.map(lambda x: x * np.nan, params), tiny, sharder, batch_size=1)
    with pytest.raises(
        ValueError, match="a log-likelihood is nan: the model's weights hold NaN or overflow"
    ):
        engine.score([([1], [2])])


def test_time_of_a_token(engine):
    assert 0 < seconds_per_token(engine, new=2, repeats=1) < 10
