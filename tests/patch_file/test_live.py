"""Live torch models as servers hold them: prefixes, wrappers, fused and padded rows; all or
nothing."""

import hashlib

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from safepatch_jax.io.safetensors_file import SINGLE
from safepatch_jax.patch_file import tensors as live
from safepatch_jax.patch_file.apply import apply
from safepatch_jax.patch_file.create import create
from safepatch_jax.patch_file.file import PatchFile
from safepatch_jax.testing import write_tiny_model
from tests.patch_file.models import patched_copy

torch = pytest.importorskip("torch")

from tests.patch_file.test_tensors import EMBEDDING, HEAD, assert_bits, state_of  # noqa: E402

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A backbone, a model that differs in every kind of tensor, and the patch."""
    place = tmp_path_factory.mktemp("live")
    base = write_tiny_model(place / "base", dtype="bfloat16")
    model = patched_copy(base, place / "model", only="")
    create(base, model, place / "x.patch")
    return base, model, place / "x.patch"


def served(state):
    """The tensors as vLLM and SGLang hold them: q, k, v in one, gate and up in one, more rows in
    the embedding, a tied head, computed tables."""
    result = {}
    for name, tensor in state.items():
        for fused, members in FUSED.items():
            if f".{members[0]}." in name:
                parts = [state[name.replace(members[0], member)] for member in members]
                result[name.replace(members[0], fused)] = torch.cat(parts)
            if any(f".{member}." in name for member in members):
                break
        else:
            result[name] = tensor
    padding = torch.full((3, state[EMBEDDING].shape[1]), 7, dtype=state[EMBEDDING].dtype)
    result[EMBEDDING] = torch.cat([state[EMBEDDING], padding])
    result[HEAD] = result[EMBEDDING]
    result["model.layers.0.self_attn.rotary_emb.cos_sin_cache"] = torch.zeros(4)
    return result


def assert_equal(ours, expected):
    assert ours.keys() == expected.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor.view(torch.uint8), expected[name].view(torch.uint8)), name


def test_fused_and_padded_rows_there_and_back(whole):
    base, model, patch = whole
    state = served(state_of(base))
    memory = {name: tensor.data_ptr() for name, tensor in state.items()}
    moved = live.apply_tensors(patch, state).moved
    assert set(moved) == set(PatchFile(patch).changed())
    assert_equal(state, served(state_of(model)))
    assert memory == {name: tensor.data_ptr() for name, tensor in state.items()}
    assert live.apply_tensors(patch, state).already == moved
    live.revert_tensors(patch, state)
    assert_equal(state, served(state_of(base)))


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: name.replace("model.layers.0.", "model.layers.0._fsdp_wrapped_module."),
        lambda name: f"policy.language_model.{name}",
        lambda name: name.removeprefix("model."),
    ],
)
@pytest.mark.parametrize("fuse", [False, True])
def test_prefixes_and_wrappers(whole, rename, fuse):
    base, model, patch = whole
    kept = (lambda state: served(state)) if fuse else (lambda state: state)
    state = {rename(name): tensor for name, tensor in kept(state_of(base)).items()}
    live.apply_tensors(patch, state)
    expected = {rename(name): tensor for name, tensor in kept(state_of(model)).items()}
    assert_equal(state, expected)


def test_a_part_of_a_fused_tensor_is_refused(whole):
    base, _, patch = whole
    state = served(state_of(base))
    name = "model.layers.1.self_attn.qkv_proj.weight"
    state[name] = state[name][: len(state[name]) // 2].clone()
    with pytest.raises(ValueError, match=f"{name} has .* rows, q_proj, k_proj, v_proj have"):
        live.apply_tensors(patch, state)


def test_a_wrong_row_of_a_fused_tensor_is_named_and_nothing_written(whole):
    base, _, patch = whole
    state = served(state_of(base))
    state["model.layers.1.mlp.gate_up_proj.weight"][-1, -1] += 1
    before = {name: tensor.clone() for name, tensor in state.items()}
    with pytest.raises(ValueError, match=r"1 of \d+ tensors .*: model.layers.1.mlp.up_proj.weight"):
        live.apply_tensors(patch, state)
    assert_equal(state, before)


def test_other_tensors_are_left_alone_if_one_says_so(whole):
    base, model, patch = whole
    state = state_of(base) | {"vision.weight": torch.ones(3)}
    with pytest.raises(ValueError, match="vision.weight is not in the patch"):
        live.apply_tensors(patch, state)
    live.apply_tensors(patch, state, ignore=["vision.*"])
    assert torch.equal(state.pop("vision.weight"), torch.ones(3))
    assert_bits(state, model)


def test_two_tensors_for_one_name_are_refused(whole):
    base, _, patch = whole
    state = {f"inner.{name}": tensor for name, tensor in state_of(base).items()}
    name = PatchFile(patch).changed()[0]
    state[name] = state[f"inner.{name}"].clone()  # a reference beside the model
    before = {name: tensor.clone() for name, tensor in state.items()}
    with pytest.raises(ValueError, match=f"two tensors for {name} of the patch: inner.{name}, and"):
        live.apply_tensors(patch, state)
    assert_equal(state, before)
    live.apply_tensors(patch, state, ignore=[name])
    assert torch.equal(state[name], before[name])
    assert not torch.equal(state[f"inner.{name}"], before[f"inner.{name}"])


def test_a_second_copy_of_a_tied_head_may_be_missing(tmp_path):
    """The folder writes the tied head again; the live model has the embedding alone."""
    base = write_tiny_model(tmp_path / "base", dtype="bfloat16")
    tensors = load_file(base / SINGLE)
    save_file(tensors | {HEAD: tensors[EMBEDDING].copy()}, base / SINGLE, {"format": "pt"})
    model = patched_copy(base, tmp_path / "model", only="proj")
    create(base, model, tmp_path / "x.patch")
    state = state_of(base)
    del state[HEAD]
    live.apply_tensors(tmp_path / "x.patch", state)
    expected = state_of(model)
    del expected[HEAD]
    assert_equal(state, expected)


def damaged_copy(patch, out):
    """A patch whose flips are not those of its hashes, as a damaged disk would leave it."""
    data = bytearray(patch.read_bytes())
    tensor = PatchFile(patch).tensors[PatchFile(patch).changed()[-1]]
    place = tensor.bits.offset
    data[place] ^= 0x40
    out.write_bytes(data)
    return out


def test_a_damaged_patch_is_refused_before_anything_is_written(whole, tmp_path):
    base, _, patch = whole
    state = state_of(base)
    with pytest.raises(ValueError, match="patch is damaged. Nothing was written"):
        live.apply_tensors(damaged_copy(patch, tmp_path / "y.patch"), state)
    assert_bits(state, base)


class Failing(torch.Tensor):
    """A tensor whose writes fail while `broken` is set."""

    broken = True

    def __setitem__(self, index, value):
        if type(self).broken:
            raise MemoryError("no room")
        torch.Tensor.__setitem__(self, index, value)


def test_a_failure_in_the_middle_is_taken_back(whole):
    base, model, patch = whole
    state = state_of(base)
    last = live.apply_tensors(patch, state_of(base)).moved[-1]
    Failing.broken = True
    with pytest.raises(MemoryError, match="no room"):
        live.apply_tensors(patch, state | {last: state[last].as_subclass(Failing)})
    assert_bits(state, base)
    live.apply_tensors(patch, state)
    assert_bits(state, model)


class HalfFailing(torch.Tensor):
    """A tensor that can be written once, and not again while `writes` is spent."""

    writes = 1

    def __setitem__(self, index, value):
        if type(self).writes == 0:
            raise MemoryError("no room")
        type(self).writes -= 1
        torch.Tensor.__setitem__(self, index, value)


def test_what_cannot_be_taken_back_is_named_and_the_same_call_finishes(whole):
    base, model, patch = whole
    state = state_of(base)
    first, *_, last = live.apply_tensors(patch, state_of(base)).moved
    HalfFailing.writes, Failing.broken = 1, True
    given = state | {first: state[first].as_subclass(HalfFailing)}
    given[last] = state[last].as_subclass(Failing)
    with pytest.raises(RuntimeError, match=f"{first} changed, the other tensors did not"):
        live.apply_tensors(patch, given)
    assert live.apply_tensors(patch, state).already == (first,)
    assert_bits(state, model)


def test_tensors_of_inference_mode_and_views_are_written_in_place(whole):
    base, model, patch = whole
    with torch.inference_mode():
        state = {name: tensor.t().contiguous().t() for name, tensor in state_of(base).items()}
    strides = {name: tensor.stride() for name, tensor in state.items()}
    live.apply_tensors(patch, state)
    assert strides == {name: tensor.stride() for name, tensor in state.items()}
    for name, tensor in state_of(model).items():
        assert np.array_equal(state[name].contiguous().view(torch.int16), tensor.view(torch.int16))


def test_the_bits_are_those_of_the_exported_folder(whole, tmp_path):
    base, model, patch = whole
    state = state_of(base)
    live.apply_tensors(patch, state)
    apply(patch, base, tmp_path / "out")
    for name, changed in PatchFile(patch).tensors.items():
        data = state[name].view(torch.uint8).numpy().tobytes()
        assert hashlib.sha256(data).hexdigest() == changed.after
    assert_bits(state, tmp_path / "out")
