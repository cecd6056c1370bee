"""Damaged and hostile patch files, full disks, and processes killed at any moment."""

import json
import signal

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from safepatch_jax.io.safetensors_file import INDEX
from safepatch_jax.patch_file.apply import apply, revert, verify
from safepatch_jax.patch_file.create import create
from safepatch_jax.patch_file.file import PatchFile, inspect
from safepatch_jax.runtime import files
from tests.patch_file.models import PATCHED, assert_same, copied, python


def rewritten(path, out, change):
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
        lambda: inspect(bad),
        lambda: verify(bad, base),
    ):
        with pytest.raises(ValueError, match=message):
            use()
    assert files.folder_hashes(base) == start


@pytest.mark.parametrize("cut", [0, 7, 100, -1])
def test_truncated_patch_file(pair, tmp_path, cut):
    bad = tmp_path / "bad"
    bad.write_bytes(pair[2].read_bytes()[:cut])
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        PatchFile(bad)


def test_no_patch_file(pair, tmp_path):
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
