"""Patches scaled and combined, against NumPy, and what is refused."""

import numpy as np
import pytest

from safepatch_jax.patch_file.apply import apply
from safepatch_jax.patch_file.arithmetic import combine, scale
from safepatch_jax.patch_file.create import create
from safepatch_jax.patch_file.file import PatchFile
from tests.patch_file.models import BITS, DTYPES, bits_of, folder_of


def values(folder, name):
    _, dtype, bits = bits_of(folder)[name]
    return bits.view(DTYPES[dtype]).astype(np.float32)


def noise(rng, size, shape):
    return (size * rng.standard_normal(shape)).astype(np.float32)


def finite_pair(tmp_path, dtype, seeds=(1,)):
    """A backbone and models whose entries moved a little, as fine-tuning does, and one each so far
    that no sum is exact."""
    rng = np.random.default_rng(0)
    base = {"a": noise(rng, 0.02, (60, 70)), "b": noise(rng, 1, 50), "c": noise(rng, 1, 9)}
    base["b"][:4] = 1000
    base = {n: x.astype(DTYPES[dtype]) for n, x in base.items()}
    folder_of(tmp_path / "base", {n: x.view(BITS[dtype]) for n, x in base.items()}, dtype)
    folders = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        model = dict(base)
        for name in "ab":
            x = base[name]
            mask = rng.random(x.shape) < 0.3
            moved = x.astype(np.float32) + noise(rng, 1e-3, x.shape)
            model[name] = np.where(mask, moved, x).astype(x.dtype)
        model["b"][:4] = np.where(np.arange(4) == seed, 1e-3, 1000)
        folders.append(
            folder_of(
                tmp_path / f"model{seed}", {n: x.view(BITS[dtype]) for n, x in model.items()}, dtype
            )
        )
        create(tmp_path / "base", folders[-1], tmp_path / f"patch{seed}", {"seed": seed})
    return tmp_path / "base", folders


@pytest.mark.parametrize("state", ["backbone", "patched"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [0.5, -1.0, 3.7, 1e-3])
def test_scale_against_numpy(tmp_path, dtype, factor, state):
    base, [model] = finite_pair(tmp_path, dtype)
    scaled = scale(
        tmp_path / "patch1", base if state == "backbone" else model, factor, tmp_path / "scaled"
    )
    apply(tmp_path / "scaled", base, tmp_path / "out")
    for name in "abc":
        before, after = values(base, name), values(model, name)
        wanted = (before + np.float32(factor) * (after - before)).astype(DTYPES[dtype])
        changed = bits_of(base)[name][2] != bits_of(model)[name][2]
        wanted = np.where(changed, wanted.view(BITS[dtype]), bits_of(base)[name][2])
        np.testing.assert_array_equal(bits_of(tmp_path / "out")[name][2], wanted)
        assert scaled.tensors[name].entries == np.count_nonzero(wanted != bits_of(base)[name][2])
    assert (
        scaled.about["factor"] == factor
        and scaled.about["of"]["about"] == {"seed": 1}
        and scaled.kind == "scaled"
    )
    if dtype == "bfloat16" and factor == 1e-3:
        assert (
            scaled.entries() < PatchFile(tmp_path / "patch1").entries() / 2
        )  # most no longer change


@pytest.mark.parametrize("dtype", DTYPES)
def test_combine_against_numpy(tmp_path, dtype):
    base, models = finite_pair(tmp_path, dtype, seeds=(1, 2, 3))
    patches = [tmp_path / f"patch{i}" for i in (1, 2, 3)]
    combined = combine(patches, base, tmp_path / "combined")
    apply(tmp_path / "combined", base, tmp_path / "out")
    for name in "abc":
        start = bits_of(base)[name][2]
        ends = [bits_of(m)[name][2] for m in models]
        changed = [end != start for end in ends]
        total = np.zeros(start.shape, np.float32)
        wanted = start.copy()
        for end, mask, model in zip(ends, changed, models):
            total = np.where(mask, total + (values(model, name) - values(base, name)), total)
            wanted = np.where(mask, end, wanted)
        shared = np.sum(changed, 0) > 1
        wanted = np.where(
            shared, (values(base, name) + total).astype(DTYPES[dtype]).view(BITS[dtype]), wanted
        )
        assert name == "c" or np.any(shared) and np.any(np.sum(changed, 0) == 1)
        np.testing.assert_array_equal(bits_of(tmp_path / "out")[name][2], wanted)
    assert [x["about"]["seed"] for x in combined.about["of"]] == [1, 2, 3]
    back = combine([tmp_path / "patch1", tmp_path / "patch2"], base, tmp_path / "two")
    assert back.entries() < combined.entries()


def test_arithmetic_that_is_refused(tmp_path):
    base, [model, _] = finite_pair(tmp_path, "float16", seeds=(1, 2))
    one, two, out = tmp_path / "patch1", tmp_path / "patch2", tmp_path / "out"
    create(model, base, tmp_path / "way back")
    nans = {n: np.full_like(x, 0x7E00) for n, (_, _, x) in bits_of(base).items()}
    create(folder_of(tmp_path / "nan", nans, "float16"), base, tmp_path / "from nan")
    refused = [
        (lambda: scale(one, base, 0.0, out), "equal, bit for bit"),
        (lambda: scale(one, base, 1e9, out), "NaN or infinity in float16"),
        (lambda: scale(one, base, float("nan"), out), "finite number"),
        (lambda: scale(tmp_path / "from nan", base, 0.5, out), "NaN or infinity"),
        (lambda: scale(one, tmp_path / "nan", 0.5, out), "neither as in the backbone"),
        (lambda: combine([one], base, out), "two patch files or more"),
        (
            lambda: combine([one, tmp_path / "way back"], base, out),
            "different backbones: 2 of 3 tensors differ: a, b",
        ),
        (lambda: combine([one, two], model, out), "is patched with|neither as in the backbone"),
        (lambda: combine([one, two], base, two), "exists; nothing was written"),
    ]
    for call, message in refused:
        with pytest.raises(ValueError, match=message):
            call()
    assert not out.exists()
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".partial")]
