"""Runs in another template than the tokenizer's own: stage keys, and what card and settings say."""

import hashlib
import shutil

import pytest

from safepatch_jax.outcome import outcome_settings, settings_differences
from safepatch_jax.patch_file.file import PatchFile
from safepatch_jax.run.job import Job, open_run
from safepatch_jax.runtime.files import read_json, write_json
from safepatch_jax.settings import Settings
from safepatch_jax.testing import write_tiny_model
from tests.jobs import FAST, stages_run, write_data

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
IMPORTS = {"import", "certify_import"}
pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    folder = tmp_path_factory.mktemp("formats")
    base = write_tiny_model(folder / "base")
    return Settings().override(
        FAST
        | write_data(folder)
        | {
            "model.source": str(base),
            "run.cache_dir": str(folder / "cache"),
            "align.enabled": True,
        }
    )


@pytest.fixture
def template(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text(TEMPLATE)
    return path


def keys_of(settings, folder):
    runner = open_run(settings, folder).runner
    return {name: runner.key(name) for name in runner.stages}


def changed(before, after):
    return {name for name, key in before.items() if after[name] != key}


def test_the_format_is_in_the_key_of_every_stage_that_writes_prompts(own, template, tmp_path):
    usual = keys_of(own, tmp_path)
    assert keys_of(own.override({"data.template": "own"}), tmp_path) == usual
    every = usual.keys() - IMPORTS
    for change in ({"data.template": "plain"}, {"data.system": "Be kind."}):
        assert changed(usual, keys_of(own.override(change), tmp_path)) == every
    asks = {name for name in usual if name.startswith("evaluate_")}
    for change in ({"evaluate.thinking": "skip"}, {"evaluate.think_tokens": 8}):
        assert asks <= changed(usual, keys_of(own.override(change), tmp_path)) <= asks | {"report"}
    given = keys_of(own.override({"data.template_kwargs": "x=1"}), tmp_path)
    assert changed(usual, given) == every
    same = keys_of(own.override({"data.template_kwargs": '{"x": 1}'}), tmp_path)
    assert changed(given, same) == set()
    mine = own.override({"data.template": str(template)})
    before = keys_of(mine, tmp_path)
    assert changed(usual, before) == every
    template.write_text(TEMPLATE + " ")
    assert changed(before, keys_of(mine, tmp_path)) == every
    # The same text under another name is the same template; the report has the name.
    moved = template.with_name("moved.jinja")
    moved.write_text(TEMPLATE)
    renamed = keys_of(own.override({"data.template": str(moved)}), tmp_path)
    assert changed(before, renamed) == {"report"}


def test_a_file_that_is_no_template_ends_before_anything_is_done(own, tmp_path):
    mine = own.override({"data.template": str(tmp_path / "nowhere.jinja")})
    with pytest.raises(ValueError, match="There is no template file '.*nowhere.jinja'"):
        Job(mine, tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_records_from_before_the_settings_go_on(own, tmp_path):
    old = own.to_dict()
    for name in ("template", "system"):
        del old["data"][name]
    assert settings_differences(old, own.to_dict()) == []
    plain = own.override({"data.template": "plain"})
    assert settings_differences(old, plain.to_dict()) == ['data.template: "" -> "plain"']
    assert settings_differences(plain.to_dict(), own.to_dict())
    assert not {"data.template", "data.system"} & outcome_settings(own).keys()
    assert outcome_settings(plain)["data.template"] == "plain"
    write_json(tmp_path / "work" / "settings.json", old)
    Job(own, tmp_path / "work")
    with pytest.raises(ValueError, match='other settings: data.template: "" -> "plain"'):
        Job(plain, tmp_path / "work")


def test_a_run_of_a_base_model_in_a_template_of_a_file(own, template, tmp_path, capsys):
    base = shutil.copytree(own.model.source, tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    change = {"model.source": str(base), "align.enabled": False}
    with pytest.raises(ValueError, match="no chat template.*--data.template=plain"):
        Job(own.override(change), tmp_path / "none").run()
    change |= {"data.template": str(template), "data.system": "Be kind, *always*."}
    mine = own.override(change)
    job = Job(mine, tmp_path / "work")
    shown = job.examples(1)
    assert "user: harmful 0\nassistant: " in shown[1].replace("\n  ", "\n")
    assert "system: Be kind, *always*." in shown[1]
    job.run()
    export, sha256 = job.state.folder("export"), hashlib.sha256(TEMPLATE.encode()).hexdigest()
    card = (export / "README.md").read_text()
    described = f"the template mine.jinja (SHA-256 {sha256}), after the system message 'Be kind,"
    assert described.replace("_", r"\_") + r" \*always\*.'" in card
    assert "were not written as that template alone" in card and str(tmp_path) not in card
    settings = read_json(job.workdir / "settings.json")["data"]
    assert settings["template"] == str(template) and settings["system"] == "Be kind, *always*."
    report = (job.workdir / "report.md").read_text()
    assert "mine.jinja" in report and r"Be kind, \*always\*." in report
    assert not (export / "chat_template.jinja").exists()
    prompts = PatchFile(job.state.patch_file).about["prompts"]
    assert prompts == {"template": f"sha256:{sha256}", "system": "Be kind, *always*."}
    capsys.readouterr()
    template.write_text(TEMPLATE.replace(": ", " says: "))
    Job(mine, tmp_path / "work").run()
    ran = stages_run(capsys.readouterr().out)
    assert {"derive_se", "score_osm", "evaluate_backbone", "report"} <= set(ran)
    assert "import" not in ran
