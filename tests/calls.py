"""The launchers, called as a user calls them, each in a process of its own."""

import pathlib
import signal
import subprocess
import sys
import tempfile
import threading

from benchmarks.readme_commands import stray

ROOT = pathlib.Path(__file__).parents[1]


def command(launcher, *args):
    return [sys.executable, "-m", launcher, *map(str, args)]


def call(launcher, *args):
    return subprocess.run(
        command(launcher, *args), cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def done(launcher, *args):
    """Return the output of a launcher that ends well, and writes bars alone to stderr."""
    result = call(launcher, *args)
    assert result.returncode == 0, result.stderr
    assert stray(result.stderr) == []
    return result.stdout


def call_and_kill(line, launcher, *args):
    """Kill a launcher as soon as it prints a line that begins so."""
    code, _ = call_and_signal(line, signal.SIGKILL, launcher, *args)
    assert code == -signal.SIGKILL


def call_and_signal(line, number, launcher, *args):
    """Send a launcher a signal as soon as it prints a line that begins so; return its exit code
    and what it wrote to stderr."""
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command(launcher, *args), cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        late = threading.Timer(300, process.kill)
        late.start()
        begun = any(text.startswith(line) for text in process.stdout)
        process.send_signal(number)
        process.stdout.read()
        code = process.wait()
        late.cancel()
        errors.seek(0)
        text = errors.read()
        assert begun, text
    return code, text
