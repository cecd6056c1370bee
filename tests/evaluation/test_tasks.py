"""MMLU and GSM8K: prompts, subsets, answers and their resumption, on small files in the sets'
published formats."""

import csv
import io
import json
import zipfile

import pytest

from safepatch_jax.data import builders
from safepatch_jax.data.builders import load_set
from safepatch_jax.evaluation.engine import Engine
from safepatch_jax.evaluation.tasks import (
    accuracy,
    choose,
    final_number,
    gsm8k_questions,
    mmlu_questions,
    solve,
    subset,
)
from safepatch_jax.testing import write_tiny_model


def mmlu_zip(sizes):
    """Return an archive as the published one, with so many test questions of each subject; the
    first answer is right."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for subject, size in sizes.items():
            for split, count in (("dev", 5), ("val", 1), ("test", size)):
                text = io.StringIO(newline="")
                writer = csv.writer(text)
                for i in range(count):
                    question, letter = f"{split} {i}, {subject}?", "ABCD"[i % 4]
                    writer.writerow([question, "one", "two", "three", "four", letter])
                archive.writestr(f"data/{split}/{subject}_{split}.csv", text.getvalue())
    return target.getvalue()


def gsm8k_lines(word, count):
    lines = ""
    for i in range(count):
        answer = f"<<2+{i}={2 + i}>>It is.\n#### 1,00{i}"
        lines += json.dumps({"question": f"{word} {i}?", "answer": answer}) + "\n"
    return lines


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    (folder / "mmlu.zip").write_bytes(mmlu_zip({"us_history": 4, "anatomy": 12}))
    (folder / "gsm8k_test.jsonl").write_text(gsm8k_lines("How many", 6))
    (folder / "gsm8k_train.jsonl").write_text(gsm8k_lines("Train", 8))
    return {"manual_dir": str(folder), "data_dir": folder / "prepared"}


@pytest.fixture(scope="module")
def engine(tiny):
    return Engine.open(tiny, mesh="data:1,fsdp:8,tensor:1", batch_size=8)


@pytest.mark.parametrize(
    "text, number",
    [
        ("It is 3.\n#### 18", "18"),
        ("#### 1. Add\n#### 18 of 20", "18"),
        ("####18", "18"),
        ("#### $1,234.50.", "1234.5"),
        ("#### -7 dollars", "-7"),
        ("#### Step 1\nadd 2 and 3\nThe answer is 5.", "5"),
        ("#### none, but 4", "4"),
        ("The answer is 18.", "18"),
        ("It costs $1,000,000.", "1000000"),
        ("16-3", "3"),
        ("16 - 3 = 13", "13"),
        ("x is -3.0", "-3"),
        ("1, 2", "2"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("\u22125", "-5"),
        (".50", "0.5"),
        ("-0", "0"),
        ("#### 007", "7"),
        ("100", "100"),
        ("10%", "10"),
        ("2.5.", "2.5"),
        ("12,345,678.25 m", "12345678.25"),
        ("no number", ""),
        ("", ""),
        ("####", ""),
    ],
)
def test_final_number(text, number):
    assert final_number(text) == number


def test_mmlu_prompt_is_the_standard_one(engine, data):
    question = mmlu_questions(engine, shots=1, **data).items[12]
    assert engine.tokenizer.decode(question.prompt_ids) == (
        "The following are multiple choice questions (with answers) about us history.\n\n"
        "dev 0, us_history?\nA. one\nB. two\nC. three\nD. four\nAnswer: A\n\n"
        "test 0, us_history?\nA. one\nB. two\nC. three\nD. four\nAnswer:"
    )
    assert [engine.tokenizer.decode(ids) for ids in question.choices] == [" A", " B", " C", " D"]
    assert (question.category, question.answer, question.shots) == ("us_history", "A", 1)


def test_gsm8k_prompts(engine, data):
    few = gsm8k_questions(engine, shots=2, max_new=8, **data)
    text = engine.tokenizer.decode(few.items[3].prompt_ids)
    assert text.endswith("Question: How many 3?\nAnswer:")
    assert text.count("Question: Train") == text.count("\n#### 1,00") == 2
    assert few.items[3].answer == "1003" and not few.note
    zero = gsm8k_questions(engine, shots=0, max_new=8, limit=1, **data).items[0]
    assert zero.prompt_ids[0] == 256 and zero.shots == 0  # the chat template
    assert "'#### number'" in engine.tokenizer.decode(zero.prompt_ids)


def test_gsm8k_without_its_train_split_says_so(engine, data, tmp_path, monkeypatch, capsys):
    def no_way(*_):
        raise OSError("no network")

    monkeypatch.setattr(builders, "fetch", no_way)
    (tmp_path / "gsm8k_test.jsonl").write_text(gsm8k_lines("How many", 2))
    questions = gsm8k_questions(
        engine, shots=5, max_new=8, manual_dir=str(tmp_path), data_dir=tmp_path / "prepared"
    )
    assert {q.shots for q in questions.items} == {0} and questions.shortened == 0
    assert "no network" in questions.note and "no examples" in capsys.readouterr().out


def test_subsets_are_fixed_nested_and_spread(data):
    rows = load_set("mmlu", "test", **data)
    chosen = {limit: subset(rows, limit, seed=1) for limit in range(len(rows) + 1)}
    assert chosen[0] == rows == chosen[16]

    def names(rows):
        return {row["id"] for row in rows}

    for limit in range(1, 16):
        assert len(chosen[limit]) == limit and names(chosen[limit]) <= names(chosen[limit + 1])
        assert names(subset(rows[::-1], limit, seed=1)) == names(chosen[limit])
        assert abs(sum(row["category"] == "us_history" for row in chosen[limit]) - limit / 4) <= 1
    assert [row["id"] for row in chosen[5]] == sorted(names(chosen[5]), key=int)
    assert len({tuple(sorted(names(subset(rows, 5, seed)))) for seed in range(8)}) > 4


def test_choices_are_scored_marked_and_resumed(engine, data):
    questions, seen = mmlu_questions(engine, shots=1, limit=6, **data), {}
    items = choose(engine, questions, done=lambda number, item: seen.update({number: item}))
    assert items == [seen[n] for n in range(6)]
    assert [item["id"] for item in items] == [question.id for question in questions.items]
    for item, question in zip(items, questions.items):
        pairs = [(question.prompt_ids, ids) for ids in question.choices]
        scores = [score for score, _ in engine.score(pairs)]
        assert item["raw"]["logprobs"] == pytest.approx(scores, abs=1e-5)
        assert item["raw"]["given"] == "ABCD"[scores.index(max(scores))]
        assert item["correct"] == (item["raw"]["given"] == question.answer)
    first = {item["id"] for item in items[::2]}
    rest = choose(engine, questions, skip=first, done=lambda number, item: seen.pop(number))
    assert [i["id"] for i in rest] == [i["id"] for i in items[1::2]] and sorted(seen) == [0, 2, 4]
    assert [i["raw"]["given"] for i in rest] == [i["raw"]["given"] for i in items[1::2]]
    assert choose(engine, questions, skip={q.id for q in questions.items}) == []


def test_written_answers_are_marked_and_resumed(engine, data, monkeypatch):
    questions = gsm8k_questions(engine, shots=1, max_new=4, **data)
    items = solve(engine, questions)
    assert solve(engine, questions, skip={item["id"] for item in items[:4]}) == items[4:]

    written = [
        "It is 1000.",
        "#### 1001",
        "#### 1\nThen 1002.",
        "So 1,003.0.\n\nQuestion: Train 9?\nAnswer: 5",
        "",
        "1,006",
    ]

    def complete_ids(prompts, max_new, title, sampling, done, numbers, until):
        assert max_new == 4 and until == ("Question:",)
        for index in reversed(range(len(prompts))):
            done(index, engine.encode(written[index]))

    monkeypatch.setattr(engine, "complete_ids", complete_ids)
    items = solve(engine, questions)
    assert [item["correct"] for item in items] == [True, True, False, True, False, False]
    assert items[3]["raw"] == {"given": "1003", "answer": "1003", "shots": 1, "text": "So 1,003.0."}
    assert accuracy(items) == {
        "n": 6,
        "correct": 3,
        "accuracy": 0.5,
        "by_category": {"": {"n": 6, "correct": 3, "accuracy": 0.5}},
    }


def test_prompts_that_do_not_fit(tmp_path, data):
    model = write_tiny_model(tmp_path / "model", max_position_embeddings=240)
    small = Engine.open(model, mesh="data:1,fsdp:8,tensor:1", batch_size=8)
    questions = mmlu_questions(small, shots=5, limit=4, **data)
    assert (questions.left_out, questions.shortened) == (0, 4)
    assert {q.shots for q in questions.items} == {1}
    assert len(choose(small, questions)) == 4

    rows = [{"question": "How many?" * n, "answer": "#### 1"} for n in (1, 12)]
    (tmp_path / "gsm8k_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sets = {"manual_dir": str(tmp_path), "data_dir": tmp_path / "prepared"}
    questions = gsm8k_questions(small, shots=0, max_new=32, **sets)
    assert questions.left_out == len(questions.items) == len(solve(small, questions)) == 1
    with pytest.raises(
        ValueError, match="None of 2 questions fits into the model's 240 positions with 200 tokens"
    ):
        gsm8k_questions(small, shots=0, max_new=200, **sets)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"shots": 6}, "0 to 5, got 6"),
        ({"shots": -1}, "0 to 5, got -1"),
        ({"limit": -1}, "limit must be 0"),
    ],
)
def test_settings_out_of_range(engine, data, changes, message):
    with pytest.raises(ValueError, match=message):
        mmlu_questions(engine, **data, **changes)


def test_accuracy():
    items = [
        {"category": c, "correct": right}
        for c, right in [("b", True), ("a", False), ("b", False), ("b", True)]
    ]
    result = accuracy(items)
    assert (result["n"], result["correct"], result["accuracy"]) == (4, 2, 0.5)
    assert list(result["by_category"]) == ["a", "b"]
    assert result["by_category"]["b"] == {"n": 3, "correct": 2, "accuracy": 2 / 3}
    with pytest.raises(ValueError, match="no items"):
        accuracy([])
