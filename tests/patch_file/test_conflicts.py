"""Where two patches meet, beside NumPy on whole tensors."""

import numpy as np
import pytest

from safepatch_jax.patch_file.conflicts import LINE, ONE, OTHER, conflicts, lines
from safepatch_jax.patch_file.create import create
from safepatch_jax.patch_file.file import PatchFile
from safepatch_jax.testing import write_tiny_model
from tests.patch_file.chains import DOWN, UP, arrays, changed, write_model
from tests.patch_file.models import patched_copy


def make(folder, name, before, entries):
    """A model that differs in some entries, see `changed`, and the patch file that leads there."""
    model = write_model(changed(arrays(before), entries), before, folder / name)
    return model, create(before, model, folder / f"{name}.patch")


def changes(before, after):
    """What a patch does to every tensor, as float64, and where."""
    result = {}
    for name, x in arrays(before).items():
        y = arrays(after)[name]
        result[name] = y.astype(np.float64) - x.astype(np.float64), x.view("u2") != y.view("u2")
    return result


def assert_sums(found, first, second):
    dot = agree = both = 0
    norms, there = np.zeros(2), np.zeros(2)
    for name, (a, at_a) in first.items():
        b, at_b = second[name]
        shared = at_a & at_b
        both, dot = both + shared.sum(), dot + (a * b)[shared].sum()
        agree += (np.sign(a) == np.sign(b))[shared].sum()
        norms += (a**2).sum(), (b**2).sum()
        there += (a**2)[shared].sum(), (b**2)[shared].sum()
        assert found.tensors.get(name, {"both": 0})["both"] == shared.sum()
    assert found.both == both > 0 and found.sums.agree == agree
    np.testing.assert_allclose(found.sums.cosine, dot / np.sqrt(norms.prod()), rtol=1e-6)
    np.testing.assert_allclose(found.sums.cosine_there, dot / np.sqrt(there.prod()), rtol=1e-6)


@pytest.fixture
def base(tmp_path):
    return write_tiny_model(tmp_path / "base", dtype="bfloat16")


def test_counts_and_cosines_are_those_of_numpy(base, tmp_path):
    one = patched_copy(base, tmp_path / "one", 0.3, seed=1)
    two = patched_copy(base, tmp_path / "two", 0.3, seed=2)
    patches = [create(base, x, tmp_path / f"{x.name}.patch") for x in (one, two)]
    for folder in (base, one, two):  # the values before follow from each
        found = conflicts(*patches, folder)
        assert found.relation == ONE and found.commute is False
        assert_sums(found, changes(base, one), changes(base, two))
    assert conflicts(*patches).sums is None


def test_patches_of_a_line(base, tmp_path):
    one, first = make(tmp_path, "one", base, {UP: {1: 0.5, 2: 1.0}, DOWN: {3: 0.5}})
    two, second = make(tmp_path, "two", one, {UP: {2: -0.25, 9: 1.0}, DOWN: {3: 0.25}})
    for folder in (base, one, two):
        found = conflicts(first, second, folder)
        assert (found.relation, found.commute, found.sums.agree) == (LINE, False, 1)
        assert_sums(found, changes(base, one), changes(one, two))
    text = lines(found, "one", "two")
    assert f"  {UP}" in " ".join(text) and "cannot be removed exactly under" in " ".join(text)


def test_disjoint_patches_commute_and_so_do_equal_changes(base, tmp_path):
    one, first = make(tmp_path, "one", base, {UP: {1: 0.5, 2: 1.0}})
    _, apart = make(tmp_path, "apart", base, {UP: {3: 0.5}, DOWN: {1: 0.5}})
    _, equal = make(tmp_path, "equal", base, {UP: {2: 1.0, 5: 1.0}})
    _, after = make(tmp_path, "after", one, {UP: {7: 1.0}})
    for other in (apart, after):
        found = conflicts(first, other, base)
        assert found.commute is True and found.both == 0 and found.sums.cosine == 0
        assert "They commute, exactly" in lines(found, "x", "y")[1]
    found = conflicts(first, equal)
    assert found.commute is True and found.both == 1
    assert "give every shared entry the same bits" in lines(found, "x", "y")[2]


def test_patches_of_different_backbones(base, tmp_path):
    _, first = make(tmp_path, "one", base, {UP: {1: 0.5}})
    other = write_model(changed(arrays(base), {UP: {1: 3.0, 6: 1.0}}), base, tmp_path / "other")
    _, second = make(tmp_path, "two", other, {UP: {1: 0.5}})
    found = conflicts(first, second)
    assert found.relation == OTHER and found.commute is None
    with pytest.raises(ValueError, match=f"is no model from which .* 1 of 1 tensors: {UP}"):
        conflicts(first, second, base)
    wide = write_tiny_model(tmp_path / "wide", dtype="float32")
    third = create(wide, patched_copy(wide, tmp_path / "w"), tmp_path / "w.patch")
    with pytest.raises(ValueError, match="are patches of models that have .* Give patches of one"):
        conflicts(first, third)


def test_changes_that_are_not_finite_are_counted_apart(base, tmp_path):
    tensors = arrays(base)
    tensors[UP].reshape(-1)[1] = np.inf
    tensors[UP].reshape(-1)[2] += 1
    model = write_model(tensors, base, tmp_path / "inf")
    patch = create(base, model, tmp_path / "inf.patch")
    _, other = make(tmp_path, "one", base, {UP: {1: 1.0, 2: 1.0}})
    found = conflicts(PatchFile(patch.path), other, base)
    assert found.sums.odd == 1 and np.isfinite(found.sums.cosine)
    assert "1 changes are NaN or infinite" in lines(found, "x", "y")[-1]
