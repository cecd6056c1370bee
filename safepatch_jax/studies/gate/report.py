"""The report of a gate: gate.md for people, gate.json for programs, gate.xml (JUnit) for a CI."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

from safepatch_jax.evaluation.sequential import FAIL, OPEN, PASS
from safepatch_jax.reporting import tables, templates
from safepatch_jax.runtime import files
from safepatch_jax.runtime.text import printable
from safepatch_jax.studies.gate.checks import OURS, THEIRS, line, more, number

FILES = ("gate.md", "gate.json", "gate.xml")
_LISTED = 40  # prompts of a list in gate.md; gate.json has all
_LONGEST = 160  # characters of a prompt there
_WORDS = {
    PASS: "PASS: every check was shown to lie within its margin",
    FAIL: "FAIL: at least one check was shown to be worse than allowed",
    OPEN: "NOT ENOUGH EVIDENCE: no check failed, and not every one could be shown to pass",
}


def summary(content: Mapping[str, Any]) -> list[str]:
    """Return the lines with which a gate ends on the console."""
    return [*map(line, content["checks"]), _WORDS[content["verdict"]]]


def markdown(content: Mapping[str, Any]) -> str:
    """Render the report."""
    return templates.render(
        "studies/gate/report.md.jinja",
        **content,
        headline=_WORDS[content["verdict"]],
        rows=[_row(check) for check in content["checks"]],
        lists=[_list(check) for check in content["checks"]],
        code=lambda text: tables.code(printable(text)),
        more=more,
        OPEN=OPEN,
    )


def _row(check: Mapping[str, Any]) -> list[str]:
    levels, limits = check["levels"], check["limits"]
    text = functools.partial(number, unit=check["unit"], margin=limits["margin"])
    low, high = (text(check[end], sign="+") for end in ("low", "high"))
    return [
        check["title"],
        check["verdict"],
        f"{check['decided_at'] or check['n']} of {check['prompts']}",
        text(levels[THEIRS]),
        text(levels[OURS]),
        f"{text(check['mean'], sign='+')} [{low}, {high}]",
        text(limits["margin"], sign="+"),
        text(limits["fail_above"], sign="+"),
        f"{1 - limits['alpha']:.4g} / {1 - limits['alpha_fail']:.4g}",
    ]


def _list(check: Mapping[str, Any]) -> dict[str, Any]:
    parts = {}
    for direction in ("worse", "better"):
        rows = []
        for flip in check[direction][:_LISTED]:
            prompt = printable(flip["prompt"], _LONGEST) or flip["id"]
            change = f"{_shown(flip[THEIRS])} -> {_shown(flip[OURS])}"
            rows.append([flip["id"], tables.escaped(flip["measure"]), change, tables.code(prompt)])
        parts[direction] = {"rows": rows, "left": len(check[direction]) - len(rows)}
    return {"title": check["title"], "flips": check["unit"] == "share of prompts", **parts}


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:.3f}"


def junit(content: Mapping[str, Any]) -> str:
    """Return the report as JUnit XML: a test case a check, whose failure is a fail, and whose error
    is too little evidence."""
    checks = content["checks"]
    suite = ElementTree.Element(
        "testsuite",
        name="safepatch gate",
        tests=str(len(checks)),
        failures=_count(checks, FAIL),
        errors=_count(checks, OPEN),
        skipped="0",
    )
    for check in checks:
        case = ElementTree.SubElement(
            suite, "testcase", classname="safepatch.gate", name=check["kind"]
        )
        kinds = {FAIL: "failure", OPEN: "error"}
        if check["verdict"] in kinds:
            problem = ElementTree.SubElement(
                case, kinds[check["verdict"]], message=line(check), type=check["verdict"]
            )
            problem.text = _flip_lines(check)
        ElementTree.SubElement(case, "system-out").text = line(check)
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def _count(checks: Sequence[Mapping[str, Any]], verdict: str) -> str:
    return str(sum(check["verdict"] == verdict for check in checks))


def _flip_lines(check: Mapping[str, Any]) -> str:
    lines = []
    for flip in check["worse"]:
        change = f"{_shown(flip[THEIRS])} -> {_shown(flip[OURS])}"
        # printable: XML has no way to write a control character.
        text = printable(f"{flip['measure']} {flip['id']}: {change}: {flip['prompt']}", 300)
        lines.append(text)
    return "\n".join(lines)


def write(content: Mapping[str, Any], folder: pathlib.Path) -> None:
    """Write gate.md, gate.json and gate.xml into a folder, which is made if need be; each appears
    whole."""
    folder.mkdir(parents=True, exist_ok=True)
    with files.published(folder) as temporary:
        files.write_text(temporary / FILES[0], markdown(content))
        files.write_json(temporary / FILES[1], content)
        files.write_text(temporary / FILES[2], junit(content))
