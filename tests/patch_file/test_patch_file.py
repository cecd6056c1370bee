"""The patch file: apply gives the patched model's bits, revert the backbone's, whatever they are,
killed at any moment."""

import itertools
import json
import pathlib
import signal
import subprocess
import sys
import threading
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from safepatch_jax.io.folder import Checkpoint
from safepatch_jax.io.safetensors_file import INDEX, SINGLE
from safepatch_jax.models.families import FAMILIES
from safepatch_jax.patch_file import file as patch_file
from safepatch_jax.patch_file import positions
from safepatch_jax.patch_file.apply import apply, revert, verify
from safepatch_jax.patch_file.arithmetic import combine, scale
from safepatch_jax.patch_file.file import PatchFile, create
from safepatch_jax.runtime import files
from safepatch_jax.testing import write_tiny_model

ROOT = pathlib.Path(__file__).parents[2]
DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
BITS = {"float32": np.uint32, "bfloat16": np.uint16, "float16": np.uint16}
CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
PATCHED = "model.layers.1.mlp.up_proj.weight"


def folder_of(path, tensors, dtype):
    """A folder of weights given as bits."""
    path.mkdir(parents=True)
    save_file(
        {name: x.view(DTYPES[dtype]) for name, x in tensors.items()},
        path / SINGLE,
        metadata={"format": "pt"},
    )
    return path


def bits_of(folder):
    """Every tensor as bits, by name, and the file that holds it."""
    return {
        name: (x.path.name, x.dtype, x.read().view(BITS[x.dtype]))
        for name, x in Checkpoint(folder).tensors.items()
    }


def assert_same(folder, other, files_too=True):
    ours, theirs = bits_of(folder), bits_of(other)
    assert ours.keys() == theirs.keys()
    for name, (file, dtype, bits) in ours.items():
        assert (file if files_too else "", dtype) == (
            theirs[name][0] if files_too else "",
            theirs[name][1],
        )
        np.testing.assert_array_equal(bits, theirs[name][2], err_msg=name)


def python(code, *args):
    """Run a program in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], cwd=ROOT, capture_output=True, text=True
    )


def copied(folder, out):
    out.mkdir()
    for path in folder.iterdir():
        files.copy(path, out / path.name)
    return out


def patched_copy(folder, out, density=0.05, seed=0, only="proj"):
    """A model that differs in some entries of the block's linear layers, by random bits."""
    rng = np.random.default_rng(seed)
    copied(folder, out)
    for path in out.glob("*.safetensors"):
        tensors = load_file(path)
        for name, x in tensors.items():
            if only in name:
                bits = x.view(BITS[str(x.dtype)])
                bits ^= np.where(
                    rng.random(x.shape) < density, rng.integers(1, 2**12, x.shape), 0
                ).astype(bits.dtype)
        save_file(tensors, path, metadata={"format": "pt"})
    return out


@pytest.fixture
def pair(tmp_path):
    """A backbone in several files, a patched model, and the patch between them."""
    base = write_tiny_model(tmp_path / "base", dtype="bfloat16", shard_bytes=16_000)
    model = patched_copy(base, tmp_path / "model")
    create(base, model, tmp_path / "x.patch", {"seed": 3})
    return base, model, tmp_path / "x.patch"


# Positions


@given(
    st.lists(st.integers(0, 300) | st.integers(0, positions.LIMIT // 64), max_size=60),
    st.integers(1, 30),
)
def test_positions_round_trip_in_pieces(gaps, cut):
    wanted = np.cumsum(np.array(gaps, np.int64) + 1) - 1
    data = np.concatenate(
        [
            positions.encode(part, last)
            for part, last in (
                (wanted[:cut], -1),
                (wanted[cut:], wanted[:cut][-1] if len(wanted) > cut else -1),
            )
        ]
    )
    assert len(data) == sum(max(1, -(-int(g).bit_length() // 7)) for g in gaps)
    got, last, at = [], -1, 0
    for size in itertools.cycle((1, 7, 64)):
        where, used = positions.decode(data[at : at + size], last)
        got, last, at = got + where.tolist(), int(where[-1]) if len(where) else last, at + used
        if at == len(data):
            break
    assert got == wanted.tolist()


@pytest.mark.parametrize(
    "data, gaps", [([0], [0]), ([0x7F], [127]), ([0x80, 1], [128]), ([0xE5, 0x8E, 0x26], [624485])]
)
def test_positions_are_leb128(data, gaps):
    assert positions.encode(np.cumsum(np.array(gaps) + 1) - 1).tolist() == data
    assert positions.decode(np.array(data, np.uint8))[0].tolist() == gaps


@pytest.mark.parametrize(
    "data, message",
    [([0x80, 0], "shortest"), ([0x80] * 6 + [1], "more than 6"), ([0x80] * 9, "more than 6")],
)
def test_positions_that_are_not_coded_right(data, message):
    with pytest.raises(ValueError, match=message):
        positions.decode(np.array(data, np.uint8))


# Round trips


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


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
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
    assert (
        set(outcome.moved) == set(PatchFile(tmp_path / "patch").changed())
        and PATCHED in outcome.moved
    )
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


# What is refused


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


def rewritten(path, out, change=lambda manifest, tensors: None, cut=None):
    """A patch file with another manifest or other contents."""
    with safe_open(path, "np") as file:
        manifest = json.loads(file.metadata()["safepatch"])
    tensors = load_file(path)
    text = change(manifest, tensors)
    save_file(
        tensors,
        out,
        metadata={"safepatch": text if isinstance(text, str) else json.dumps(manifest)},
    )
    if cut:
        out.write_bytes(out.read_bytes()[:cut])
    return out


def entry(**changes):
    return lambda m, t: m["tensors"][PATCHED].update(changes)


def positions_of(edit):
    def change(manifest, tensors):
        tensors[PATCHED + ".positions"] = edit(tensors[PATCHED + ".positions"].copy())

    return change


def set_at(index, value):
    def edit(x):
        x[index] = value
        return x

    return edit


HOSTILE = {
    "no JSON": (lambda m, t: "{", "not valid JSON"),
    "deep JSON": (lambda m, t: "[" * 200_000, "not valid JSON"),
    "a list": (lambda m, t: "[]", "is not of format 1"),
    "format": (lambda m, t: m.update(format=2), "is not of format 1"),
    "kind": (lambda m, t: m.update(kind=["difference"]), "one of the kinds"),
    "no tensors": (lambda m, t: m.pop("tensors"), "lacks about, versions or tensors"),
    "an empty list": (lambda m, t: m.update(tensors={}), "holds more than its manifest lists"),
    "not listed": (
        lambda m, t: t.update(more=np.ones(3, np.uint8)),
        "holds more than its manifest lists: 'more'",
    ),
    "unknown key": (entry(path="/etc/passwd"), "in an unknown way"),
    "positions in the manifest": (entry(positions=[1]), "in a way that cannot be"),
    "no hash": (lambda m, t: m["tensors"][PATCHED].pop("after") and None, "in an unknown way"),
    "bad hash": (entry(after="x" * 64), "in a way that cannot be"),
    "equal hashes": (
        lambda m, t: m["tensors"][PATCHED].update(after=m["tensors"][PATCHED]["before"]),
        "that cannot be",
    ),
    "dtype": (entry(dtype="int8"), "in a way that cannot be"),
    "dtype of another size": (entry(dtype="float32"), "as U32 are not both there"),
    "negative shape": (entry(shape=[-32, -64]), "in a way that cannot be"),
    "huge shape": (entry(shape=[2**40, 2**40]), "in a way that cannot be"),
    "float shape": (entry(shape=[32.0, 64]), "in a way that cannot be"),
    "more entries than the tensor has": (entry(entries=10**6), "in a way that cannot be"),
    "fewer entries": (entry(entries=1), "1 bits as U16 are not both there"),
    "true entries": (entry(entries=True), "in a way that cannot be"),
    "no positions": (lambda m, t: t.pop(PATCHED + ".positions"), "are not both there"),
    "positions of another dtype": (positions_of(lambda x: x.astype(np.int8)), "positions as U8"),
    "position outside": (positions_of(set_at(-1, 0x7F)), "outside the tensor|positions for"),
    "far outside": (
        positions_of(lambda x: np.append(x[:-1], [0xFF] * 5 + [0x7F]).astype(np.uint8)),
        "outside the tensor",
    ),
    "ends within": (positions_of(set_at(-1, 0x80)), "end within a position"),
    "endless": (positions_of(lambda x: np.full(4000, 0x80, np.uint8)), "more than 6 bytes"),
    "fewer positions": (positions_of(lambda x: x[:-1]), "positions for"),
    "more positions": (
        positions_of(lambda x: np.append(np.zeros(1, np.uint8), x)),
        "or there are more than",
    ),
    "bits of no change": (
        lambda m, t: t.update({PATCHED + ".bits": np.zeros_like(t[PATCHED + ".bits"])}),
        "changes no bit",
    ),
    "a terminal's control codes": (
        lambda m, t: m["tensors"].update({"\x1b[2J": m["tensors"].pop(PATCHED)}),
        r"'\\x1b\[2J'",
    ),
}


@pytest.mark.parametrize("change, message", HOSTILE.values(), ids=HOSTILE)
def test_hostile_contents(pair, tmp_path, change, message):
    base, _, patch = pair
    start = files.folder_hashes(base)
    bad = rewritten(patch, tmp_path / "bad", change)
    for use in (
        lambda: apply(bad, base),
        lambda: patch_file.inspect(bad),
        lambda: verify(bad, base),
    ):
        with pytest.raises(ValueError, match=message):
            use()
    assert files.folder_hashes(base) == start


@pytest.mark.parametrize("cut", [0, 7, 100, -1])
def test_truncated_patch_file(pair, tmp_path, cut):
    bad = rewritten(pair[2], tmp_path / "bad")
    bad.write_bytes(bad.read_bytes()[:cut])
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        PatchFile(bad)
    with pytest.raises(ValueError, match="but no patch"):
        PatchFile(next(pair[0].glob("*.safetensors")))
    with pytest.raises(ValueError, match="No patch file"):
        PatchFile(tmp_path / "absent")


def test_bits_that_do_not_lead_to_the_hash_are_found_before_the_file_is_replaced(pair, tmp_path):
    base, _, patch = pair

    def flip(manifest, tensors):
        tensors[PATCHED + ".bits"] = tensors[PATCHED + ".bits"] ^ np.uint16(1 << 14)

    start = files.folder_hashes(base)
    bad = rewritten(patch, tmp_path / "bad", flip)
    with pytest.raises(ValueError, match=f"{PATCHED} does not become what the manifest"):
        apply(bad, base, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="was left as it is"):
        apply(bad, base)
    assert all(not p.name.endswith(".patching") for p in base.iterdir())
    revert(patch, base)  # shards before the one with the fault were patched, rightly
    assert files.folder_hashes(base) == start


# In place: interrupted, finished, undone

RUN = """
import os, signal, sys
from safepatch_jax.patch_file import apply as patch_apply
events = 0
def hook(event, args):
    global events
    if event in ("open", "os.rename", "os.remove") and sys.argv[3] in str(args[0]):
        events += 1
        if events == int(sys.argv[4]):
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
patch_apply.apply(sys.argv[1], sys.argv[2])
"""


def killed_apply(patch, folder, at):
    """Apply in a process that is killed when it opens, renames or removes a file of the folder for
    the `at`-th time."""
    done = python(RUN, patch, folder, folder, at)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode != 0


def test_killed_at_any_moment_then_finished_or_undone(pair, tmp_path):
    base, model, patch = pair
    start, mixed = files.folder_hashes(base), 0
    for at in (1, 20, *range(33, 500, 2)):
        folder = copied(base, tmp_path / f"killed {at}")
        killed = killed_apply(patch, folder, at)
        states = set(verify(patch, folder).values())
        assert "neither" not in states
        mixed += {"before", "after"} <= states
        finished = copied(folder, tmp_path / f"finished {at}")
        apply(patch, finished)
        assert_same(finished, model)
        revert(patch, folder)
        assert files.folder_hashes(folder) == start
        assert files.folder_hashes(finished).keys() == start.keys()
        if not killed:
            break
    assert not killed and mixed >= 3


@pytest.mark.parametrize("ending", ["full disk", "killed while writing"])
def test_stopped_within_a_weight_file_then_finished_or_undone(tmp_path, ending):
    """A limit on the size of files stands for the full disk, or kills; it is hit within the second
    weight file."""
    base, model = tmp_path / "base", tmp_path / "model"
    for folder, step in ((base, 0), (model, 1)):
        folder.mkdir()
        for i, size in ((1, 1000), (2, 50_000)):
            x = np.arange(step, size + step, dtype=np.float32)
            save_file({f"x{i}": x}, folder / f"model-0000{i}-of-00002.safetensors")
        files.write_json(
            folder / INDEX,
            {"weight_map": {f"x{i}": f"model-0000{i}-of-00002.safetensors" for i in (2, 1)}},
        )
    create(base, model, tmp_path / "patch")
    start = files.folder_hashes(base)
    code = (
        "import resource, signal, sys; from safepatch_jax.patch_file.apply import apply\n"
        f"signal.signal(signal.SIGXFSZ, signal.SIG_{'IGN' if ending == 'full disk' else 'DFL'})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: apply(*sys.argv[1:3])\nexcept OSError as error: print(error)"
    )
    for finish in (revert, apply):
        done = python(code, tmp_path / "patch", base)
        left = sorted(p.name for p in base.iterdir() if p.name.startswith("."))
        if ending == "full disk":
            assert done.returncode == 0 and "File too large. It needs 200,0" in done.stdout, done
            assert (
                "1 of 2 weight files are done" in done.stdout
                and "the same command again finishes" in done.stdout
            )
            assert left == []
        else:
            assert done.returncode == -signal.SIGXFSZ and left == [
                ".model-00002-of-00002.safetensors.patching",
                ".patching",
            ]
        assert verify(tmp_path / "patch", base) == {"x1": "after", "x2": "before"}
        finish(tmp_path / "patch", base)
        assert_same(base, model) if finish is apply else None
        assert finish is apply or files.folder_hashes(base) == start
    assert files.folder_hashes(base).keys() == start.keys()


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


# Making and arithmetic


def test_the_file_says_what_it_is_and_is_the_same_each_time(pair, tmp_path):
    base, model, patch = pair
    again = create(base, model, tmp_path / "again", {"seed": 3})
    assert (tmp_path / "again").read_bytes() == patch.read_bytes()
    assert again.about == {"seed": 3} and again.kind == "difference"
    for name, x in Checkpoint(base).tensors.items():
        assert again.tensors[name].before == x.sha256()
        assert again.tensors[name].after == Checkpoint(model).tensors[name].sha256()
    lines = "\n".join(patch_file.inspect(patch))
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


def test_create_on_a_full_disk_or_killed_leaves_no_patch(pair, tmp_path):
    base, model, _ = pair
    before = sorted(p.name for p in tmp_path.iterdir())
    for action in ("IGN", "DFL"):
        done = python(
            "import resource, signal, sys; from safepatch_jax.patch_file.file import create\n"
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


def values(folder, name):
    _, dtype, bits = bits_of(folder)[name]
    return bits.view(DTYPES[dtype]).astype(np.float32)


def finite_pair(tmp_path, dtype, seeds=(1,)):
    """A backbone and models whose entries moved a little, as fine-tuning does, and one each so far
    that no sum is exact."""
    rng = np.random.default_rng(0)
    draw = lambda size, shape: (size * rng.standard_normal(shape)).astype(np.float32)
    base = {"a": draw(0.02, (60, 70)), "b": draw(1, 50), "c": draw(1, 9)}
    base["b"][:4] = 1000
    base = {n: x.astype(DTYPES[dtype]) for n, x in base.items()}
    folder_of(tmp_path / "base", {n: x.view(BITS[dtype]) for n, x in base.items()}, dtype)
    folders = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        model = {
            n: np.where(
                rng.random(x.shape) < 0.3, x.astype(np.float32) + draw(1e-3, x.shape), x
            ).astype(x.dtype)
            if n != "c"
            else x
            for n, x in base.items()
        }
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
    for call, message in (
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
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert not out.exists()
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".partial")]
