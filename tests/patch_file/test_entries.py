"""What a patch changes, tensor by tensor: indices, bits, values, hashes."""

import hashlib

import numpy as np
import pytest

from safepatch_jax.patch_file.create import create
from safepatch_jax.patch_file.entries import entries
from safepatch_jax.patch_file.file import RUN
from tests.patch_file.models import bits_of, folder_of, patched_copy


def flat(bits):
    return {name: x.reshape(-1) for name, (_, _, x) in bits_of(bits).items()}


def test_the_entries_lead_from_the_backbone_to_the_patched_model(pair):
    base, model, patch = pair
    before, after = flat(base), flat(model)
    now = {name: x.copy() for name, x in before.items()}
    names = []
    for changed in entries(patch):
        assert changed.before is None and np.all(np.diff(changed.indices) > 0)
        now[changed.name][changed.indices] ^= changed.bits
        assert hashlib.sha256(before[changed.name]).hexdigest() == changed.hash_before
        assert hashlib.sha256(now[changed.name]).hexdigest() == changed.hash_after
        names.append(changed.name)
    assert names == sorted(names) and len(names) == 14
    for name, x in after.items():
        np.testing.assert_array_equal(now[name], x, err_msg=name)


@pytest.mark.parametrize("state", ["backbone", "patched"])
def test_values_come_from_either_model(pair, state):
    base, model, patch = pair
    before, after = flat(base), flat(model)
    for changed in entries(patch, base if state == "backbone" else model):
        for values, bits in ((changed.before, before), (changed.after, after)):
            assert values.dtype.name == changed.dtype
            expected = bits[changed.name][changed.indices]
            np.testing.assert_array_equal(values.view(np.uint16), expected)


def test_another_model_is_refused(pair, tmp_path):
    base, _, patch = pair
    stranger = patched_copy(base, tmp_path / "stranger", seed=5)
    with pytest.raises(ValueError, match="neither as in the backbone"):
        list(entries(patch, stranger))


def test_indices_go_on_beyond_one_run(tmp_path):
    size = RUN + 7
    base = folder_of(tmp_path / "base", {"x.proj": np.zeros((size,), np.uint16)}, "bfloat16")
    bits = np.zeros((size,), np.uint16)
    places = [0, RUN - 1, RUN, size - 1]
    bits[places] = 3
    model = folder_of(tmp_path / "model", {"x.proj": bits}, "bfloat16")
    create(base, model, tmp_path / "x.patch")
    (changed,) = entries(tmp_path / "x.patch", base)
    assert changed.indices.tolist() == places and changed.bits.tolist() == [3] * 4


def test_a_copy_that_the_folder_leaves_out_has_the_values_of_the_other(tmp_path):
    bits = np.arange(6, dtype=np.uint16)
    base = folder_of(tmp_path / "base", {"a": bits, "b": bits, "c": bits + 7}, "bfloat16")
    model = folder_of(tmp_path / "model", {"a": bits ^ np.uint16(3), "c": bits + 8}, "bfloat16")
    create(base, model, tmp_path / "x.patch")
    for folder in (base, model):
        changed = {x.name: x for x in entries(tmp_path / "x.patch", folder)}
        assert changed.keys() == {"a", "b", "c"}
        np.testing.assert_array_equal(changed["b"].before.view(np.uint16), bits)
        np.testing.assert_array_equal(changed["b"].after.view(np.uint16), bits ^ 3)
