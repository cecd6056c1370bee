"""Tables, rates, foreign text, templates, and files that appear together."""

import json
import math

import jinja2
import pytest

from safepatch_jax.reporting import charts, tables, templates

COUNTS = {"complied": 5, "refused": 14, "incoherent": 1, "n": 20}


def test_a_table_is_markdown():
    text = tables.table(["", "a"], [["x", 1], ["", "2"]])
    assert text == "|  | a |\n|---|---|\n| x | 1 |\n|  | 2 |"


def test_rates_and_their_intervals():
    assert tables.counted(COUNTS, "complied") == "25% [11-47]"
    assert tables.rate(0.25, (0.112, 0.469), digits=1, unit=" %", ends=1) == "25.0 % [11.2-46.9]"
    assert tables.share(COUNTS, "complied", "refused") == 0.95
    none = dict.fromkeys(COUNTS, 0)
    assert tables.counted(none, "complied") == "-" and math.isnan(tables.share(none, "complied"))


def test_foreign_text_stays_text():
    assert tables.escaped("a *b*\n| <c> [d](e)") == r"a \*b\* \| \<c\> \[d\](e)"
    assert tables.code("a`b") == "`a'b`"


def test_a_template_is_filled_and_misses_nothing():
    checks = [{"statement": "{{ x }}", "holds": True, "evidence": "{% if %}"}]
    text = templates.render("reporting/checks.md.jinja", orderings=checks)
    assert text.endswith("|---|---|---|\n| {{ x }} | yes | {% if %} |\n")
    with pytest.raises(jinja2.UndefinedError, match="'orderings' is undefined"):
        templates.render("reporting/checks.md.jinja")
    assert templates.line("\na\n  b c \n") == "a b c\n"


def test_a_report_appears_together_or_not_at_all(tmp_path):
    figure = charts.figure(2, 2)
    contents = {"r.md": "text\n", "r.json": {"a": 1}, "r.png": figure}
    tables.publish(tmp_path, contents)
    assert (tmp_path / "r.md").read_text() == "text\n"
    assert json.loads((tmp_path / "r.json").read_text()) == {"a": 1}
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(TypeError, match="set is not JSON serializable"):
        tables.publish(tmp_path, {"r.md": "other", "r.json": {"a": {1}}, "r.png": figure})
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
