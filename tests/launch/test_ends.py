"""How launchers end: mistakes of a command line, Ctrl-C, SIGTERM; one line, and an exit code."""

import os
import signal
import subprocess
import sys

import pytest

from tests.calls import ROOT, call, call_and_signal

ENDINGS = {
    signal.SIGINT: (130, "error: interrupted by Ctrl-C. "),
    signal.SIGTERM: (143, "error: ended by SIGTERM. "),
}
KEPT = "what was finished is kept; the same command goes on from there."
in_front = pytest.mark.skipif(
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN,
    reason="the tests run in the background, where no program gets Ctrl-C: run them in front",
)
SWEEP = "--grid=patch.beta=1,2;patch.alpha=1,2"


def errors_of(result):
    return [line for line in result.stderr.splitlines() if line.startswith("error:")]


@pytest.fixture(scope="module")
def works(tmp_path_factory):
    """Each command goes on from where the one before was ended."""
    return tmp_path_factory.mktemp("works")


@pytest.mark.parametrize(
    "launcher, line, more, number",
    [
        ("safepatch", "derive_se: running", [], signal.SIGINT),
        ("safepatch", "derive_se: running", [], signal.SIGTERM),
        ("safepatch", "score_osm: running", [], signal.SIGINT),
        ("safepatch", "score_osm: running", [], signal.SIGTERM),
        ("sweep", "[1/4] ", [SWEEP], signal.SIGINT),
        ("sweep", "[1/4] ", [SWEEP], signal.SIGTERM),
    ],
)
def test_a_signal_ends_a_command_with_one_line(flags, works, launcher, line, more, number):
    args = (f"launch.{launcher}", f"--workdir={works / launcher}", *flags, *more)
    code, text = call_and_signal(line, number, *args)
    expected, beginning = ENDINGS[number]
    last = text.splitlines()[-1]
    assert code == expected and last.startswith(beginning) and last.endswith(KEPT), text
    assert "Traceback" not in text and "ignored in" not in text


@in_front
@pytest.mark.parametrize("launcher", ["safepatch", "patch"])
def test_ctrl_c_while_modules_are_imported(tmp_path, launcher):
    """The first module that a launcher imports sends the signal to its own process."""
    (tmp_path / "absl").mkdir()
    code = "import os, signal; os.kill(os.getpid(), signal.SIGINT); raise ImportError"
    (tmp_path / "absl" / "__init__.py").write_text(code)
    result = subprocess.run(
        [sys.executable, "-m", f"launch.{launcher}"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 130, result.stderr
    assert result.stderr == "error: interrupted by Ctrl-C before anything was done.\n"


@in_front
def test_another_program_that_imports_a_launcher_keeps_its_ctrl_c():
    code = "import signal, launch; print(signal.getsignal(2) is signal.default_int_handler)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "True\n"


@pytest.mark.parametrize(
    "launcher, args, message",
    [
        ("safepatch", [], "--workdir is needed. See --help."),
        ("safepatch", ["--workdri=x"], "there is no flag --workdri. Did you mean --workdir?"),
        ("patch", ["inspect", "--factor=many", "--patch=x"], "--factor=many"),
        ("safepatch", ["--workdir=w", "--patch.merge=tyes"], "--patch.merge=tyes: value should be"),
        ("patch", ["inspect", "--patch=ftp://b/p.safetensors"], "ftp:// is not supported"),
        ("inspect", ["--model="], "A path is empty"),
        ("patch", ["inspect", "--patch=a\x1b[2J\nerror: all is well"], r"'a\x1b[2J\nerror: all"),
        ("patch", ["inspect", "--patch=" + "x" * 100_000], "more characters"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(launcher, args, message):
    result = call(f"launch.{launcher}", *args)
    (line,) = errors_of(result)
    assert result.returncode == 2 and message in line and len(line) < 2200
    assert "Traceback" not in result.stderr


def test_help_is_no_mistake():
    result = call("launch.patch", "--help")
    assert result.returncode == 0 and "python -m launch.patch create" in result.stdout


CONFIGS = {
    "CONFIG = {": "line 1: ",
    "import os\n\nCONFIG = {'run': {'seed': 1 / 0}}": "line 3: ZeroDivisionError",
    "import nowhere_to_be_found": "ModuleNotFoundError",
    "raise SystemExit(0)": "line 1: SystemExit",
    "CONFIG = []": "expected a dictionary",
    "CONFIG = {'run': 3}": "'run' must hold a dictionary",
    "CONFIG = {3: {}, 'patch': {4: 5}}": "unknown setting 'patch.4'",
    "x = 1": "defines no CONFIG",
}


@pytest.mark.parametrize("code", CONFIGS)
def test_a_config_that_fails_names_its_line(tmp_path, code):
    (tmp_path / "c.py").write_text(code)
    result = call("launch.safepatch", "--workdir=w", f"--config={tmp_path / 'c.py'}")
    (line,) = errors_of(result)
    assert result.returncode == 2 and str(tmp_path / "c.py") in line and CONFIGS[code] in line


def test_devices_that_are_not_there(tmp_path):
    script = (
        "import os, runpy, sys; os.environ['JAX_PLATFORMS'] = 'cuda'; import launch; "
        f"sys.argv = ['x', '--model.source=/nowhere', '--workdir={tmp_path / 'w'}']; "
        "runpy.run_module('launch.safepatch', run_name='__main__')"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    (line,) = errors_of(result)
    assert result.returncode == 2 and "JAX_PLATFORMS=cuda" in line and "JAX_PLATFORMS=cpu" in line
    assert "Traceback" not in result.stderr


ENDING = '''"""A launcher."""
import atexit

from launch import main


class Kept:
    def __del__(self):
        print("taken apart")


kept = Kept()


def run():
    atexit.register(print, "registered")
    print("done")
    {end}


if __name__ == "__main__":
    main.run(run)
'''


@pytest.mark.parametrize(
    "end, code, error",
    [
        ("return 3", 3, ""),
        ("return None", 0, ""),
        ("raise ValueError('bad')", 2, "error: bad"),
        ("raise SystemExit('text')", 1, "text"),
        ("raise TypeError('a fault')", 1, "TypeError: a fault"),
    ],
)
def test_what_was_registered_runs_at_the_end_and_the_exit_code_stays(tmp_path, end, code, error):
    result = ended(tmp_path, end, "ending.py")
    assert (result.returncode, result.stdout.splitlines()[:2]) == (code, ["done", "registered"])
    assert error in result.stderr


@pytest.mark.parametrize(
    "command, taken",
    [
        (["ending.py"], False),
        (["-c", "import ending; ending.main.run(ending.run)"], True),
        (["-c", "import runpy, coverage; runpy.run_path('ending.py', run_name='__main__')"], True),
    ],
    ids=["program", "library", "watched"],
)
def test_a_program_that_nobody_watches_is_not_taken_apart(tmp_path, command, taken):
    (tmp_path / "coverage.py").write_text("")
    result = ended(tmp_path, "return 3", *command)
    assert result.returncode == 3
    assert ("taken apart" in result.stdout) == taken


def ended(tmp_path, end, *command):
    (tmp_path / "ending.py").write_text(ENDING.format(end=end))
    return subprocess.run(
        [sys.executable, *command],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"},
        capture_output=True,
        text=True,
    )


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
def test_output_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "ending.py").write_text(ENDING.format(end="return 3"))
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    env.pop("PYTHONUNBUFFERED", None)  # written at the end, when the launcher has returned
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "ending.py"],
            cwd=tmp_path,
            env=env,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert result.returncode == 120 and "No space left" in result.stderr
