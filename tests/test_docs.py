"""The documentation agrees with the tree: the generated page, the tests it names, links and
commands."""

from __future__ import annotations

import json
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from benchmarks import faithfulness, fit, tpu
from launch import command
from safepatch_jax.runtime.limits import LIMITS

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "BUILD.md",
    ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
ROWS = [row for group in faithfulness.read()["group"] for row in group["row"]]


def test_the_page_is_that_of_its_data_file():
    page = faithfulness.PAGE.read_text()
    assert page == faithfulness.markdown(faithfulness.read()), "python -m benchmarks.faithfulness"


def test_the_rows_of_what_fits_are_those_of_their_data_file():
    stored = json.loads((ROOT / "docs" / "fit.json").read_text())
    wanted = [fit.line(row, stored[" ".join(tpu.command(*row))]) for row in fit.ROWS]
    lines = (ROOT / "docs" / "fit.md").read_text().splitlines()
    start = lines.index(wanted[0])
    assert lines[start - 2].startswith("| config |") and len(stored) == len(wanted)
    assert [*lines[start : start + len(wanted)], ""] == [*wanted, lines[start + len(wanted)]]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["part"])
def test_cells_are_short_and_tests_exist(row):
    for column in faithfulness.COLUMNS:
        assert len(row[column].split()) <= 25, f"{column}: {row[column]}"
    for test in row["tests"]:
        file, _, function = test.partition("::")
        text = (ROOT / "tests" / file).read_text()
        assert f"\ndef {function}" in text, test


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_programs_exist(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#\s]+)", text):
        assert "://" in link or (page.parent / link).exists(), f"no such file: {link}"
    for package, module in re.findall(r"python -m (launch|benchmarks)\.(\w+)", text):
        path = ROOT / package / module
        there = path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()
        assert there, f"no such program: {package}.{module}"


def commands(page: pathlib.Path) -> list[list[str]]:
    """Return the words of every launcher command in a page's code."""
    text = page.read_text().replace("\\\n", " ")
    lines = re.findall(r"^(?:\w+=\S+ )*((?:safepatch|python -m launch\.).*)$", text, re.MULTILINE)
    lines += re.findall(r"`(?:\w+=\S+ )*((?:safepatch|python -m launch\.\w+) [^`]*)`", text)
    found = []
    for line in lines:
        words = shlex.split(line.partition(" & ")[0].partition(" #")[0].replace("$i", "0"))
        if words[0] == "python":
            words = [NAMES.get(words[2], words[2]), *words[3:]]
        else:
            words = words[1:]
        if words and words[0] in command.MODULES:
            found.append([_given(word) for word in words if _is_given(word)])
    return found


def _is_given(word: str) -> bool:
    """Tell whether a word is one that a user gives as it is or with another value."""
    return word != "..." and not word.startswith(("[", "--help"))


def _given(word: str) -> str:
    """Return a word with a number where the page has a letter for one."""
    return re.sub(r"=[NKI]$", "=1", word)


NAMES = {module: name for name, module in command.MODULES.items()}
_PARSE = """
import importlib, json, sys
from absl import flags
from safepatch_jax.runtime import config_file
importlib.import_module(sys.argv[1])
for words in json.loads(sys.argv[2]):
    flags.FLAGS.unparse_flags()
    try:
        flags.FLAGS(words)
    except flags.Error as error:
        if "must have a value" not in str(error):
            sys.exit(f"{' '.join(words)}: {error}")
    for word in words:
        if word.startswith("--config=") and "CONFIG" not in word:
            config_file.read(word.partition("=")[2])
"""


@pytest.mark.parametrize("name", [name for name in command.MODULES if name != "lm-eval"])
def test_commands_in_the_pages_are_read_by_their_launcher(name):
    """All flags are there, with values of their kinds; the configs are there."""
    given = [words for page in PAGES for words in commands(page) if words[0] == name]
    call = [sys.executable, "-c", _PARSE, command.MODULES[name], json.dumps(given)]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_readmes_commands_are_among_them():
    page = ROOT / "README.md"
    ours = r"^safepatch \w+|`(?:\w+=\S+ )*safepatch \w+ "
    shown = re.findall(ours, page.read_text(), re.MULTILINE)
    assert len(commands(page)) >= len(shown) > 8


def test_the_page_of_inputs_has_every_bound():
    page = (ROOT / "docs" / "inputs.md").read_text()
    for name, bound in LIMITS.items():
        shown = "4 GiB" if bound.default == 4 << 30 else f"{bound.default:,}"
        assert f"`SAFEPATCH_{name}` | {shown} |" in page, name
