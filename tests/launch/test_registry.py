"""launch.registry as a user calls it: each command once, and mistakes."""

import functools

import pytest

from tests import calls
from tests.patch_file.chains import assert_bits
from tests.registry.lines import without, write_line

call = functools.partial(calls.call, "launch.registry")
done = functools.partial(calls.done, "launch.registry")


def test_every_command(tmp_path):
    line = write_line(tmp_path / "line")
    place = f"--registry={tmp_path / 'registry'}"
    for name in "abc":
        assert f"{name}@" in done("add", place, f"--patch={line / name}.patch", f"--name={name}")
    assert len(done("list", place).splitlines()) == 3
    assert "name: b" in done("show", "b", place)
    assert "c@" in done("verify", place)
    done("pull", "a", place, f"--out={tmp_path / 'pulled'}")
    assert "They commute, exactly" in done("conflicts", "a", "b", place, f"--model={line / 'a'}")
    files = line / "a.patch", line / "d.patch"
    assert "1 entries are changed by both" in done("conflicts", *files)
    assert " is now c@" in done("remove", "b", place, f"--model={line / 'start'}")
    done("apply", "c", place, f"--model={line / 'start'}", f"--out={tmp_path / 'out'}")
    assert_bits(tmp_path / "out", without(line, "b", "d"))


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "one command is needed, none was given. There are add, list, show"),
        (["show", "--registry=x"], "show takes 1 patch after it, got ''"),
        (["list", "--registry=x", "--model=y"], "list does not take --model"),
        (["list", "--registry=/nowhere"], "There is no registry at /nowhere"),
        (
            ["apply", "a", "--registry=x", "--model=gs://bucket/c"],
            "is not changed in place: give a new",
        ),
    ],
)
def test_mistakes_end_with_one_clear_line(words, message):
    result = call(*words)
    assert result.returncode == 2 and message in result.stderr
    assert len(result.stderr.splitlines()) == 1
