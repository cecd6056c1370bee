"""Comparisons and memory: a method that lacks it, and when the backbone is loaded."""

import dataclasses
import gc

import jax
import pytest

from safepatch_jax.methods.bench import Product
from safepatch_jax.methods.registry import METHODS
from safepatch_jax.runtime.files import read_json
from safepatch_jax.studies.compare.options import ComparisonOptions
from safepatch_jax.studies.compare.study import compare

pytestmark = pytest.mark.usefixtures("one_device")


def failing(name, text):
    """Return a method's row whose making ends with JAX's error."""

    def make(bench):
        raise jax.errors.JaxRuntimeError(text)

    return dataclasses.replace(METHODS[name], make=make)


def test_too_little_memory_for_a_method_does_not_end_the_others(
    settings, suite, tmp_path, monkeypatch, capsys
):
    full = "RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."
    monkeypatch.setitem(METHODS, "npo", failing("npo", f"{full}\nmore"))
    options = ComparisonOptions("npo,rose", suite)
    with pytest.raises(ValueError, match="1 of 4 methods are not in the table .*: NPO"):
        compare(settings, tmp_path / "work", options)
    said = f"NPO, seed 0: NOT MADE: out of memory ({full}). Give the same command again with more"
    assert said in capsys.readouterr().out
    rows = read_json(tmp_path / "work" / "compare.json")["methods"]
    assert list(rows) == ["backbone", "safepatching", "rose"]
    # Other errors end all, and so does what the backbone lacks.
    for name, text in (("npo", "INTERNAL: a fault"), ("backbone", full)):
        monkeypatch.setitem(METHODS, name, failing(name, text))
        with pytest.raises(jax.errors.JaxRuntimeError, match=text):
            compare(settings, tmp_path / name, options)


def test_a_method_is_made_before_the_backbone_is_loaded_to_answer(
    settings, suite, tmp_path, monkeypatch
):
    shape, counts = (264, 32), []  # of the embedding

    def count(bench=None):
        gc.collect()
        counts.append(sum(x.shape == shape for x in jax.live_arrays()))
        return Product()

    count()
    monkeypatch.setitem(METHODS, "npo", dataclasses.replace(METHODS["npo"], make=count))
    compare(settings, tmp_path / "work", ComparisonOptions("npo", suite))
    assert len(counts) == 2 and counts[0] == counts[1]
