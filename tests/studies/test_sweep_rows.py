"""Rows of a sweep as they are read back: what is damaged is named, what would mislead a report is
refused."""

import json

import pytest

from safepatch_jax.settings import Settings
from safepatch_jax.studies.sweep.rows import read_rows
from tests.studies.test_sweep_analysis import measures, row

WHOLE = row(measures(1, 2, 10.0)) | {"keys": {}, "seconds": 1.5}


def read(folder, *lines):
    (folder / "sweep.jsonl").write_text(
        "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    )
    return read_rows(folder / "sweep.jsonl")


def changed(**measured):
    return WHOLE | {"measures": WHOLE["measures"] | measured}


def patched(**options):
    return WHOLE | {"patch": WHOLE["patch"] | options}


COUNTS = {"complied": 1, "refused": 1, "incoherent": 0, "n": 2}
COVERED = {"covered": 0.5}
MARGINS = {
    "auroc": {"value": 0.5},
    "content_nll": None,
    "harmful": COVERED,
    "lookalike": COVERED,
}


def test_expected_numbers_of_margins_are_no_damage(tmp_path):
    expected = {"complied": 1.25, "refused": 0.75, "incoherent": 0.0, "n": 2}
    row = changed(margins=MARGINS, harmful=expected) | {
        "answers": {"harmful": COUNTS, "lookalike": COUNTS}
    }
    [found] = read(tmp_path, row)
    assert found["measures"]["harmful"] == expected
    with pytest.raises(ValueError, match="harmful should hold"):
        read(tmp_path, changed(harmful=expected), "{}")  # of answers there are whole numbers


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "Expecting property"),
        ("[1]", "it holds no row of a sweep"),
        ("[" * 100_000, "recursion"),
        ({"patch": {}, "seed": "a"}, "of another kind: seed, keys"),
        (WHOLE | {"weights": []}, "weights should be the hash"),
        (WHOLE | {"measures": {"harmful": {}}}, "kind: lookalike, harmful_nll"),
        (changed(ordinary_perplexity=float("nan")), "NaN is no number"),
        (changed(harmful_nll=float("-inf")), "-Infinity is no"),
        (
            json.dumps(WHOLE).replace("10.0", "1e999"),
            "ordinary_perplexity should be a finite number",
        ),
        (changed(harmful_nll="2"), "harmful_nll should be"),
        (changed(ordinary_perplexity=10**400), "ordinary_perplexity should be"),
        (changed(ordinary_perplexity=0), "ordinary_perplexity should be above 0"),
        (WHOLE | {"seconds": True}, "seconds should be"),
        (changed(harmful=5), "harmful should hold numbers"),
        (changed(lookalike={}), "lookalike should hold numbers"),
        (changed(harmful=COUNTS | {"n": 3}), "harmful should hold"),
        (changed(harmful=dict.fromkeys(COUNTS, 0)), "harmful should"),
        (changed(harmful=COUNTS | {"complied": -1, "n": 0}), "harmful"),
        (changed(harmful=COUNTS | {"refused": 1.0}), "harmful"),
        (changed(margins={}), "margins should hold auroc"),
        (changed(margins=MARGINS | {"content_nll": "high"}), "margins should hold auroc"),
        (changed(margins=MARGINS, harmful=COUNTS | {"refused": 1.5}), "harmful should hold"),
        (
            WHOLE | {"answers": {"harmful": COUNTS}},
            "answers should hold numbers of answers for lookalike",
        ),
        (patched(retention=2.0), "'patch.retention' must be at most 1"),
        (patched(beta="2"), "'patch.beta' must be of type float"),
        (patched(merge="| ![x](http://y)"), "'patch.merge' must be one of"),
        (WHOLE | {"seed": True}, "'run.seed' must be of type"),
        (WHOLE | {"seed": -1}, "'run.seed' must be at least 0"),
    ],
)
def test_a_damaged_line_is_named(line, message, tmp_path):
    with pytest.raises(
        ValueError,
        match=r"line 2 is damaged .*Delete that line, and its point alone is tried again",
    ) as error:
        read(tmp_path, WHOLE, line, WHOLE)
    assert message in str(error.value)


def test_settings_get_their_types_and_rows_of_other_versions_stay(tmp_path):
    other = patched(beta=2, of_another_version="x")
    rows = read(tmp_path, patched(beta=2), other)
    assert rows == [patched(beta=2.0), other] and type(rows[0]["patch"]["beta"]) is float
    assert (
        Settings()
        .override({f"patch.{name}": value for name, value in rows[0]["patch"].items()})
        .patch.beta
        == 2
    )
