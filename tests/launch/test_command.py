"""The command safepatch: sub-commands, manuals, completion; the package that installs it."""

import os
import subprocess
import sys
import zipfile

import pytest

from launch import command
from tests.calls import ROOT, call


def safepatch(*args):
    return call("launch", *args)


def test_the_overview_names_every_launcher():
    result = safepatch("--help")
    assert result.returncode == 0 and safepatch().stdout == result.stdout
    helpers = {"flags", "kinds", "main", "manual", "measuring", "options", "distributed", "command"}
    helpers.add("profiling")
    launchers = {path.stem for path in (ROOT / "launch").glob("[a-z]*.py")} - helpers
    assert {f"launch.{name}" for name in launchers} == set(command.MODULES.values())
    for name in command.MODULES:
        assert f"\n  {name} " in result.stdout


def test_a_sub_command_is_its_launcher():
    result = safepatch("run", "--help")
    assert result.returncode == 0
    assert "safepatch run --config=configs/demo.py --workdir=runs/demo" in result.stdout
    first, _, rest = result.stdout.partition("More settings, shown by --help_all:")
    for name in ("config", "workdir", "model.source", "data", "merge", "[no]dry_run"):
        assert f"\n  --{name}" in first
    assert "\n  --patch.retention" not in first and "patch: which entries are kept" in rest
    assert all(len(line) <= 100 for line in result.stdout.splitlines())
    piped = f'"{sys.executable}" -m launch run --help_all | head -1'
    head = subprocess.run(["bash", "-c", piped], cwd=ROOT, capture_output=True, text=True)
    assert head.stdout.startswith("Patch a chat model") and head.stderr == ""
    everything = safepatch("run", "--help_all").stdout
    assert "--patch.retention\n      p: probability" in everything and "[0.3]" in everything
    refused = safepatch("patch", "aply")
    assert refused.returncode == 2 and "one command is needed, got aply" in refused.stderr


@pytest.mark.parametrize(
    "args, message",
    [
        (["evalute"], "there is no sub-command 'evalute' (did you mean 'evaluate'?)"),
        (["completion", "tcsh"], "completion needs one of bash, zsh, fish"),
        (["run", "--wrkdir=x"], "Did you mean --workdir"),
        (["run", "--config=dmo", "--workdir=x"], "No config file 'dmo'. Give the path"),
    ],
)
def test_mistakes(args, message):
    result = safepatch(*args)
    assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr


def test_completion():
    assert command.matches(["ev"]) == ["evaluate"]
    assert {"run", "patch", "--version"} <= set(command.matches([""]))
    assert command.matches(["completion", "x"]) == []
    result = safepatch("--complete", "evaluate", "--m")
    assert "--model=" in result.stdout.split() and "--help" not in result.stdout
    script = safepatch("completion", "bash").stdout
    ready = f"{script}\nCOMP_WORDS=(safepatch ru) COMP_CWORD=1; _safepatch; echo ${{COMPREPLY[@]}}"
    body = f'safepatch() {{ "{sys.executable}" -m launch "$@"; }}\n{ready}'
    done = subprocess.run(["bash", "-c", body], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["run"], done.stderr
    # bash splits at =, and how it does so is the user's own.
    ready = f"{script}\nCOMP_WORDS=(safepatch run --config = pyproj) COMP_CWORD=4; _safepatch"
    shown = 'echo "${COMPREPLY[@]}|$COMP_WORDBREAKS"'
    body = f"before=$COMP_WORDBREAKS\n{ready}; {shown}; [[ $before == $COMP_WORDBREAKS ]]"
    done = subprocess.run(["bash", "-c", body], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("pyproject.toml|"), done.stderr
    assert "COMP_WORDBREAKS" not in script


def test_a_wheel_has_what_is_needed_away_from_the_clone(tmp_path):
    """Built from this tree, unpacked elsewhere, and used there."""
    pytest.importorskip("setuptools", minversion="77", reason="builds: pip install setuptools")
    build = "import setuptools.build_meta, sys; setuptools.build_meta.build_wheel(sys.argv[1])"
    source = tmp_path / "source"
    source.mkdir()
    for name in ("safepatch_jax", "launch", "configs"):
        (source / name).symlink_to(ROOT / name)
    for name in ("pyproject.toml", "requirements.txt", "README.md"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    made = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], cwd=source, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        metadata = file.read(next(n for n in names if n.endswith("METADATA"))).decode()
        file.extractall(tmp_path / "site")
    kept = subprocess.run(
        ["git", "ls-files", "safepatch_jax", "configs", "launch/*.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert set(kept) <= names
    assert "Requires-Dist: jax<0.13,>=0.10.2" in metadata and 'extra == "test"' in metadata
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    shown = subprocess.run(
        [sys.executable, "-m", "launch", "run", "--config=demo", "--workdir=w", "--model.source=x"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert shown.returncode == 2 and f"No model folder '{tmp_path / 'x'}'" in shown.stderr
