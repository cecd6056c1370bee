"""The documentation agrees with the tree: the generated page, the tests it names, links and
commands."""

from __future__ import annotations

import pathlib
import re

import pytest

from benchmarks import faithfulness
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


def test_the_page_of_inputs_has_every_bound():
    page = (ROOT / "docs" / "inputs.md").read_text()
    for name, bound in LIMITS.items():
        shown = "4 GiB" if bound.default == 4 << 30 else f"{bound.default:,}"
        assert f"`SAFEPATCH_{name}` | {shown} |" in page, name
