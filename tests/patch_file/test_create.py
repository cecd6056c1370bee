"""Making a patch file and looking into it: what it holds, its size, and when there is none."""

import signal

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from safepatch_jax.io.folder import Checkpoint
from safepatch_jax.io.safetensors_file import SINGLE
from safepatch_jax.patch_file.apply import apply, revert
from safepatch_jax.patch_file.create import create
from safepatch_jax.patch_file.file import inspect
from safepatch_jax.runtime import files
from safepatch_jax.testing import write_tiny_model
from tests.patch_file.models import (
    BITS,
    PATCHED,
    ROOT,
    assert_same,
    folder_of,
    patched_copy,
    python,
)


def test_the_file_says_what_it_is_and_is_the_same_each_time(pair, tmp_path):
    base, model, patch = pair
    again = create(base, model, tmp_path / "again", {"seed": 3})
    assert (tmp_path / "again").read_bytes() == patch.read_bytes()
    assert again.about == {"seed": 3} and again.kind == "difference"
    for name, x in Checkpoint(base).tensors.items():
        assert again.tensors[name].before == x.sha256()
        assert again.tensors[name].after == Checkpoint(model).tensors[name].sha256()
    lines = "\n".join(inspect(patch))
    assert "seed: 3" in lines and PATCHED in lines and files.file_sha256(patch) in lines


def test_the_reader_in_the_docs(tmp_path):
    """docs/patch_file.md has a reader of ten lines: it must read what we write, also gaps of more
    than one byte."""
    text = (ROOT / "docs" / "patch_file.md").read_text()
    exec(text.partition("```python\n")[2].partition("```")[0], names := {})
    rng = np.random.default_rng(0)
    before = np.arange(50_000, dtype=np.uint16)
    after = before ^ ((rng.random(50_000) < 0.004) * rng.integers(1, 2**16, 50_000)).astype(
        np.uint16
    )
    folders = [
        folder_of(tmp_path / n, {"x": x}, "bfloat16") for n, x in (("a", before), ("b", after))
    ]
    create(*folders, tmp_path / "patch")
    held = load_file(tmp_path / "patch")
    assert len(held["x.positions"]) > 1.5 * len(held["x.bits"])
    names["apply"]("x", before, held)
    np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("dtype, limit", [("bfloat16", 3.5), ("float16", 3.5), ("float32", 5.5)])
def test_bytes_of_an_entry_at_one_percent(tmp_path, dtype, limit):
    rng = np.random.default_rng(0)
    before = {
        f"layer.{i}": rng.integers(0, 2**16, (512, 1024)).astype(BITS[dtype]) for i in range(4)
    }
    after = {n: x ^ (rng.random(x.shape) < 0.01).astype(x.dtype) for n, x in before.items()}
    patch = create(
        folder_of(tmp_path / "a", before, dtype),
        folder_of(tmp_path / "b", after, dtype),
        tmp_path / "patch",
    )
    assert 20_000 < patch.entries() < 22_000
    assert (tmp_path / "patch").stat().st_size / patch.entries() < limit


def test_no_patch_between_equal_or_unlike_models(pair, tmp_path):
    base, model, patch = pair
    for other, message in (
        (base, "equal, bit for bit"),
        (write_tiny_model(tmp_path / "f", dtype="float32"), "export.dtype=keep"),
        (
            write_tiny_model(tmp_path / "l", dtype="bfloat16", num_hidden_layers=1),
            f"is in {base} alone",
        ),
        (write_tiny_model(tmp_path / "s", dtype="bfloat16", intermediate_size=32), "has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            create(base, other, tmp_path / "new")
    with pytest.raises(ValueError, match="exists; nothing was written"):
        create(base, model, patch)
    with pytest.raises(ValueError, match="must be JSON"):
        create(base, model, tmp_path / "new", {"nll": float("nan")})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "f", "l", "model", "s", "x.patch"]


def test_what_exports_leave_out(tmp_path):
    """Rotary frequencies stay, and a tied head that was written again changes as the embedding
    does."""
    base = write_tiny_model(tmp_path / "base")
    model = patched_copy(base, tmp_path / "model", only="embed_tokens")
    tensors = load_file(base / SINGLE)
    save_file(
        tensors
        | {
            "lm_head.weight": tensors["model.embed_tokens.weight"],
            "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
        },
        base / SINGLE,
    )
    create(base, model, tmp_path / "patch")
    apply(tmp_path / "patch", base)
    applied, wanted = load_file(base / SINGLE), load_file(model / SINGLE)
    for name in applied.keys() - wanted.keys():
        wanted[name] = (
            wanted["model.embed_tokens.weight"]
            if name == "lm_head.weight"
            else np.ones(4, np.float32)
        )
    for name, x in applied.items():
        np.testing.assert_array_equal(x.view(np.uint32), wanted[name].view(np.uint32))
    revert(tmp_path / "patch", model)  # which lacks them
    assert load_file(model / SINGLE).keys() == tensors.keys()
    for name, x in load_file(model / SINGLE).items():
        np.testing.assert_array_equal(x, tensors[name])


def test_a_patch_of_torch_weights(tmp_path):
    """The backbone of the comparison may be in torch's format; the patch then goes onto its
    safetensors conversion."""
    torch = pytest.importorskip("torch", reason="writes torch weights: pip install torch")
    base = write_tiny_model(tmp_path / "base")
    (tmp_path / "bin").mkdir()
    torch.save(
        {n: torch.tensor(x) for n, x in load_file(base / SINGLE).items()},
        tmp_path / "bin" / "pytorch_model.bin",
    )
    model = patched_copy(base, tmp_path / "model")
    create(tmp_path / "bin", model, tmp_path / "patch")
    apply(tmp_path / "patch", base)
    assert_same(base, model)


def test_create_on_a_full_disk_or_killed_leaves_no_patch(pair, tmp_path):
    base, model, _ = pair
    before = sorted(p.name for p in tmp_path.iterdir())
    for action in ("IGN", "DFL"):
        done = python(
            "import resource, signal, sys; from safepatch_jax.patch_file.create import create\n"
            f"signal.signal(signal.SIGXFSZ, signal.SIG_{action})\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
            "try: create(*sys.argv[1:4])\nexcept OSError as error: print(error)",
            base,
            model,
            tmp_path / "new",
        )
        if action == "IGN":
            assert (
                f"Cannot make the patch file {tmp_path / 'new'}" in done.stdout
                and "Free space" in done.stdout
            ), done
            assert sorted(p.name for p in tmp_path.iterdir()) == before
        else:
            assert done.returncode == -signal.SIGXFSZ and not (tmp_path / "new").exists()
    create(base, model, tmp_path / "new")  # removes what the killed one left
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*before, "new"])
