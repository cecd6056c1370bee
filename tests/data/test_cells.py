"""Cells of a table: conversations and their turns, numbers, missing cells, and what is refused."""

import json

import pytest

from safepatch_jax.data import cells
from safepatch_jax.data.chat import answer_pairs
from safepatch_jax.data.records import Record, load_records, take
from safepatch_jax.evaluation.prompter import Prompter
from safepatch_jax.models.config import read_hf_config
from safepatch_jax.testing import write_tiny_model

SYSTEM, FIRST, REPLY = ("system", "Be kind."), ("user", "Hello"), ("assistant", "Hi there")
TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi there"},
    {"role": "user", "content": " How do I tie a knot? "},
]
ANSWERED = [*TALK, {"role": "assistant", "content": "Take a rope."}]
SHARED = [
    {"from": "system", "value": "Be kind."},
    {"from": "human", "value": "Hello"},
    {"from": "gpt", "value": "Hi there"},
    {"from": "human", "value": "How do I tie a knot?"},
    {"from": "gpt", "value": "Take a rope."},
]
PARTS = [
    {
        "role": "user",
        "content": [{"type": "text", "text": "How do I"}, {"type": "text", "text": "?"}],
    }
]


def write(path, rows):
    """Write rows in the format that the suffix names."""
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def failure(role, source):
    with pytest.raises(ValueError) as raised:
        load_records(role, source)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 600
    return str(raised.value)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize(
    "row",
    [
        {"messages": ANSWERED},
        {"conversations": SHARED},
        {"conversation": ANSWERED, "prompt": "How do I tie a knot?"},
        {"prompt": TALK, "answer": "Take a rope."},
        {"prompt": TALK, "answer": [{"role": "assistant", "content": "Take a rope."}]},
        {"messages": ANSWERED, "answer": ""},
        {"messages": ANSWERED, "answer": "Take a rope."},
        {"messages": json.dumps(ANSWERED)},
    ],
)
def test_conversations(tmp_path, suffix, row):
    (record,) = load_records("ordinary", write(tmp_path / f"a{suffix}", [row]))
    assert (record.prompt, record.answer) == ("How do I tie a knot?", "Take a rope.")
    assert record.turns == (SYSTEM, FIRST, REPLY)


def test_conversation_in_a_cell_of_csv(tmp_path):
    cell = json.dumps(ANSWERED).replace('"', '""')
    (tmp_path / "a.csv").write_text(f'messages\n"{cell}"\n')
    (record,) = load_records("harmful", str(tmp_path / "a.csv"))
    assert (record.answer, record.turns) == ("Take a rope.", (SYSTEM, FIRST, REPLY))


def test_a_prompt_alone_has_no_turns(tmp_path):
    rows = [{"messages": ANSWERED[1:2]}, {"messages": PARTS}]
    records = load_records("lookalike", write(tmp_path / "a.jsonl", rows))
    assert [(r.prompt, r.turns) for r in records] == [("Hello", ()), ("How do I?", ())]
    plain = write(tmp_path / "b.jsonl", [{"prompt": "Hello"}, {"prompt": "How do I?"}])
    assert load_records("lookalike", plain) == records


def test_conversations_without_answer_are_left_out(tmp_path, capsys):
    rows = [{"messages": talk} for talk in (TALK, ANSWERED, [])]
    (record,) = load_records("ordinary", write(tmp_path / "a.jsonl", rows))
    assert record.answer == "Take a rope."
    assert "1 of 3 rows; left out: 2 without prompt or answer" in capsys.readouterr().out


def test_one_prompt_after_other_turns_is_another_example(tmp_path):
    talks = []
    for i in range(40):
        talks.append([{"role": "system", "content": f"You are number {i}"}, *TALK[3:]])
    rows = [{"messages": talk, "answer": "Take a rope."} for talk in [*talks, TALK[3:], talks[0]]]
    records = load_records("ordinary", write(tmp_path / "a.jsonl", rows))
    assert len(records) == 41 and len({record.split for record in records}) == 3
    assert len(take([r for r in records if r.turns], "train", 5)) == 5
    alone = load_records("ordinary", write(tmp_path / "b.jsonl", rows[40:41]))
    assert alone == records[40:]


def test_long_turns_in_common_make_no_duplicates(tmp_path):
    system = {"role": "system", "content": "many words of one long message " * 20}
    rows = []
    for task in ("mend a boat", "carve spoons", "bake bread", "bake bread!"):
        talk = [system, {"role": "user", "content": task}, {"role": "assistant", "content": "ok"}]
        rows.append({"messages": talk})
    records = load_records("ordinary", write(tmp_path / "a.jsonl", rows))
    assert [record.prompt for record in records] == ["mend a boat", "carve spoons", "bake bread"]


def test_hashes_of_records_without_turns_stay():
    record = Record("p", "a", "r", "c", "train")
    assert record.key == "p"
    assert record.fields() == {
        "prompt": "p",
        "answer": "a",
        "refusal": "r",
        "category": "c",
        "split": "train",
    }
    talk = Record("p", "a", "r", "c", "train", (FIRST, REPLY))
    assert talk.key != "p" and talk.fields()["turns"] == (FIRST, REPLY)


NAN = float("nan")


@pytest.mark.parametrize(
    "value, expected",
    [
        (42, "42"),
        (42.0, "42"),
        (0.5, "0.5"),
        (1e300, "1e+300"),
        (" two ", "two"),
        (None, ""),
        (NAN, ""),
    ],
)
def test_numbers_and_missing_cells(value, expected):
    assert cells.text(value) == expected


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_missing_cells_of_pandas_are_left_out(tmp_path, capsys, suffix):
    rows = [
        {"prompt": "one", "answer": NAN},
        {"prompt": "two", "answer": 2.0},
        {"prompt": None, "answer": 3.0},
    ]
    (record,) = load_records("ordinary", write(tmp_path / f"a{suffix}", rows))
    assert (record.prompt, record.answer) == ("two", "2")
    assert "1 of 3 rows; left out: 2 without prompt or answer" in capsys.readouterr().out


def user(content, **more):
    return {"prompt": [{"role": "user", "content": content, **more}], "answer": "x"}


@pytest.mark.parametrize(
    "row, column, part",
    [
        ({"prompt": "x", "answer": ["a", "b"]}, "answer", "it holds a list of 2, where one answer"),
        ({"prompt": "x", "answer": {"text": "a"}}, "answer", "it holds an object, where a text"),
        ({"prompt": "x", "answer": True}, "answer", "it holds true or false, where a text"),
        ({"prompt": "x", "answer": ANSWERED}, "answer", "a conversation of 5 messages, where one"),
        ({"prompt": ["x"], "answer": "a"}, "prompt", "it holds a list, where a text is needed"),
        ({"prompt": "x", "answer": float("inf")}, "answer", "it holds the number inf"),
        ({"prompt": "\ud83d", "answer": "x"}, "prompt", r"it holds '\ud83d', half of a character"),
        ({"prompt": "x", "answer": "y", "type": [["a"]]}, "type", "it holds a list, where a text"),
        ({"prompt": "x", "answer": "y", "category": {"a": 1.5}}, "category", "not true or false"),
        (
            {"prompt": "[{'role': 'user', 'content': 'x'}]", "answer": "y"},
            "prompt",
            "it holds a conversation as Python or NumPy prints it",
        ),
        ({"prompt": '[{"role": "user"', "answer": "y"}, "prompt", "Is it cut off?"),
        (
            user([{"type": "image_url", "image_url": "x"}]),
            "prompt",
            "message 1: it holds a part of type 'image_url'; only text can be read",
        ),
        (user("x", tool_calls=[{"name": "f"}]), "prompt", "message 1: it holds calls of tools"),
        (user({"text": "x"}), "prompt", "message 1: it holds an object, where a text"),
        (
            {"messages": [*TALK, {"role": "tool", "content": "x"}]},
            "messages",
            "message 5: the role is 'tool'; those known are system, user (human) and assistant",
        ),
        ({"messages": [{"role": ["user"]}]}, "messages", "message 1: the role is ['user']"),
        ({"messages": [*TALK, *TALK]}, "messages", "message 5 is the system's, where the assist"),
        ({"messages": [*ANSWERED, *ANSWERED[4:]]}, "messages", "message 6 is the assistant's"),
        ({"messages": ANSWERED[2:]}, "messages", "message 1 is the assistant's, where the user's"),
        ({"messages": TALK[:1]}, "messages", "a conversation in which the user says nothing"),
        (
            {"messages": [*TALK[:2], {"role": "assistant", "content": None}, *TALK[3:]]},
            "messages",
            "message 3 of the conversation is empty",
        ),
    ],
)
def test_what_is_no_text_is_named(tmp_path, row, column, part):
    rows = [{"prompt": "a", "answer": "b", "messages": ANSWERED}, row]
    if "messages" in row:
        rows = [{"messages": ANSWERED}, row]
    message = failure("ordinary", write(tmp_path / "a.jsonl", rows))
    assert f"a.jsonl: row 2, column '{column}': " in message and part in message


def test_two_answers_that_differ_are_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"messages": ANSWERED, "answer": "Use glue."}])
    message = failure("ordinary", path)
    assert "row 1: the conversation in column 'messages' ends with another answer" in message
    assert "column 'answer' holds" in message


def test_texts_without_answers_lack_the_column(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"messages": "only a text"}])
    assert "needs the column 'answer'" in failure("ordinary", path)


def test_categories(tmp_path):
    rows = []
    values = ({"a,b": True, "c": False, "d": True}, ["x", "y"], 3, None)
    for word, value in zip(("boat", "spoon", "bread", "shirt"), values):
        rows.append({"prompt": f"mend a {word}", "answer": "x", "category": value})
    records = load_records("ordinary", write(tmp_path / "a.jsonl", rows))
    assert [record.category for record in records] == ["a,b; d", "x; y", "3", ""]


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
REFUSES = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHATML
LEAVES_OUT = CHATML.replace("messages %}", "messages if m['role'] != 'system' %}")
HELLO = "<|im_start|>user\n{}Hello<|im_end|>\n<|im_start|>assistant\nHi there<|im_end|>\n"
KNOT = "<|im_start|>user\nKnot?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    "template, before",
    [
        (CHATML, "<|im_start|>system\nBe kind.<|im_end|>\n" + HELLO.format("")),
        (REFUSES, HELLO.format("Be kind.\n\n")),
        (LEAVES_OUT, HELLO.format("Be kind.\n\n")),
    ],
)
def test_training_and_evaluation_render_the_turns_alike(tmp_path, template, before):
    folder = write_tiny_model(tmp_path / "model")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    prompter = Prompter(read_hf_config(folder), folder)
    turns = (SYSTEM, FIRST, REPLY)
    (pair,) = answer_pairs([Record("Knot?", "Yes", "No", "", "train", turns)])
    example = prompter.chat.encode(*pair)
    text = prompter.tokenizer.decode(example.prompt_ids, skip_special_tokens=False)
    assert text == before + KNOT == prompter.chat.prompt_text("Knot?", turns)
    assert prompter.decode(example.answer_ids) == "Yes"
    assert prompter.ask_talk(cells.talk("Knot?", turns)) == list(example.prompt_ids)
    assert prompter.ask_talk(cells.talk("Knot?")) == list(
        prompter.chat.encode("Knot?", "x").prompt_ids
    )
    # A message of a decoding rule stands before the conversation's own.
    ruled = prompter.ask_talk(cells.talk("Knot?", turns), "Be safe.")
    assert "Be safe.\n\nBe kind." in prompter.tokenizer.decode(ruled)
    assert example.prompt == cells.transcript("Knot?", turns)
