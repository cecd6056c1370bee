"""Write docs/faithfulness.md, the paper against this implementation, from docs/faithfulness.toml.

  python -m benchmarks.faithfulness

tests/test_docs.py checks that the page is up to date, its cells are short and its tests exist.
"""

from __future__ import annotations

import pathlib
import tomllib
from typing import Any

DOCS = pathlib.Path(__file__).parents[1] / "docs"
SOURCE, PAGE = DOCS / "faithfulness.toml", DOCS / "faithfulness.md"
COLUMNS = ("part", "paper", "here", "setting", "differs")


def read() -> dict[str, Any]:
    """Read the data file: title, intro, outro, and groups of rows."""
    return tomllib.loads(SOURCE.read_text())


def markdown(content: dict[str, Any]) -> str:
    """Write the page: a table for each group, between the data file's two texts."""
    parts = [
        f"# {content['title']}\n\n"
        "Written by `python -m benchmarks.faithfulness` from `faithfulness.toml`: edit that file.",
        content["intro"].strip(),
    ]
    for group in content["group"]:
        lines = ["| part | paper says | here | setting | differs | test |", "|---" * 6 + "|"]
        lines += [_line(row) for row in group["row"]]
        parts.append(f"## {group['title']}")
        if "note" in group:
            parts.append(group["note"])
        parts.append("\n".join(lines))
    parts.append(content["outro"].strip())
    return "\n\n".join(parts) + "\n"


def _line(row: dict[str, Any]) -> str:
    tests = ", ".join(f"`{test}`" for test in row["tests"]) or "none"
    return "| " + " | ".join([*(row[name] for name in COLUMNS), tests]) + " |"


if __name__ == "__main__":
    PAGE.write_text(markdown(read()))
    print(f"wrote {PAGE}")
