"""What in a folder of stages is a run's, and what of it is looked at before it is used again."""

import json
import os
import shutil
import time

import pytest

from safepatch_jax.run.job import Job
from safepatch_jax.run.stages import Runner, Stage
from safepatch_jax.runtime import files
from safepatch_jax.settings import Settings
from tests.jobs import FAST, write_data

BYTES = bytes(range(200))


class Stages:
    """Two stages: 'model', which leaves the run and reads 'scores', which is scratch."""

    def __init__(self, folder):
        self.work, self.cache, self.runs = folder / "work", folder / "cache", []

    def make(self, name, out):
        self.runs.append(name)
        (out / "model").mkdir()
        (out / "model" / "weights").write_bytes(BYTES)
        return {"number": 1.5}

    def runner(self, **options):
        stages = [
            Stage("scores", lambda out: self.make("scores", out), scratch=True),
            Stage("kept", lambda out: self.make("kept", out)),
            Stage("model", lambda out: self.make("model", out), ("scores", "kept"), leaves=True),
        ]
        return Runner(stages, self.work, self.cache, **options)

    def finish(self, *names, **options):
        """Return the stages that ran."""
        self.runs = []
        self.runner(**options).finish(names or ("scores", "kept", "model"))
        return self.runs

    def file(self, name):
        return self.work / "stages" / name / "model" / "weights"


@pytest.fixture
def stages(tmp_path):
    stages = Stages(tmp_path)
    assert stages.finish() == ["scores", "kept", "model"] and stages.finish() == []
    return stages


def replace(path, *, older=False):
    """Put other bytes of the same size in a file; `older` as a copy with its time would be."""
    path.write_bytes(bytes([7]) + path.read_bytes()[1:])
    if older:
        os.utime(path, (1, 1))


@pytest.mark.parametrize("older", [False, True])
def test_replaced_weights_of_the_same_size_are_made_again(stages, capsys, older):
    replace(stages.file("model"), older=older)
    assert stages.finish() == ["model"]
    said = "model: model/weights has other bytes than its manifest says (SHA-256); the stage runs"
    assert said in capsys.readouterr().out
    assert stages.file("model").read_bytes() == BYTES and stages.finish() == []
    replace(stages.file("kept"), older=older)  # by its time, also where that was set back
    assert stages.finish() == ["kept"]


def test_verify_finds_what_size_and_times_do_not_show(stages):
    path = stages.file("kept")
    replace(path)
    os.utime(path.parents[1] / "manifest.json")  # newer than all: as if the disk had changed it
    assert stages.finish() == []
    assert stages.finish(verify=True) == ["kept"]


def test_a_workdir_that_was_copied_is_hashed_once_and_not_run_again(stages):
    shutil.copytree(stages.work, stages.work.with_name("copy"))
    stages.work = stages.work.with_name("copy")
    time.sleep(0.02)
    for path in stages.work.rglob("weights"):
        path.touch()
    assert stages.finish() == []
    newest = max(path.stat().st_mtime_ns for path in stages.work.rglob("weights"))
    for path in stages.work.rglob("manifest.json"):
        assert path.stat().st_mtime_ns >= newest, path


def test_a_manifest_of_an_earlier_version_is_taken(stages):
    for path in stages.work.rglob("manifest.json"):
        manifest = json.loads(path.read_text())
        del manifest["id"]
        files.write_json(path, manifest)
    assert stages.finish() == []


def test_a_damaged_manifest_is_said_and_its_stage_runs_again(stages, capsys):
    path = stages.work / "stages" / "kept" / "manifest.json"
    whole = json.loads(path.read_text())
    damages = ["", "{", "\xff", "[" * 200_000, json.dumps(whole)[:-40]]
    damages += [json.dumps(whole | {"outputs": 3}), json.dumps(whole | {"result": {"number": 2}})]
    damages.append(json.dumps(whole | {"outputs": {"/etc/passwd": whole["outputs"]}}))
    for text in damages:
        path.write_bytes(text.encode("latin-1"))
        assert stages.finish() == ["kept"]
        assert capsys.readouterr().out.count("kept: its manifest is damaged; the stage runs") == 1
    assert stages.runner().result("kept") == {"number": 1.5}


def test_a_stage_that_is_a_link_is_refused_and_what_it_leads_to_is_left(stages, tmp_path):
    theirs = tmp_path / "theirs"
    shutil.copytree(stages.work / "stages" / "scores", theirs)
    (theirs / "notes.txt").write_text("precious")
    shutil.rmtree(stages.work / "stages" / "scores")
    (stages.work / "stages" / "scores").symlink_to(theirs)
    before = files.folder_hashes(theirs)
    for use in (stages.finish, lambda: stages.runner().delete_scratch()):
        with pytest.raises(ValueError, match="stages/scores is a link to .* neither changed nor"):
            use()
    (stages.work / "stages" / "scores").unlink()
    shutil.move(stages.work / "stages", tmp_path / "elsewhere")
    (stages.work / "stages").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="work/stages is a link to .*elsewhere"):
        stages.finish()
    assert files.folder_hashes(theirs) == before


MINE = {
    "a file": "notes.txt",
    "a folder": "mine/notes.txt",
    "a file in a stage": "kept/notes.txt",
    "a file in its model": "kept/model/notes.txt",
    "a file in scratch": "scores/model/notes.txt",
    "a folder of a name of ours": "align/notes.txt",
    "a hidden name": ".notes.partial/notes.txt",
    "a name like that of checkpoints": ".kept.backup.steps/notes.txt",
}


@pytest.mark.parametrize("name", MINE.values(), ids=MINE)
def test_what_no_manifest_names_is_not_deleted(stages, capsys, name):
    path = stages.work / "stages" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("precious")
    stages.finish()
    stages.runner().delete_scratch()
    assert path.read_text() == "precious"
    if not name.startswith((".", "kept", "notes")):
        out = capsys.readouterr().out
        assert f"as no run has made it: {name.partition('/')[0]}" in out
    for stage in ("kept", "scores"):
        stages.work.joinpath("stages", stage, "manifest.json").unlink()
    (stages.work / "stages" / "kept" / "model" / "weights").unlink()
    if name.startswith("kept"):
        with pytest.raises(ValueError, match="stages/kept holds files that no run has made .*not"):
            stages.finish("kept")
    assert path.read_text() == "precious"


def test_a_folder_without_a_manifest_of_ours_is_refused_by_name(tmp_path):
    stages = Stages(tmp_path)
    for text in ('{"name": "a web app"}', "[]", "3"):
        path = stages.work / "stages" / "kept" / "manifest.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        with pytest.raises(ValueError, match=r"stages/kept holds files .*\(manifest.json\), and"):
            stages.finish("kept")
        assert path.read_text() == text and stages.runs == []


def test_what_killed_runs_and_other_settings_left_is_deleted(stages):
    folder = stages.work / "stages"
    shutil.copytree(folder / "kept", folder / "evaluate_other")
    replaced = ".scores.0123abcd-99.a1b2c3d4.old"
    for name in (".kept.0123abcd-99.a1b2c3d4.partial", f".kept.{'0' * 16}.steps", replaced):
        (folder / name).mkdir()
        (folder / name / "x").write_text("")
    runner = stages.runner()
    assert folder / replaced in runner.scratch_left()
    runner.delete_scratch()
    assert [path.name for path in runner.scratch_left()] == []
    left = sorted(path.name for path in folder.iterdir())
    assert left == [".kept.lock", ".model.lock", ".scores.lock", "kept", "model", "scores"]
    assert [path.name for path in (folder / "scores").iterdir()] == ["manifest.json"]


def test_an_unusable_cache_names_the_setting_and_nothing_is_made(tmp_path):
    (tmp_path / "file").write_text("")
    cache = str(tmp_path / "file" / "cache")
    own = {"model.source": str(tmp_path), "run.cache_dir": cache}
    settings = Settings().override(FAST | write_data(tmp_path) | own)
    with pytest.raises(ValueError, match="file is no folder. Give .* with --run.cache_dir") as e:
        Job(settings, tmp_path / "work")
    assert cache in str(e.value) and not (tmp_path / "work").exists()


FOREIGN = {
    "of another program": '{"editor.tabSize": 4}',
    "empty": "{}",
    "some groups": '{"patch": {"beta": 2}, "derive": {}}',
    "no JSON": "tabs = 4",
    "a list": "[1]",
    "nested": "[" * 100_000,
}


@pytest.mark.parametrize("text", FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("update", [False, True])
def test_settings_that_no_run_wrote_are_refused_also_with_update(tmp_path, tiny, text, update):
    settings = Settings().override({"model.source": str(tiny)} | write_data(tmp_path))
    work = tmp_path / "work"
    (work / "stages" / "derive_se").mkdir(parents=True)
    (work / "settings.json").write_text(text)
    (work / "stages" / "derive_se" / "notes.txt").write_text("precious")
    (work / "report.md").write_text("precious")
    before = files.folder_hashes(work)
    with pytest.raises(ValueError, match=r"settings\.json .*Copy settings.json back from a backup"):
        Job(settings, work, update=update)
    assert files.folder_hashes(work) == before
