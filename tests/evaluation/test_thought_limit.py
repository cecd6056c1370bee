"""Thoughts that reach their limit are ended there, and the answer has all its tokens behind them.

The model of these tests writes after each token one and the same other token, so what it must
write is known.
"""

import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from safepatch_jax.data.chat import Chat
from safepatch_jax.data.prompt_format import read_format
from safepatch_jax.evaluation.contrasted import Contrasted
from safepatch_jax.evaluation.decoding import SafeDecoding, SelfCD
from safepatch_jax.evaluation.engine import Engine
from safepatch_jax.evaluation.generate import Sampling
from safepatch_jax.evaluation.judges.phrases import judge
from safepatch_jax.evaluation.measures import measure_role
from safepatch_jax.evaluation.tasks import gsm8k_questions, solve
from safepatch_jax.io.hf import load_params
from safepatch_jax.testing import write_tiny_model

BEGIN, END, QUESTION, STOP = 259, 260, 261, 257
NEXT = {":": BEGIN, BEGIN: "a", "a": "e", "e": "f", "f": "g", "g": END, END: "b", "\n": "b"}
NEXT |= {"b": "c", "c": "d", "d": "b", "z": "b", "y": "k", "k": STOP}
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
NEW = 5
FORCED = "<think>ae\n</think>\n\nbcdbc"


def number(token):
    return token if isinstance(token, int) else bytes_of()[token]


def bytes_of():
    """The ids of the byte tokenizer's characters."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return {c: i for i, c in enumerate(alphabet)} | {"\n": alphabet.index("Ċ")}


def write_chain(folder, special, chain=NEXT):
    """Write a model that writes a chain; the tags are tokens, special ones or not."""
    write_tiny_model(folder, tie_word_embeddings=False)
    path = folder / "model.safetensors"
    weights = {name: np.array(x) for name, x in load_file(path).items()}
    for name, x in weights.items():
        if re.search(r"o_proj|down_proj|lm_head|embed_tokens", name):
            x[...] = 0
    for place, (token, follower) in enumerate(chain.items()):
        weights["model.embed_tokens.weight"][number(token), place] = 1
        weights["lm_head.weight"][number(follower), place] = 10
    save_file(weights, path, {"format": "pt"})
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    for i, text in ((BEGIN, "<think>"), (END, "</think>"), (QUESTION, "Question:")):
        entry = {"id": i, "content": text, "special": special and i != QUESTION}
        content["added_tokens"].append(content["added_tokens"][-1] | entry)
    path.write_text(json.dumps(content))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder whose tags are special tokens."""
    return write_chain(tmp_path_factory.mktemp("chain") / "model", True)


@pytest.fixture(scope="module")
def open_engine(folder, sharder):
    config, params = load_params(folder, sharder)

    def open_engine(limit):
        prompt_format = read_format(think_tokens=limit)
        return Engine(config, params, folder, sharder, "float32", 1, prompt_format=prompt_format)

    return open_engine


def answers(engine, *texts, **options):
    ids = engine.complete_ids([engine.encode(text) for text in texts], NEW, **options)
    return [engine.decode(answer) for answer in ids]


@pytest.mark.parametrize("special", [False, True])
def test_the_tags_of_a_thought_are_never_left_out(tmp_path, special):
    chat = Chat(write_chain(tmp_path / "model", special), 264)
    ids = chat.tokenizer("<think>ae</think>bc<|im_end|>", add_special_tokens=False)["input_ids"]
    assert ids[0] == BEGIN and ids[-1] == STOP
    assert chat.decode(ids) == "<think>ae</think>bc"


def test_without_a_limit_thought_and_answer_share_the_tokens(open_engine):
    assert answers(open_engine(0), "Hi:", "z", "y") == ["<think>aefg", "bcdbc", "k"]


@pytest.mark.parametrize("options", [{}, {"sampling": Sampling(1.0, seed=3)}])
def test_a_thought_that_reaches_the_limit_is_ended(open_engine, options):
    done = {}
    texts = answers(open_engine(3), "Hi:", "z", "y", done=done.__setitem__, **options)
    assert texts == [FORCED, "bcdbc", "k"]
    assert {i: len(ids) for i, ids in done.items()} == {0: 3 + 4 + NEW, 1: NEW, 2: 1}


@pytest.mark.parametrize("limit", [5, 6, 8, 20])
def test_a_thought_that_ends_before_leaves_the_answer_its_tokens(open_engine, limit):
    ended = "<think>aefg\n</think>\n\nbcdbc" if limit == 5 else "<think>aefg</think>bcdbc"
    assert answers(open_engine(limit), "Hi:", "z") == [ended, "bcdbc"]


def test_a_stop_text_behind_the_thought(open_engine):
    assert answers(open_engine(3), "Hi:", until=("dbc",)) == [FORCED]


def test_a_stop_text_in_a_thought_ends_nothing(open_engine):
    engine = open_engine(0)
    ends = {}
    for until in ("aef", "dbc"):
        (ids,) = engine.complete_ids([engine.encode("Hi:")], 100, until=(until,))
        ends[until] = len(ids)
    assert ends["aef"] == 100 and ends["dbc"] < 40


THINKS = {":": BEGIN, BEGIN: QUESTION, QUESTION: END, END: "5", "5": STOP}
ASKS = {":": QUESTION, QUESTION: "5", "5": STOP}


@pytest.mark.parametrize(
    "chain, template, shots, text",
    [
        (THINKS, "own", 0, "<think>Question:</think>5"),
        (THINKS, "own", 1, "<think>Question:</think>5"),
        (THINKS, "plain", 0, "<think>Question:</think>5"),
        (ASKS, "own", 0, "Question:5"),
        (ASKS, "own", 1, ""),
        (ASKS, "plain", 0, ""),
    ],
)
def test_the_next_question_ends_an_answer_where_the_prompt_writes_so(
    chain, template, shots, text, tmp_path
):
    for part in ("train", "test"):
        line = {"question": f"Of the {part}?", "answer": "It is.\n#### 5"}
        (tmp_path / f"gsm8k_{part}.jsonl").write_text(json.dumps(line) + "\n")
    folder, prompt_format = write_chain(tmp_path / "model", True, chain), read_format(template)
    engine = Engine.open(folder, batch_size=1, prompt_format=prompt_format)
    sets = {"manual_dir": str(tmp_path), "data_dir": tmp_path / "prepared"}
    (item,) = solve(engine, gsm8k_questions(engine, shots=shots, max_new=8, **sets))
    assert item["raw"]["text"] == text and item["raw"]["shots"] == shots
    assert item["correct"] == bool(text)


@pytest.mark.parametrize("rule", [SelfCD(alpha=0.5, stressed="Be safe."), SafeDecoding()])
def test_two_streams(open_engine, rule):
    engine = open_engine(3)
    contrasted = Contrasted(engine, rule, engine.params if rule.needs_expert else None)
    [ids] = contrasted.answer(["Hi"], NEW)
    assert engine.decode(ids) == FORCED


def test_a_prompt_for_which_thought_and_answer_leave_no_room(open_engine):
    engine = open_engine(480)
    assert engine.fits("Hi", 8) and not engine.fits("Hi", 20)
    with pytest.raises(ValueError, match="510 more are asked for"):
        engine.complete_ids([engine.encode("Hi:")], 26)


def test_measures_read_the_answer(open_engine, folder):
    encoded = Chat(folder, 264).encode_all([("Hi", "bcd")], 100, 100)
    free, _ = measure_role(open_engine(0), "lookalike", encoded, NEW, "test")
    limited, [row] = measure_role(open_engine(3), "lookalike", encoded, NEW, "test")
    assert free["unfinished"] == 1 and "unfinished" not in limited
    assert row["answer"] == FORCED and row["outcome"] == judge("bcdbc")
