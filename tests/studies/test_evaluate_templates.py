"""Evaluations in other templates: one that is chosen, several in one report, resumed and edited."""

import dataclasses
import json
import shutil

import pytest

from safepatch_jax.runtime.files import read_json, read_jsonl
from safepatch_jax.studies.evaluate.examples import show_examples
from safepatch_jax.studies.evaluate.options import EvaluationOptions
from safepatch_jax.studies.evaluate.study import evaluate
from tests import calls
from tests.evaluations import write_measures, write_suite

FILE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suite")
    measures = write_measures(folder)
    return write_suite(folder / "mine.json", [measures[2], measures[3]])


@pytest.fixture(scope="module")
def options(suite):
    return EvaluationOptions(suite=suite, batch_size=4)


@pytest.fixture(scope="module")
def usual(one_device, tiny, options, tmp_path_factory):
    """An evaluation in the tokenizer's template; read only."""
    out = tmp_path_factory.mktemp("usual") / "out"
    evaluate(str(tiny), out, options)
    return out


@pytest.fixture(scope="module")
def several(one_device, tiny, options, tmp_path_factory):
    """An evaluation in two templates; read only."""
    out = tmp_path_factory.mktemp("several") / "out"
    evaluate(str(tiny), out, dataclasses.replace(options, templates=("own", "plain")), str(tiny))
    return out


def files_of(out, pattern="answers/**/*.jsonl"):
    """Return the lines of files by their path below the folder, without times."""
    files = sorted(path for path in out.glob(pattern) if path.name != "speed.jsonl")
    return {str(path.relative_to(out)): read_jsonl(path) for path in files}


def test_each_template_has_answers_and_verdicts_of_its_own(usual, several):
    found, alone = files_of(several), files_of(usual)
    assert sorted(alone) == ["answers/model/look-alikes.jsonl", "answers/model/text.jsonl"]
    for name, rows in alone.items():
        place = name.replace("model/", "model/template-own/")
        assert [row["id"] for row in found[place]] == [row["id"] for row in rows]
        for row, same in zip(rows, found[place]):
            assert same.get("answer") == row.get("answer")
            assert same.get("nll", 0.0) == pytest.approx(row.get("nll", 0.0), rel=1e-5)
        plain = found[name.replace("model/", "model/template-plain/")]
        key = "answer" if "answer" in rows[0] else "nll"
        assert [row[key] for row in plain] != [row[key] for row in rows]
    verdicts = files_of(several, "verdicts/**/*.jsonl")
    assert sorted(verdicts) == [
        f"verdicts/phrases/{who}/template-{label}/look-alikes.jsonl"
        for who in ("against", "model")
        for label in ("own", "plain")
    ]


def test_one_report_has_the_templates_side_by_side(usual, several):
    content, alone = read_json(several / "report.json"), read_json(usual / "report.json")
    assert list(content["templates"]) == ["own", "plain"] and "measures" not in content
    own, plain = (part["measures"] for part in content["templates"].values())
    # The same items, and for the tokenizer's template the same figures.
    assert own[0]["models"]["model"] == alone["measures"][0]["models"]["model"]
    for name in ("nll", "perplexity"):
        value = alone["measures"][1]["models"]["model"][name]
        assert own[1]["models"]["model"][name] == pytest.approx(value, rel=1e-5)
        assert plain[1]["models"]["model"][name] != pytest.approx(value, rel=1e-5)
    assert plain[0]["paired"]["p"] == 1.0 and plain[1]["models"]["model"]["kl"] == 0.0
    text = (several / "report.md").read_text()
    assert "| measure | kind | model | own | plain |" in text
    assert text.count("| look-alikes | refusal | ") == 2 and text.count("| look-alikes | ") == 6
    assert text.count("\n## Template ") == 2 and text.count("\n# ") == 0
    assert "| plain | plain question and answer headings, without chat tokens |" in text
    for name in ("report.png", "report-own.png", "report-plain.png"):
        assert f"]({name})" in text and (several / name).read_bytes()[:4] == b"\x89PNG"


def test_the_usual_report_and_record_do_not_speak_of_templates(usual):
    record = read_json(usual / "evaluation.json")["options"]
    assert not {"template", "system", "templates"} & record.keys()
    content = read_json(usual / "report.json")
    assert (
        not {"prompts", "templates"} & content.keys()
        and "![report](report.png)" in (usual / "report.md").read_text()
    )
    assert sorted(path.name for path in usual.glob("report*")) == [
        "report.json",
        "report.md",
        "report.png",
    ]


def test_what_is_missing_of_one_template_is_answered_alone(several, tiny, options, tmp_path):
    out = shutil.copytree(several, tmp_path / "out")
    gone = out / "answers" / "model" / "template-plain" / "look-alikes.jsonl"
    lines = gone.read_text().splitlines(keepends=True)
    gone.write_text("".join(lines[:-1]))
    written = {path: path.stat().st_mtime_ns for path in out.glob("answers/**/*.jsonl")}
    options = dataclasses.replace(options, templates=("own", "plain"))
    content = evaluate(str(tiny), out, options, str(tiny))
    assert sorted(gone.read_text().splitlines(keepends=True)) == sorted(lines)
    touched = [path for path, time in written.items() if path.stat().st_mtime_ns != time]
    assert touched == [gone]
    before = read_json(several / "report.json")["templates"]
    assert json.loads(json.dumps(content["templates"])) == before


def test_templates_are_added_later_and_an_edited_one_is_asked_anew(
    several, tiny, options, tmp_path
):
    out, file = shutil.copytree(several, tmp_path / "out"), tmp_path / "mine.jinja"
    before = files_of(out)
    file.write_text(FILE)
    options = dataclasses.replace(options, templates=("plain", str(file)))
    content = evaluate(str(tiny), out, options, str(tiny))
    assert list(content["templates"]) == ["plain", "mine.jinja"]
    assert "(SHA-256 " in content["templates"]["mine.jinja"]["prompts"]
    first = files_of(out)
    assert {name: first[name] for name in before} == before and len(first) == len(before) + 4
    file.write_text(FILE.replace(": ", " says: "))
    evaluate(str(tiny), out, dataclasses.replace(options), str(tiny))
    assert len(files_of(out)) == len(first) + 4


def test_one_template_of_a_file_is_part_of_the_record(usual, tiny, options, tmp_path):
    file, out = tmp_path / "mine.jinja", tmp_path / "out"
    file.write_text(FILE)
    mine = dataclasses.replace(options, template=str(file), system="Be kind.")
    content = evaluate(str(tiny), out, mine)
    assert files_of(out).keys() == files_of(usual).keys()
    assert "template mine.jinja (SHA-256 " in content["prompts"]
    assert "Prompts are written in the template mine.jinja" in (out / "report.md").read_text()
    message = "is an evaluation with other options .*"
    with pytest.raises(ValueError, match=message + "template sha256:[0-9a-f]+ there, None here"):
        evaluate(str(tiny), out, options)
    with pytest.raises(ValueError, match=message + "system Be kind. there, None here"):
        evaluate(str(tiny), out, dataclasses.replace(mine, system=""))
    file.write_text(FILE.replace(": ", " says: "))
    with pytest.raises(ValueError, match=message + "template sha256:"):
        evaluate(str(tiny), out, dataclasses.replace(mine))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"template": "nowhere.jinja"}, "There is no template file 'nowhere.jinja'"),
        ({"templates": ("own", "plian")}, r"no template file 'plian' \(did you mean 'plain'"),
        ({"template": "plain", "templates": ("own",)}, "template plain and templates own are both"),
        ({"templates": ("plain", "own", "plain")}, "two are called plain. Give each once"),
        ({"template": "{bad}"}, "bad.jinja: the template does not render a user's message"),
        ({"templates": ("own", "{bad}")}, "bad.jinja: the template does not render a user's"),
    ],
)
def test_mistakes_show_before_anything_is_done(tiny, options, tmp_path, change, message):
    bad = tmp_path / "bad.jinja"
    bad.write_text("{{ messages | length }}")
    if "template" in change:
        change = change | {"template": change["template"].replace("{bad}", str(bad))}
    if "templates" in change:
        names = tuple(name.replace("{bad}", str(bad)) for name in change["templates"])
        change = change | {"templates": names}
    with pytest.raises(ValueError, match=message) as caught:
        evaluate(str(tiny), tmp_path / "out", dataclasses.replace(options, **change))
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_a_base_model_as_a_user_evaluates_it(tiny, suite, tmp_path):
    base = shutil.copytree(tiny, tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    flags = [f"--model={base}", f"--suite={suite}", f"--out={tmp_path / 'out'}", "--batch_size=4"]
    result = calls.call("launch.evaluate", *flags)
    assert result.returncode == 2 and "no chat template" in result.stderr
    assert "template plain" in result.stderr
    calls.done("launch.evaluate", *flags, "--template=plain", f"--out={tmp_path / 'plain'}")
    assert "plain question and answer headings" in (tmp_path / "plain" / "report.md").read_text()


def test_a_base_model_is_refused_before_it_answers_in_another_template(tiny, options, tmp_path):
    base = shutil.copytree(tiny, tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    both = dataclasses.replace(options, templates=("plain", "own"))
    with pytest.raises(ValueError, match="no chat template"):
        evaluate(str(base), tmp_path / "out", both)
    assert not (tmp_path / "out").exists()


def test_examples_are_shown_in_each_template(tiny, options):
    options = dataclasses.replace(options, templates=("own", "plain"), system="Be kind.")
    text = "\n".join(show_examples(str(tiny), options)).replace("\n  ", "\n")
    assert "look-alikes (refusal, " in text and text.count(", template plain)") == 2
    assert "<|im_start|>system\nBe kind.<|im_end|>" in text
    assert "Be kind.\n\n### Question: " in text and "### Answer:>>> Blue is a colour." in text
