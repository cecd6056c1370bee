"""Apply gives the patched model's bits, revert the backbone's, whatever they are; other folders are
refused."""

import itertools
import threading
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safepatch_jax.io.safetensors_file import INDEX, SINGLE
from safepatch_jax.models.families import FAMILIES
from safepatch_jax.patch_file.apply import apply, revert, verify
from safepatch_jax.patch_file.create import create
from safepatch_jax.patch_file.file import PatchFile
from safepatch_jax.runtime import files
from safepatch_jax.testing import write_tiny_model
from tests.patch_file.models import (
    BITS,
    DTYPES,
    PATCHED,
    assert_same,
    bits_of,
    copied,
    folder_of,
    patched_copy,
    python,
)


@st.composite
def two_models(draw):
    """Two sets of tensors of random bits: NaN with payloads, infinities, -0.0; sparse, dense, no
    change; one element."""
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    before, after = {}, {}
    shapes = st.sampled_from([(), (1,), (0, 4), (7, 3), (40, 50), (1, 1, 5)])
    for i, shape in enumerate(draw(st.lists(shapes, min_size=1, max_size=4))):
        bits = rng.integers(0, 2 ** (8 * DTYPES[dtype].itemsize), shape).astype(BITS[dtype])
        mask = rng.random(shape) < draw(st.sampled_from([0, 0.01, 0.3, 1]))
        flips = (
            rng.integers(1, 2 ** (8 * DTYPES[dtype].itemsize), shape)
            if draw(st.booleans())
            else np.full(shape, 1)
        )
        before[f"{i}"], after[f"{i}"] = (
            np.asarray(bits),
            np.asarray(bits ^ np.where(mask, flips, 0).astype(bits.dtype)),
        )
    special = np.array([0x7FC00001, 0xFF800000, 0x80000000, 0, 0x7F800000], np.uint64) >> (
        0 if dtype == "float32" else 16
    )
    before["special"], after["special"] = (
        special.astype(BITS[dtype]),
        special[::-1].astype(BITS[dtype]),
    )
    return dtype, before, after


@settings(max_examples=60, deadline=None)
@given(two_models())
def test_revert_of_apply_is_the_backbone_bitwise(tmp_path_factory, models):
    dtype, before, after = models
    root = tmp_path_factory.mktemp("pair")
    base, model = folder_of(root / "base", before, dtype), folder_of(root / "model", after, dtype)
    patch = create(base, model, root / "patch")
    assert patch.entries() == sum(np.count_nonzero(before[n] != after[n]) for n in before)
    assert set(patch.changed()) == {n for n in before if np.any(before[n] != after[n])}
    apply(root / "patch", base, root / "applied")
    assert_same(root / "applied", model)
    apply(root / "patch", base)
    assert_same(base, model)
    revert(root / "patch", base)
    for name, (_, _, bits) in bits_of(base).items():
        np.testing.assert_array_equal(bits, before[name])


@pytest.mark.parametrize(
    "family, dtype, shard_bytes",
    [(family, "bfloat16", 20_000) for family in FAMILIES]
    + [("llama", "float32", 10**9), ("llama", "float16", 10**9)],
)
def test_model_folders_of_all_families(tmp_path, family, dtype, shard_bytes):
    base = write_tiny_model(
        tmp_path / "base", model_type=family, dtype=dtype, shard_bytes=shard_bytes
    )
    model = patched_copy(base, tmp_path / "model")
    create(base, model, tmp_path / "patch")
    start = files.folder_hashes(base)
    assert ((base / INDEX).exists(), (base / SINGLE).exists()) == (
        shard_bytes < 10**9,
        shard_bytes == 10**9,
    )
    apply(tmp_path / "patch", base, tmp_path / "applied")
    assert files.folder_hashes(base) == start
    wanted = {p.name for p in base.iterdir()}
    assert {p.name for p in (tmp_path / "applied").iterdir()} == wanted
    for name in wanted:
        if not name.endswith(".safetensors"):
            assert (tmp_path / "applied" / name).read_bytes() == (base / name).read_bytes(), name
    assert_same(tmp_path / "applied", model)
    outcome = apply(tmp_path / "patch", base)
    assert_same(base, model)
    assert PATCHED in outcome.moved
    assert set(outcome.moved) == set(PatchFile(tmp_path / "patch").changed())
    revert(tmp_path / "patch", base)
    assert files.folder_hashes(base) == start  # header, metadata and mode of every file too


def test_applied_folder_in_transformers_is_the_exported_model(pair, tmp_path):
    torch = pytest.importorskip("torch", reason="loads the folder with torch: pip install torch")
    from transformers import AutoModelForCausalLM

    base, model, patch = pair
    apply(patch, base, tmp_path / "applied")
    loaded = [
        AutoModelForCausalLM.from_pretrained(f, dtype=torch.bfloat16)
        for f in (tmp_path / "applied", model, base)
    ]
    ours, theirs, backbone = (m.state_dict() for m in loaded)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n].view(torch.int16), theirs[n].view(torch.int16)) for n in ours)
    assert not torch.equal(ours[PATCHED].view(torch.int16), backbone[PATCHED].view(torch.int16))
    tokens_BT = torch.arange(20).reshape(2, 10)
    logits = [m.eval()(tokens_BT).logits for m in loaded]
    assert torch.equal(logits[0], logits[1]) and not torch.equal(logits[0], logits[2])


def test_memory_does_not_grow_with_the_tensor(tmp_path):
    """Every third entry of a tensor of 64 MB changes; its positions would be 90 MB if all were
    decoded at once."""
    x = np.arange(1 << 25, dtype=np.uint32).astype(np.uint16)
    base = folder_of(tmp_path / "a", {"x": x}, "bfloat16")
    model = folder_of(tmp_path / "b", {"x": x ^ (x % 3 == 0)}, "bfloat16")
    del x
    tracemalloc.start()
    create(base, model, tmp_path / "patch")
    apply(tmp_path / "patch", base)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert verify(tmp_path / "patch", base) == {"x": "after"}
    assert peak < 50e6, peak


def test_neither_jax_nor_torch_is_needed(pair):
    base, model, patch = pair
    code = (
        "import sys; from safepatch_jax.patch_file.apply import apply, verify\n"
        "apply(*sys.argv[1:3]); verify(*sys.argv[1:3])\n"
        "from safepatch_jax.patch_file import arithmetic, file\nimport launch.patch\n"
        "print({'jax', 'jaxlib', 'flax', 'torch', 'transformers'} & set(sys.modules))"
    )
    done = python(code, patch, base)
    assert (done.returncode, done.stdout) == (0, "set()\n"), done.stderr
    assert_same(base, model)


def test_in_place_keeps_links_modes_and_the_card_and_removes_the_certificate(pair, tmp_path):
    """The Hugging Face cache holds weights as links to blobs that other snapshots share: those must
    not change."""
    base, model, patch = pair
    cache = tmp_path / "cache"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots").mkdir()
    (base / "certificate.json").write_text("{}")
    (base / "README.md").write_text("card")
    (cache / "snapshots" / "1").mkdir()
    for path in base.iterdir():
        files.copy(path, cache / "blobs" / path.name)
        (cache / "blobs" / path.name).chmod(0o640)
        (cache / "snapshots" / "1" / path.name).symlink_to(cache / "blobs" / path.name)
    start = files.folder_hashes(cache / "blobs")
    outcome = apply(patch, cache / "snapshots" / "1")
    assert (
        outcome.removed == ("certificate.json",)
        and not (cache / "snapshots" / "1" / "certificate.json").exists()
    )
    assert (cache / "snapshots" / "1" / "README.md").read_text() == "card"
    assert files.folder_hashes(cache / "blobs") == start
    assert_same(cache / "snapshots" / "1", model)
    assert {
        p.stat().st_mode & 0o777 for p in (cache / "snapshots" / "1").glob("*.safetensors")
    } == {0o640}
    assert apply(patch, cache / "snapshots" / "1").moved == ()


def test_what_lies_in_the_cache_of_the_hub_is_not_patched_in_place(pair, tmp_path):
    base, _, patch = pair
    folder = tmp_path / "models--org--base" / "snapshots" / (40 * "a")
    folder.parent.mkdir(parents=True)
    copied(base, folder)
    (folder / "LICENCE.md").write_text("terms")
    with pytest.raises(ValueError, match="is org/base@a{40} in the cache of the Hub.*--out"):
        apply(patch, folder)
    assert_same(folder, base)
    out = apply(patch, folder, tmp_path / "out").folder
    assert (out / "LICENCE.md").read_text() == "terms"


def test_two_processes_do_not_patch_one_folder_at_once(pair):
    base, model, patch = pair
    import fcntl

    with open(base / ".patching", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="being patched by another process"):
            apply(patch, base)
    errors, threads = [], [threading.Thread(target=lambda: attempt(errors)) for _ in range(4)]

    def attempt(errors):
        try:
            apply(patch, base)
        except ValueError as error:
            errors.append(str(error))

    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all("being patched by another process" in e for e in errors) and len(errors) < 4
    assert_same(base, model)
    assert not (base / ".patching").exists()


def test_another_backbone_is_refused_and_the_tensors_are_named(pair, tmp_path):
    base, model, patch = pair
    other = patched_copy(base, tmp_path / "other", only="layers.1.mlp.up_proj", seed=1)
    other = patched_copy(
        other, tmp_path / "another", only="norm.weight", seed=1
    )  # a tensor that the patch leaves alone
    start = files.folder_hashes(other)
    for move, out in itertools.product((apply, revert), (None, tmp_path / "out")):
        with pytest.raises(ValueError, match="neither as in the backbone") as raised:
            move(patch, other, out)
        assert PATCHED in str(raised.value) and "model.norm.weight" in str(raised.value)
        assert "down_proj" not in str(raised.value)
    assert files.folder_hashes(other) == start and not (tmp_path / "out").exists()
    states = verify(patch, other)
    assert states[PATCHED] == states["model.norm.weight"] == "neither"
    assert (
        states["model.layers.0.mlp.up_proj.weight"] == "before"
        and states["model.embed_tokens.weight"] == "same"
    )


@pytest.mark.parametrize(
    "changes, dtype, message",
    [
        ({"num_hidden_layers": 1}, "bfloat16", "model.layers.1.input_layernorm.weight is missing"),
        (
            {"num_hidden_layers": 3},
            "bfloat16",
            "model.layers.2.input_layernorm.weight is not in the patch",
        ),
        (
            {"intermediate_size": 32},
            "bfloat16",
            r"bfloat16 \[32, 32\], in the patch bfloat16 \[32, 64\]",
        ),
        ({}, "float32", r"is float32 \[32\], in the patch bfloat16 \[32\]"),
    ],
)
def test_another_model_is_refused(pair, tmp_path, changes, dtype, message):
    other = write_tiny_model(tmp_path / "other", dtype=dtype, **changes)
    with pytest.raises(ValueError, match=message):
        apply(pair[2], other)


def test_torch_weights_and_full_folders(pair, tmp_path):
    base, model, patch = pair
    with pytest.raises(ValueError, match="exists and is not empty"):
        apply(patch, base, model)
    with pytest.raises(ValueError, match="holds no weights"):
        apply(patch, tmp_path)
    torch = pytest.importorskip("torch", reason="writes torch weights: pip install torch")
    (tmp_path / "bin").mkdir()
    torch.save({"x": torch.ones(2)}, tmp_path / "bin" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="launch.convert --source=hf:"):
        apply(patch, tmp_path / "bin")
