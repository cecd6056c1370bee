"""One report of an evaluation in several templates: each model's measures side by side, then what
the report of each template alone would have."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping
from typing import Any

from safepatch_jax.reporting import ending, tables, templates
from safepatch_jax.studies.evaluate import report
from safepatch_jax.studies.evaluate.figures import draw, draw_templates

_SPEED = ("seconds_per_token", "atgr", "no_atgr")
_COMMON = (
    "models",
    "options",
    "judges",
    "judges_of_content",
    "versions",
    "seeds",
    "grader",
    *_SPEED,
)


def merge(contents: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the content of report.json: what is common, and 'templates' with the rest by label.

    Args:
      contents: of `report.gather` by label; '' alone, where no list of templates was given, stays
        as it is.
    """
    if "" in contents:
        return dict(contents[""])
    first = next(iter(contents.values()))
    common = {name: first[name] for name in _COMMON if name in first}
    own = {}
    for label, content in contents.items():
        own[label] = {name: value for name, value in content.items() if name not in common}
    return common | {"templates": own}


def of_template(content: Mapping[str, Any], label: str) -> dict[str, Any]:
    """Return the content of one template's report, without the speed, which all have in common."""
    common = {name: x for name, x in content.items() if name not in ("templates", *_SPEED)}
    return common | content["templates"][label]


def result(content: Mapping[str, Any]) -> list[str]:
    """Return the table with which an evaluation ends on the console."""
    if "templates" not in content:
        return ending.lines(report.ending_rows(content))
    rows = []
    for label in content["templates"]:
        rows += report.ending_rows(of_template(content, label), label)
    return ending.lines(rows)


def markdown(content: Mapping[str, Any]) -> str:
    """Return report.md."""
    parts = {}
    for label in content["templates"]:
        text = report.markdown(of_template(content, label), _picture(label))
        body = text.partition("\n")[2]  # without its title
        parts[label] = re.sub(r"(?m)^(?=#+ )", "#", body).strip()
    rows = zip(*(part["measures"] for part in content["templates"].values()))
    return templates.render(
        "studies/evaluate/side_by_side.md.jinja",
        **{"seconds_per_token": {}} | dict(content),
        rows=list(rows),
        parts=parts,
        cell=_cell,
    )


def _cell(measure: Mapping[str, Any], who: str) -> str:
    """Return the one figure of a model on a measure."""
    x = measure["models"][who]
    if measure["kind"] == "text":
        return f"perplexity {x['perplexity']:.2f}" if x["n"] else "none scored"
    return report.grade(x) if measure["kind"] == "mt_bench" else report.rated(x)


def _picture(label: str) -> str:
    return f"report-{label}.png"


def write(content: Mapping[str, Any], folder: pathlib.Path) -> None:
    """Write the files of a report into a folder, with a picture of each template where there are
    several; each appears whole."""
    if "templates" not in content:
        report.write(content, folder)
        return
    files = {"report.md": markdown(content), "report.json": content}
    for label in content["templates"]:
        files[_picture(label)] = draw(of_template(content, label))
    tables.publish(folder, files | {"report.png": draw_templates(content)})
