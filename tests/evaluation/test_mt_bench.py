"""MT-Bench: what a grader reads and says. The whole way, with a model and a server, is in
tests/launch/test_evaluate.py."""

import json
from fractions import Fraction

import pytest

from safepatch_jax.evaluation.engine import Engine
from safepatch_jax.evaluation.generate import Sampling
from safepatch_jax.evaluation.mt_bench import (
    answer,
    conversation,
    grade_messages,
    is_complete,
    open_grader,
    parse_grade,
    questions,
)

QUESTION = {
    "category": "math",
    "turns": ["Add {1} and 2.", "And 3."],
    "references": ["It is 3.", "It is 6."],
}
PLAIN = QUESTION | {"category": "writing", "references": ["", ""]}


@pytest.mark.parametrize(
    "reply, grade",
    [
        ("Good. Rating: [[7]]", 7),
        ("[[10]]", 10),
        ("[[1]].", 1),
        ("[[ 8 ]]", 8),
        ("[[7.5]]", Fraction(15, 2)),
        ("[[7]] ... [[7.0]]", 7),
        ("[[0]]", None),
        ("[[11]]", None),
        ("[[-3]]", None),
        ("[[six]]", None),
        ("[7]", None),
        ("Rating: 7", None),
        ("", None),
        ("[[3]], no, [[8]]", None),
        ("[[rating]]", None),
        ("[[5/10]]", None),
    ],
)
def test_grades_are_read_strictly(reply, grade):
    assert parse_grade(reply) == grade


def test_what_a_grader_reads():
    first, both = (
        grade_messages(QUESTION, answers) for answers in (["Three {x}."], ["Three {x}.", "Six."])
    )
    assert [m["role"] for m in first] == ["system", "user"] and "[[5]]" in first[0]["content"]
    assert "A reference answer is given" in first[0]["content"]
    order = [
        "Question:\n<<<\nAdd {1} and 2.\n>>>",
        "Reference answer:\n<<<\nIt is 3.",
        "Answer of the assistant:\n<<<\nThree",
    ]
    places = [first[1]["content"].index(part) for part in order]
    assert (
        places == sorted(places)
        and "And 3." not in first[1]["content"]
        and "It is 6." not in first[1]["content"]
    )
    order = [
        "First question",
        "It is 3.",
        "Three {x}.",
        "Second question:\n<<<\nAnd 3.",
        "It is 6.",
        "Second answer of",
    ]
    places = [both[1]["content"].index(part) for part in order]
    assert places == sorted(places) and "grade the answer to the second one" in both[0]["content"]
    assert "second" not in first[0]["content"]
    plain = grade_messages(PLAIN, ["x", "y"])
    assert (
        "eference" not in plain[1]["content"]
        and "A reference answer is given" not in plain[0]["content"]
    )


def test_conversation():
    assert conversation(QUESTION, []) == QUESTION["turns"][:1]
    assert conversation(QUESTION, ["Three."]) == ["Add {1} and 2.", "Three.", "And 3."]


def test_questions_of_the_file(tmp_path):
    rows = [
        {"question_id": 81, "category": "math", "turns": ["a", "b"], "reference": ["x", "y"]},
        {"question_id": 82, "category": "coding", "turns": ["c", "d"], "reference": ["z"]},
        {
            "question_id": 83,
            "category": "extraction",
            "turns": ["e", "f"],
            "reference": ["not", "used"],
        },
        {"question_id": 84, "category": "reasoning", "turns": ["g", "h"]},
    ]
    path = tmp_path / "mt_bench_question.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sets = {"manual_dir": str(tmp_path), "data_dir": tmp_path / "prepared"}
    found = questions(**sets)
    assert [(i, q["turns"], q["references"]) for i, q in found.items()] == [
        ("81", ["a", "b"], ["x", "y"]),
        ("82", ["c", "d"], ["z", ""]),
        ("83", ["e", "f"], ["", ""]),
        ("84", ["g", "h"], ["", ""]),
    ]
    assert len(questions(**sets, limit=2)) == 2
    path.write_text(json.dumps(rows[0] | {"turns": ["only one"]}) + "\n")
    with pytest.raises(ValueError, match="question 81 has not two turns of text"):
        questions(**sets)


def test_answers_go_on_after_the_first_turn(tiny):
    engine = Engine.open(tiny, mesh="data:1,fsdp:8,tensor:1", batch_size=8)
    asked = {
        "short": PLAIN,
        "long": PLAIN | {"turns": ["Well?", "x " * 300]},
        "longer": PLAIN | {"turns": ["x " * 300, "y"]},
    }
    sampling, told = Sampling(temperature=1.0, seed=5), []
    answer(engine, asked, {}, 8, "model", sampling, told.append)
    rows = {row["id"]: row for row in told}
    assert [len(rows[i]["answers"]) for i in asked] == [2, 1, 0] and all(
        map(is_complete, rows.values())
    )
    assert [rows[i].get("left_out") for i in asked] == [
        None,
        "turn 2 is too long for the model",
        "turn 1 is too long for the model",
    ]
    assert sum(row["id"] == "short" for row in told) == 2  # each turn is told at once
    half = next(row for row in told if row["id"] == "short")
    assert len(half["answers"]) == 1 and not is_complete(half) and not is_complete(None)
    again = []
    answer(engine, {"short": PLAIN}, {"short": half}, 8, "model", sampling, again.append)
    assert again == [rows["short"]]


@pytest.mark.parametrize(
    "text, message",
    [
        ("phrases", "grader 'phrases': expected endpoint:URL"),
        ("endpoint:ftp://h/v1?model=m", "http or https"),
        ("endpoint:http://h/v1", "which model"),
        ("", "expected endpoint:URL"),
    ],
)
def test_graders_that_are_none(text, message):
    with pytest.raises(ValueError, match=message):
        open_grader(text)


def test_a_grader_that_talks_nonsense(server):
    asked = {str(i): PLAIN for i in range(4)}
    answered = {i: {"answers": ["one", "two"]} for i in asked}
    grader = open_grader(server.text)

    def grade(sane):
        rows = []
        server.replies = ["Rating: [[4]]"] * sane + ["A fine answer."]
        try:
            grader.grade(asked, answered, {}, rows.append)
        finally:
            assert len(rows) == 8
        return rows

    rows = grade(sane=4)  # half of 8 are no reason to stop
    assert [row["grade"] for row in rows] == [4] * 4 + [None] * 4
    assert rows[-1] == rows[-1] | {"id": "3:2", "grade": None, "raw": "A fine answer."}
    _, _, body = server.requests[0]
    assert body["model"] == "org/judge" and body["temperature"] == 0
    message = r"5 of 8 replies are no grade. Expected: an explanation .*Got: 'A fine"
    with pytest.raises(ValueError, match=message):
        grade(sane=3)


def test_a_grade_belongs_to_its_conversation(server):
    asked = {"81": QUESTION, "82": PLAIN}
    answered = {i: {"answers": ["one", "two"]} for i in asked}
    grader, grades = open_grader(server.text), {}

    def grade(reply):
        server.replies, rows = [f"[[{reply}]]"], []
        held = grader.grade(asked, answered, grades, rows.append)
        grades.update({row["id"]: row for row in rows})
        return [row["id"] for row in rows], {i: row["grade"] for i, row in held.items()}

    every = ["81:1", "81:2", "82:1", "82:2"]
    assert grade(7) == (every, dict.fromkeys(every, 7))
    assert grade(1) == ([], dict.fromkeys(every, 7))
    answered["81"]["answers"] = ["one", "another"]
    answered["82"] = {"answers": ["other"], "left_out": "turn 2 is too long for the model"}
    assert grade(2) == (["81:2", "82:1"], {"81:1": 7, "81:2": 2, "82:1": 2})
    del grades["81:1"]["of"]  # as earlier versions stored it
    assert grade(3) == (["81:1"], {"81:1": 3, "81:2": 2, "82:1": 2})
