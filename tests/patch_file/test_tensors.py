"""Patches on live torch tensors: every dtype, tied heads, tensors that are not here."""

import numpy as np
import pytest

from safepatch_jax.io.folder import Checkpoint
from safepatch_jax.patch_file import tensors as live
from safepatch_jax.patch_file.apply import apply
from safepatch_jax.patch_file.create import create
from safepatch_jax.testing import write_tiny_model
from tests.patch_file.models import BITS, DTYPES, bits_of, folder_of, patched_copy

torch = pytest.importorskip("torch")

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def state_of(folder):
    """A folder's tensors as torch ones, by name, each with a memory of its own."""
    state = {}
    for name, tensor in Checkpoint(folder).tensors.items():
        bits = torch.from_numpy(tensor.read().view(np.uint8).copy())
        state[name] = bits.view(getattr(torch, tensor.dtype)).reshape(tensor.shape)
    return state


def assert_bits(state, folder):
    for name, (_, dtype, bits) in bits_of(folder).items():
        ours = state[name].view(torch.uint8).numpy().view(BITS[dtype])
        np.testing.assert_array_equal(ours, bits.reshape(ours.shape), err_msg=name)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_every_dtype_there_and_back(dtype, tmp_path):
    base = write_tiny_model(tmp_path / "base", dtype=dtype)
    model = patched_copy(base, tmp_path / "model")
    create(base, model, tmp_path / "x.patch", {})
    state = state_of(base)
    moved = live.apply_tensors(tmp_path / "x.patch", state).moved
    assert_bits(state, model)
    assert all("proj" in name for name in moved)
    assert live.apply_tensors(tmp_path / "x.patch", state).moved == ()
    assert live.revert_tensors(tmp_path / "x.patch", state).moved == moved
    assert_bits(state, base)


def test_a_tied_head_is_written_once(tmp_path):
    """The folder has the embedding alone, the live model both names of it."""
    base = write_tiny_model(tmp_path / "base", dtype="bfloat16")
    model = patched_copy(base, tmp_path / "model", only="embed")
    create(base, model, tmp_path / "x.patch", {})
    state = state_of(base)
    assert HEAD not in state
    state[HEAD] = state[EMBEDDING]
    assert live.apply_tensors(tmp_path / "x.patch", state).moved == (EMBEDDING,)
    assert_bits(state, model)
    live.revert_tensors(tmp_path / "x.patch", state)
    assert_bits(state, base)
    state[HEAD] = state[HEAD].clone()  # it is tied no longer, and no part of this patch
    with pytest.raises(ValueError, match=f"{HEAD} is not in the patch"):
        live.apply_tensors(tmp_path / "x.patch", state)


@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_that_has_both_names(tied, tmp_path):
    """Both are in the patch; where they share their memory they are flipped together, once."""
    rng = np.random.default_rng(0)
    weight = rng.integers(0, 2**16, (6, 4), dtype=np.uint16)
    both = {EMBEDDING: weight, HEAD: weight.copy()}
    base = folder_of(tmp_path / "base", both, "bfloat16")
    changed = {name: bits ^ np.uint16(3) for name, bits in both.items()}
    model = folder_of(tmp_path / "model", changed, "bfloat16")
    create(base, model, tmp_path / "x.patch", {})
    state = state_of(base)
    if tied:
        state[HEAD] = state[EMBEDDING]
    assert set(live.apply_tensors(tmp_path / "x.patch", state).moved) == {EMBEDDING, HEAD}
    assert_bits(state, model)
    live.revert_tensors(tmp_path / "x.patch", state)
    assert_bits(state, base)


@pytest.mark.parametrize("flip", [0, 5])
def test_a_tied_model_cannot_hold_a_patch_that_unties(tmp_path, flip):
    """The embedding changes, the head stays or changes otherwise."""
    flips = {EMBEDDING: 3, HEAD: flip}
    weight = np.arange(24, dtype=np.uint16).reshape(6, 4)
    base = folder_of(tmp_path / "base", dict.fromkeys(flips, weight), "bfloat16")
    changed = {name: weight ^ np.uint16(x) for name, x in flips.items()}
    model = folder_of(tmp_path / "model", changed, "bfloat16")
    create(base, model, tmp_path / "x.patch", {})
    state = state_of(base)
    tied = dict.fromkeys(flips, state[EMBEDDING])
    with pytest.raises(ValueError, match=f"does not change alike: {HEAD} = {EMBEDDING}"):
        live.apply_tensors(tmp_path / "x.patch", tied)
    assert_bits(tied, base)
    live.apply_tensors(tmp_path / "x.patch", state)
    assert_bits(state, model)


def test_what_is_not_in_memory_is_refused(pair):
    base, _, patch = pair
    state = state_of(base)
    name = apply(patch, base, base.parent / "out").moved[0]
    state[name] = state[name].to("meta")
    with pytest.raises(ValueError, match=f"lacks the values of 1 tensors.*{name}"):
        live.apply_tensors(patch, state)
    with pytest.raises(ValueError, match="all is none"):
        live.apply_tensors(patch, {})


def test_parameters_that_train_are_patched_too(pair):
    base, model, patch = pair
    state = {}
    for name, tensor in state_of(base).items():
        state[name] = torch.nn.Parameter(tensor)
    live.apply_tensors(patch, state)
    assert_bits({name: x.detach() for name, x in state.items()}, model)
    assert all(x.requires_grad for x in state.values())
