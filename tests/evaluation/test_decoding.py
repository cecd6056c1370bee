"""Two-stream decoding: formulas and candidates against plain NumPy, ids against a loop without a
cache, errors."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safepatch_jax.evaluation.contrasted import Contrasted
from safepatch_jax.evaluation.decoding import Rose, SafeDecoding, SelfCD, candidates
from safepatch_jax.evaluation.engine import Engine
from safepatch_jax.evaluation.generate import Sampling
from safepatch_jax.evaluation.timing import atgr
from safepatch_jax.io.hf import load_params
from safepatch_jax.mesh import Sharder, make_mesh
from safepatch_jax.testing import write_tiny_model
from tests.conftest import sharder_of

TALKS = [
    "Hi",
    "Name a colour.",
    ("Say a word.", "Sea.", "And another one?"),
    "x" * 60,
    "What is a river, and where does it end?",
    "Why?",
]
RULES = [
    SelfCD(stressed="Be safe."),
    Rose(positive="Be kind and safe.", reverse="Be unkind."),
    SafeDecoding(),
]
NAMES = ["self_cd", "rose", "safe_decoding"]
NEW = 10
WHOLE = 264  # the tiny model's vocabulary
each_rule = pytest.mark.parametrize("rule", RULES, ids=NAMES)


# Plain NumPy, after the papers.


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def common_tokens(base, expert, c):
    """Grow k until the k likeliest tokens of both have c in common; of equally likely ones the
    lower id is first."""
    by_base = sorted(range(len(base)), key=lambda v: (-base[v], v))
    by_expert = sorted(range(len(base)), key=lambda v: (-expert[v], v))
    for k in range(1, len(base) + 1):
        common = set(by_base[:k]) & set(by_expert[:k])
        if len(common) >= c:
            break
    return common


def combined(rule, first, second, step):
    """Return what the next token is chosen from: the largest entry of a vector [V], float64."""
    first, second = first.astype(np.float64), second.astype(np.float64)
    if isinstance(rule, SelfCD):
        return first - rule.alpha * (first - second)
    if isinstance(rule, Rose):
        return first - rule.alpha * second
    if step >= rule.steps:
        return first
    base, expert = softmax(first), softmax(second)
    shares = np.full(len(base), -np.inf)
    for v in common_tokens(first, second, rule.common):
        shares[v] = base[v] + rule.alpha * (expert[v] - base[v])
    return shares


# Fixtures.


@pytest.fixture(scope="module")
def folders(tiny, tmp_path_factory):
    return tiny, write_tiny_model(tmp_path_factory.mktemp("tiny") / "expert", seed=1)


def mixed(params, other):
    """An expert that is not all different from the model."""
    return jax.tree.map(lambda a, b: 0.6 * a + 0.4 * b, params, other)


@pytest.fixture(scope="module")
def open_pair(folders):
    """(batch size, mesh) -> engine and expert."""

    @functools.cache
    def load(sharder):
        (config, params), (_, other) = (load_params(folder, sharder) for folder in folders)
        return config, params, mixed(params, other)

    def open_pair(batch_size, sharder):
        config, params, expert = load(sharder)
        return Engine(config, params, folders[0], sharder, batch_size=batch_size), expert

    return open_pair


@pytest.fixture(scope="module")
def pair(open_pair, sharder):
    return open_pair(4, sharder)


@pytest.fixture
def engine(open_pair, sharder):
    """One whose attributes a test may change."""
    return open_pair(4, sharder)[0]


def answers_of(pair, rule, talks=TALKS, new=NEW, **options):
    engine, expert = pair
    contrasted = Contrasted(engine, rule, expert if rule.needs_expert else None)
    return contrasted.answer(talks, new, **options)


@functools.partial(jax.jit, static_argnums=0)
def _apply(decoder, params, tokens, length):
    places = jnp.arange(tokens.shape[1])[None]
    return decoder.apply({"params": params}, tokens, places, places < length)[0][0, length - 1]


def next_logits(engine, params, ids):
    tokens = np.zeros((1, 256), np.int32)
    tokens[0, : len(ids)] = ids
    return np.asarray(_apply(engine.decoder, params, tokens, len(ids)))


@pytest.fixture(scope="module")
def by_hand(open_pair, sharder):
    """rule -> answers by a loop that reads both whole sequences anew for every token."""
    engine, expert = open_pair(1, sharder)

    @functools.cache
    def by_hand(rule, new=NEW):
        answers = []
        for talk in TALKS:
            sequences = [engine.ask_talk(talk, system) for system in rule.systems]
            weights = engine.params, expert if rule.needs_expert else engine.params
            answer = []
            for step in range(new):
                first, second = (
                    next_logits(engine, w, ids + answer) for w, ids in zip(weights, sequences)
                )
                answer.append(int(combined(rule, first, second, step).argmax()))
                if answer[-1] in engine.stop_ids:
                    break
            answers.append([t for t in answer if t not in engine.stop_ids])
        return answers

    return by_hand


# Formulas.


@pytest.mark.parametrize(
    "rule", [*RULES, SelfCD(0.5), Rose(2.0), SafeDecoding(0.5, 1, 9), SafeDecoding(1.0)], ids=repr
)
def test_formulas(rule):
    rng = np.random.default_rng(0)
    first, second = rng.normal(0, 2, (2, 5, 40)).astype(np.float32)
    second = (0.8 * first + 0.6 * second).astype(np.float32)
    for step in (0, 1, 2, 7):
        out = np.asarray(rule.combine(first, second, jnp.int32(step)), np.float64)
        for row, a, b in zip(out, first, second):
            expected = combined(rule, a, b, step)
            assert row.argmax() == expected.argmax()
            if not (rule.needs_expert and step < rule.steps):
                np.testing.assert_allclose(row, expected, atol=1e-5)
                continue
            assert np.array_equal(np.isfinite(row), np.isfinite(expected))
            shares = np.where(np.isfinite(expected), np.maximum(expected, 0), 0)
            np.testing.assert_allclose(np.exp(row), shares / shares.sum(), atol=1e-5)


def test_defaults_are_those_of_the_sources():
    assert SelfCD().alpha == 2.5 and Rose().alpha == 0.5
    assert (SafeDecoding().alpha, SafeDecoding().steps, SafeDecoding().common) == (3.0, 2, 5)


def test_of_candidates_that_all_lose_the_one_that_loses_least_is_chosen():
    """Both models are sure of a token that is not a candidate: each combined probability is
    negative."""
    base, expert = np.zeros((2, 12), np.float32)
    base[0], expert[11] = 16, 16
    base[1:6], expert[1:6] = [3, 4, 2, 5, 6], 1
    base[6:], expert[0], expert[6:11] = -3, -3, -3
    shares = combined(SafeDecoding(), base, expert, 0)
    assert set(np.flatnonzero(np.isfinite(shares))) == {1, 2, 3, 4, 5}
    assert shares[1:6].max() < 0 and shares.argmax() == 3
    row = np.asarray(SafeDecoding().combine(base[None], expert[None], 0))[0]
    assert row.argmax() == 3 and np.array_equal(np.argsort(-row[1:6]), np.argsort(-shares[1:6]))
    assert not np.isnan(row).any()


# Candidates.


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 40])
@pytest.mark.parametrize("common", [1, 5, 7])
@pytest.mark.parametrize("levels", [2, 4, 1000])
def test_candidates_are_those_of_the_growing_sets(size, common, levels):
    rng = np.random.default_rng(size * levels + common)
    base, expert = rng.integers(-levels, levels, (2, 25, size)).astype(np.float32) / 7
    found = np.asarray(candidates(base, expert, common))
    for row, a, b in zip(found, base, expert):
        assert set(np.flatnonzero(row)) == common_tokens(a, b, common)
        assert row.sum() in (min(common, size), min(common + 1, size))


def test_candidates_by_hand():
    base = np.array([[6, 5, 4, 3, 2, 1.0]])  # order 0 1 2 3 4 5
    expert = np.array([[1, 2, 6, 5, 4, 3.0]])  # order 2 3 4 5 1 0

    def tokens(common):
        (row,) = np.asarray(candidates(base, expert, common))
        return set(np.flatnonzero(row))

    assert tokens(1) == {2}  # k = 3
    assert tokens(2) == {2, 3}  # k = 4
    assert tokens(4) == {1, 2, 3, 4}  # k = 5 brings in two
    assert tokens(3) == {1, 2, 3, 4}
    assert tokens(5) == tokens(6) == tokens(9) == {0, 1, 2, 3, 4, 5}
    ties = np.zeros((1, 6))
    assert set(np.flatnonzero(np.asarray(candidates(ties, ties, 3))[0])) == {0, 1, 2}


# Plain decoding as a special case.


def plain(engine, system, new=NEW):
    return engine.complete_ids([engine.ask_talk(talk, system) for talk in TALKS], new)


@pytest.mark.parametrize(
    "rule",
    [
        SelfCD(stressed="Be safe.", plain="Be safe."),
        SelfCD(stressed="Be safe.", alpha=0.0),
        Rose(positive="Be safe.", reverse="Be safe."),
        Rose(positive="Be safe.", alpha=0.0),
        SafeDecoding(alpha=0.0, common=WHOLE, steps=NEW, system="Be safe."),
    ],
    ids=repr,
)
def test_alpha_0_and_equal_streams_are_plain_decoding(pair, rule):
    assert answers_of(pair, rule) == plain(pair[0], "Be safe.")


@pytest.mark.parametrize("steps", [2, NEW])
def test_an_expert_that_is_the_model_changes_nothing(pair, steps):
    engine = pair[0]
    contrasted = Contrasted(engine, SafeDecoding(steps=steps), engine.params)
    assert contrasted.answer(TALKS, NEW) == plain(engine, None)


def test_alpha_1_over_the_vocabulary_is_the_expert(open_pair, sharder, folders):
    engine, expert = open_pair(4, sharder)
    alone = Engine(engine.config, expert, folders[0], sharder, batch_size=4)
    answers = answers_of((engine, expert), SafeDecoding(alpha=1.0, common=WHOLE, steps=NEW))
    assert answers == plain(alone, None) != plain(engine, None)


# Ids.


@each_rule
@pytest.mark.parametrize("batch_size", [1, 4])
def test_ids_are_those_of_a_loop_without_a_cache(open_pair, by_hand, sharder, rule, batch_size):
    answers = answers_of(open_pair(batch_size, sharder), rule)
    assert answers == by_hand(rule)
    assert (
        answers != plain(open_pair(4, sharder)[0], rule.systems[0])
        and len(set(map(tuple, answers))) > 3
    )


@each_rule
@pytest.mark.parametrize("mesh", ["fsdp", "data", "tensor"])
def test_ids_on_eight_devices(open_pair, by_hand, rule, mesh):
    sharder = {
        "fsdp": lambda: sharder_of(8),
        "data": lambda: Sharder(make_mesh("data:8,fsdp:1,tensor:1")),
        "tensor": lambda: Sharder(make_mesh("data:2,fsdp:2,tensor:2")),
    }[mesh]()
    assert answers_of(open_pair(8, sharder), rule) == by_hand(rule)


@pytest.mark.parametrize("steps, new", [(1, 4), (2, 1), (2, 2), (2, 3), (3, 3), (9, 4)])
def test_safe_decoding_by_number_of_steps(pair, by_hand, steps, new):
    rule = SafeDecoding(steps=steps)
    assert answers_of(pair, rule, new=new) == by_hand(rule, new)


@each_rule
def test_order_does_not_matter_and_each_answer_is_handed_over(pair, rule):
    order, done = [4, 0, 5, 2, 1, 3], {}
    answers = answers_of(pair, rule, [TALKS[i] for i in order], done=done.__setitem__)
    in_order = answers_of(pair, rule)
    assert [done[i] for i in range(len(order))] == answers == [in_order[i] for i in order]
    assert answers_of(pair, rule, []) == []


@each_rule
@pytest.mark.parametrize("at", [0, 1, 2, 5])
def test_a_stop_token_ends_an_answer_and_is_left_out(open_pair, sharder, rule, at):
    engine, expert = open_pair(4, sharder)
    engine.stop_ids = ()
    free = answers_of((engine, expert), rule)
    engine.stop_ids = (free[3][at],)
    (stop,) = engine.stop_ids
    for with_stop, without in zip(answers_of((engine, expert), rule), free):
        assert with_stop == list(itertools.takewhile(lambda token: token != stop, without))


# Prompts.


def text_of(engine, *turns, **options):
    return engine.tokenizer.decode(engine.ask(*turns, **options))


def test_a_system_message_has_its_own_turn(engine):
    assert text_of(engine, "Hi", system="Be safe.").startswith(
        "<|im_start|>system\nBe safe.<|im_end|>\n<|im_start|>user\nHi"
    )
    assert text_of(engine, "Hi", system=None) == text_of(engine, "Hi")
    assert text_of(engine, "Be safe.", system="Be safe.").count("Be safe.") == 2
    assert text_of(engine, "Hi", system="").startswith(
        "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nHi"
    )


@pytest.mark.parametrize(
    "guard", ["{{ raise_exception('System role not supported') }}", ""], ids=["refused", "left out"]
)
def test_without_a_system_role_the_message_is_put_before_the_users_text(engine, guard):
    turn = "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}"
    engine.tokenizer.chat_template = (
        "{% for message in messages %}"
        "{% if message['role'] == 'system' %}"
        + guard
        + "{% else %}"
        + turn
        + "{% endif %}{% endfor %}"
    )
    assert text_of(engine, "Hi", "Yes?", "Oh", system="Be safe.") == (
        "<|im_start|>user\nBe "
        "safe.\n\nHi<|im_end|><|im_start|>assistant\nYes?<|im_end|><|im_start|>user\nOh<|im_end|>"
    )
    assert (
        text_of(engine, "Be safe. Hi", system="Be safe.")
        == "<|im_start|>user\nBe safe.\n\nBe safe. Hi<|im_end|>"
    )
    assert text_of(engine, "Hi", system="") == text_of(engine, "Hi")
    assert len(Contrasted(engine, SelfCD()).answer(["Hi"], 3)[0]) <= 3


def test_without_is_what_the_template_makes_of_it(engine):
    """A template that puts in a system message of its own (SmolLM2's) does so in the stream without
    the instruction."""
    engine.tokenizer.chat_template = (
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nOwn.<|im_end|>' }}{% "
        "endif %}"
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}{% "
        "endfor %}"
    )
    own, stressed = "<|im_start|>system\nOwn.", "<|im_start|>system\nBe safe."
    (first,), (second,) = Contrasted(engine, SelfCD(stressed="Be safe.")).streams(["Hi"])
    first, second = engine.tokenizer.decode(first), engine.tokenizer.decode(second)
    assert first.startswith(stressed) and "Own." not in first and second.startswith(own)
    assert text_of(engine, "Hi", system="Own.") == text_of(engine, "Hi")
    _, (second,) = Contrasted(engine, SelfCD(plain="")).streams(["Hi"])
    assert engine.tokenizer.decode(second).startswith("<|im_start|>system\n<|im_end|>")


# Time.


@each_rule
def test_atgr(pair, rule):
    engine, expert = pair
    ratio, least, most = atgr(engine, rule, expert if rule.needs_expert else None, 4, repeats=2)
    assert math.isfinite(ratio) and 0 < least <= most < 1000 and 0 < ratio < 1000


def test_atgr_of_other_weights(pair):
    engine, expert = pair
    ratio, least, most = atgr(engine, params=expert, new=4, repeats=2)
    assert 0 < least <= most and 0 < ratio < 1000
    with pytest.raises(ValueError, match="two prompts and one model"):
        atgr(engine, Rose(), expert)


def test_a_rule_answers_as_an_engine_does(pair):
    engine, _ = pair
    contrasted, done = Contrasted(engine, Rose()), {}
    talks = ["Hi", ("Hi", "Yes.", "And now?")]
    answers = contrasted.answer(talks, 5, done=done.__setitem__)
    assert done == dict(enumerate(answers))
    assert contrasted.fits("Hi", 5) and not contrasted.fits("x" * engine.config.max_length, 5)
    # The rule's system messages take room.
    room = engine.config.max_length - len(engine.ask("Hi"))
    assert engine.fits("Hi", room) and not contrasted.fits("Hi", room)
    with pytest.raises(ValueError, match="Rose chooses the likeliest token"):
        contrasted.answer(talks, 5, sampling=Sampling(temperature=0.5))


# Errors.


@pytest.mark.parametrize("kind", [SelfCD, Rose, SafeDecoding])
@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), -float("inf")])
def test_alpha_that_is_not_finite_is_refused(kind, alpha):
    message = (
        rf"{kind.__name__}: alpha must be a finite number, got .*; the source's is {kind.alpha}"
    )
    with pytest.raises(ValueError, match=message):
        kind(alpha=alpha)


@pytest.mark.parametrize("steps, common", [(0, 5), (2, 0), (-1, 5)])
def test_no_steps_or_candidates_are_refused(steps, common):
    with pytest.raises(
        ValueError,
        match="steps and common must be 1 or more, got .*For plain decoding use "
        "Engine.complete_ids",
    ):
        SafeDecoding(steps=steps, common=common)


@pytest.mark.parametrize("ask", [Contrasted, atgr])
def test_experts_that_do_not_fit_are_refused(pair, ask, tmp_path, sharder):
    engine, expert = pair
    with pytest.raises(
        ValueError,
        match=r"SafeDecoding needs an expert: .*expert=load_params\(folder, engine.sharder\)\[1\]",
    ):
        ask(engine, SafeDecoding())
    for rule in RULES[:2]:
        with pytest.raises(
            ValueError,
            match=f"{type(rule).__name__} has two prompts and one model; leave the expert out",
        ):
            ask(engine, rule, expert=expert)
    _, wide = load_params(write_tiny_model(tmp_path / "wide", intermediate_size=96), sharder)
    with pytest.raises(
        ValueError,
        match=r"(?s)another architecture than the model. Tune it from the same model.*"
        r"layers/mlp/\w+: expert \(2, .*96.*\), model \(2, .*64.*\)",
    ):
        ask(engine, SafeDecoding(), expert=wide)
    _, untied = load_params(
        write_tiny_model(tmp_path / "untied", tie_word_embeddings=False), sharder
    )
    with pytest.raises(ValueError, match=r"head/kernel: expert \(264, 32\), model has none"):
        ask(engine, SafeDecoding(), expert=untied)
    with pytest.raises(ValueError, match="and [0-9]+ more$"):
        ask(engine, SafeDecoding(), expert={})


def test_conversations_that_do_not_fit_are_refused(pair):
    """The longer of a conversation's two prompts counts, whichever stream it is of."""
    message = r"prompt 1 has \d+ tokens, and 4 more are asked for; the model has 512 positions"
    long = "x" * (512 - len(pair[0].ask("", system="")) - 10)
    for rule in (SelfCD(stressed="Be safe.", plain=""), SelfCD(stressed="", plain="Be safe.")):
        with pytest.raises(ValueError, match=message):
            answers_of(pair, rule, ["Hi", long], 4)
    assert len(answers_of(pair, SelfCD(stressed="", plain=""), [long], 4)[0]) <= 4
