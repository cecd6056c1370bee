"""The reports of docs/results have the tables that the reports write from the stored results."""

import pathlib

import pytest

from safepatch_jax.runtime.files import read_json
from safepatch_jax.studies.compare import report as compare
from safepatch_jax.studies.continual import report as continual
from safepatch_jax.studies.evaluate import report as evaluate
from safepatch_jax.studies.sweep import report as sweep

RESULTS = pathlib.Path(__file__).parents[2] / "docs" / "results"


@pytest.mark.parametrize(
    "name, report",
    [
        ("compare_demo", compare),
        ("compare_real", compare),
        ("continual_advbench", continual),
        ("demo_real", evaluate),
        ("sweep_demo", sweep),
        ("sweep_importance", sweep),
    ],
)
def test_a_page_has_the_tables_of_its_results(name, report):
    page = (RESULTS / "reports" / f"{name}.md").read_text().split("\n")
    lines = report.markdown(read_json(RESULTS / f"{name}.json")).split("\n")
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) > 10 and not set(rows) - set(page)
