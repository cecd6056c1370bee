"""The report of an evaluation: names of models, and whatever measures there are."""

import json

import pytest

from safepatch_jax.evaluation.judges.base import UNKNOWN, Verdict
from safepatch_jax.evaluation.suites import Measure
from safepatch_jax.studies.evaluate import side_by_side
from safepatch_jax.studies.evaluate.report import ending_rows, gather, labels, write

TASKS = ("mmlu", "gsm8k")
ROWS = {
    "harm": {"answer": "x"},
    "refusal": {"answer": "x"},
    "text": {"nll": 3.0, "tokens": 2},
    "mmlu": {"correct": True, "category": "x"},
    "gsm8k": {"correct": True, "category": ""},
    "mt_bench": {"answers": ["x", "y"]},
}
VERDICTS = {"harm": Verdict("complied"), "refusal": Verdict("refused")}


@pytest.mark.parametrize(
    "folders, names",
    [
        (("/x/patched", "/y/backbone/"), ["patched", "backbone"]),
        (("/x/model", "/y/backbone"), ["x/model", "backbone"]),
        (("/x/model", "/y/model"), ["x/model", "y/model"]),
        (("/x/chat", "/y/chat"), ["x/chat", "y/chat"]),
        (("/1/x/chat", "/2/x/chat"), ["x/chat", "x/chat (against)"]),
        (("/x/chat", "/x/chat"), ["x/chat", "x/chat (against)"]),
        (("/x/model",), ["x/model"]),
        (("/model",), ["model"]),
        (("/x/y/..",), ["x"]),
    ],
)
def test_labels(folders, names):
    assert list(labels(dict(zip(("model", "against"), folders))).values()) == names


def a_measure(kind):
    source = f"set:{kind}@test" if kind in (*TASKS, "mt_bench") else "builtin"
    return Measure(f"of {kind}", kind, source)


def answers_of(kind, ids):
    rows = dict.fromkeys(ids, ROWS[kind]) | {"long": {"left_out": "too long"}}
    if kind in TASKS:
        rows["complete"] = {"left_out": 2, "shortened": 1, "note": "no examples"}
    return rows


def grades_of(ids):
    grades = {}
    for i in ids:
        grades |= {f"{i}:1": {"grade": 7.5}, f"{i}:2": {"grade": 7.5}}
    return grades


def content_of(kinds, ids, models):
    """Return the content of a report on measures of some kinds, each with the same ids."""
    suite = [a_measure(kind) for kind in kinds]
    items, answers, verdicts, grades = {}, {}, {"one": {}, "two": {}}, {}
    for measure in suite:
        items[measure.name] = {i: {"category": "c"} for i in (*ids, "?")}
        for model in models:
            key = (model, measure.name)
            answers[key] = [answers_of(measure.kind, ids)]
            grades[key] = [grades_of(ids)]
            if measure.kind in VERDICTS:
                rows = dict.fromkeys(ids, VERDICTS[measure.kind]) | {"?": Verdict(UNKNOWN)}
                verdicts["one"][key] = verdicts["two"][key] = [rows]
    about = {
        "models": {model: model for model in models},
        "options": {"temperature": 0.0},
        "judges": ["one", "two"],
        "grader": "three",
    }
    return gather(suite, items, answers, verdicts, dict.fromkeys(models), about, grades)


@pytest.mark.parametrize(
    "kinds",
    [("harm",), ("refusal", "text"), ("mmlu",), ("harm", "refusal", "gsm8k"), ("mt_bench",)],
)
@pytest.mark.parametrize("n", [0, 3, 127])
def test_a_report_of_any_measures(kinds, n, tmp_path):
    """One kind alone, nothing that counts, or all (the end of an interval is then 1e-16 below the
    share)."""
    for models in ("model",), ("model", "against"):
        content = content_of(kinds, [str(i) for i in range(n)], models)
        write(content, tmp_path)
        json.loads(
            (tmp_path / "report.json").read_text(),
            parse_constant=lambda x: pytest.fail(f"{x} is no JSON"),
        )
        for measure in content["measures"]:
            kind, row = measure["kind"], measure["models"]["model"]
            assert row["n"] == n and row["left_out"] == 1 + (kind in TASKS)
            if kind == "mt_bench":
                assert row["mean"] == (7.5 if n else None)
            elif kind != "text":
                assert row["rate"] == (1.0 if n else None)
            if kind in VERDICTS:
                assert {"complied", "refused", "incoherent"} < row.keys()


def test_dollars_in_names_set_no_mathematics(tmp_path):
    content = content_of(("harm", "refusal", "text"), ["1", "2"], ("model", "against"))
    content["models"] = {"model": "$$", "against": "$x_$"}
    for measure in content["measures"]:
        measure["name"] += " ($^$)"
        for x in measure["models"].values():
            x["categories"] = {"Fraud ($$)": [1, 2, 0.1, 0.9], "cheap, $5": [1, 2, 0.1, 0.9]}
    write(content, tmp_path)
    assert (tmp_path / "report.png").stat().st_size > 1000


def test_the_console_has_the_test_of_means_over_seeds():
    """The difference has an interval where single answers are compared, as in MMLU's one run."""
    suite, ids = [a_measure("harm"), a_measure("mmlu")], [str(i) for i in range(12)]
    items = {suite[0].name: {i: {"category": "", "prompt": "?", "answer": ""} for i in ids}}
    answers, verdicts = {}, {}
    for who, outcome in (("model", "refused"), ("against", "complied")):
        runs = [dict.fromkeys(ids, Verdict(outcome)) for _ in range(2)]
        runs[1]["0"] = Verdict("refused")  # of the other model's too
        verdicts[who, suite[0].name] = runs
        answers[who, suite[0].name] = [dict.fromkeys(ids, {"answer": "x"})] * 2
        right = {"correct": who == "model", "category": ""}
        rows = dict.fromkeys(ids, right) | {"complete": answers_of("mmlu", [])["complete"]}
        answers[who, suite[1].name] = [rows]
    about = {"models": {who: who for who in ("model", "against")}, "judges": ["one"]}
    about |= {"options": {"temperature": 0.7}, "seeds": [0, 1]}
    content = gather(suite, items, answers, {"one": verdicts}, {}, about, {})
    harm, mmlu = ending_rows(content)
    assert harm[3:] == ("-96 points", "fewer (p = 0.00049)")
    assert mmlu[3:] == ("+100 points [+59, +100]", "more (p = 0.00049)")
    for m in content["measures"]:
        assert m["paired"]["p"] == pytest.approx(2 / 2**12)


@pytest.mark.parametrize("n", [0, 3])
def test_a_report_of_several_templates_has_any_measures(n, tmp_path):
    ids = [str(i) for i in range(n)]
    kinds = ("harm", "refusal", "text", "mmlu", "mt_bench")
    contents = {}
    for label in ("own", "mine.jinja"):
        contents[label] = content_of(kinds, ids, ("model", "against")) | {"prompts": f"<{label}>"}
    content = side_by_side.merge(contents)
    side_by_side.write(content, tmp_path)
    for name in ("report.png", "report-own.png", "report-mine.jinja.png"):
        assert (tmp_path / name).stat().st_size > 1000
    text = (tmp_path / "report.md").read_text()
    assert "| mine.jinja | \\<mine.jinja\\> |" in text
    table = text.partition("| measure | kind | model | own | mine.jinja |\n")[2].partition("\n\n")[
        0
    ]
    cells = [line.strip("| ").split(" | ") for line in table.split("\n")[1:]]
    assert [row[1] for row in cells] == [kind for kind in kinds for _ in range(2)]
    shown = {row[1]: row[3] for row in cells}
    assert all(row[3] == row[4] for row in cells)
    if n:
        assert shown["text"] == "perplexity 4.48" and shown["mt_bench"].startswith("7.50 [")
        assert shown["harm"].startswith("100.0% [") and shown["mmlu"].startswith("100.0% [")
    else:
        assert set(shown.values()) == {"none judged", "none scored", "none graded"}


def test_three_outcomes_and_content_without_a_judge(tmp_path):
    """A judge of content has a column more; the proxy is there where records have references."""
    measure = a_measure("harm")
    reference = "Fold grey cardboard sheets into crooked paper cranes."
    items = {i: {"category": "c", "prompt": "How?", "answer": reference} for i in "abcdefghi"}
    items["j"] = {"category": "c", "prompt": "How?", "answer": ""}
    outcomes = dict.fromkeys("defghij", "refused")
    outcomes |= {"a": "complied", "b": "harmless", "c": "harmless"}
    texts = {"model": "Crooked cranes.", "against": "Fold crooked paper cranes."}
    answers = {(who, measure.name): [{i: {"answer": texts[who]} for i in items}] for who in texts}
    verdicts = {key: [{i: Verdict(x) for i, x in outcomes.items()}] for key in answers}
    about = {"models": {who: who for who in texts}, "options": {"temperature": 0.0}}
    report = {}
    for sees, judges in ((True, ["one"]), (False, [])):
        more = about | {"judges": ["one"], "judges_of_content": judges}
        content = gather([measure], {measure.name: items}, answers, {"one": verdicts}, {}, more, {})
        write(content, tmp_path)
        report[sees] = (tmp_path / "report.md").read_text()
    (row,) = content["measures"]
    x = row["models"]["model"]
    assert (x["rate"], x["n"], x["harmless"], x["refused"]) == (0.1, 10, 2, 7)
    assert "| refused | harmless | incoherent |" in report[True]
    assert "| of harm | model | 10 | 10.0% [1.8-40.4] | 1 | 7 | 2 | 0 | 0 |" in report[True]
    assert "## Harm: answers with harmful content" in report[True]
    assert "The judge sees content: complied are answers that hold harmful" in report[True]
    assert "| refused | incoherent |" in report[False] and "| 1 | 7 | 0 | 0 |" in report[False]
    assert "The judge sees refusals alone" in report[False]
    assert "## Harm: harmful requests complied with" in report[False]
    # two and four of the reference's seven rare words ('into' is in many ordinary answers)
    ours, theirs = row["content"]["model"], row["content"]["against"]
    assert (ours["n"], ours["mean"], theirs["mean"]) == (
        9,
        pytest.approx(2 / 7),
        pytest.approx(4 / 7),
    )
    assert ours["difference"]["n"] == 9
    assert [ours["difference"]["mean"], *ours["difference"]["interval"]] == [
        pytest.approx(-2 / 7)
    ] * 3
    assert "difference" not in theirs
    for text in report.values():
        assert "| of harm | model | 9 | 28.6% [28.6-28.6] | -28.6 [-28.6 to -28.6] |" in text
        assert "| of harm | against | 9 | 57.1% [57.1-57.1] |  |" in text
    few = items | dict.fromkeys("hi", items["j"])  # seven records with a reference
    content = gather([measure], {measure.name: few}, answers, {"one": verdicts}, {}, more, {})
    assert "content" not in content["measures"][0]
