"""A patch on a live torch model: how long apply and revert take, and what they change.

  python -m benchmarks.hot_patch --model=DIR               # a Hugging Face folder, a minute

Changes the sign of a random 1 % of the entries of a copy of the model, makes the patch of the two,
and loads the model with transformers. The patch is applied to the live model and reverted, several
times; bits are compared with the exported folder and with the backbone, greedy text is generated
before, between and after. The floor of `bytes` is the time of reading the model once and the
changed entries twice, and of writing these, at the speed of a copy in memory; that of `hashes` the
time of one SHA-256 of every tensor, and a second one of those that change. Needs torch.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import pathlib
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable

import numpy as np
from absl import app, flags

from benchmarks.common import machine
from safepatch_jax.io.folder import Checkpoint
from safepatch_jax.patch_file.apply import apply
from safepatch_jax.patch_file.create import create
from safepatch_jax.patch_file.file import BITS, PatchFile, runs_of
from safepatch_jax.patch_file.tensors import apply_tensors, revert_tensors

_MODEL = flags.DEFINE_string("model", None, "A Hugging Face folder.", required=True)
_DENSITY = flags.DEFINE_float("density", 0.01, "Share of the entries that change.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Times each figure is taken.", lower_bound=1)
_TOKENS = flags.DEFINE_integer("tokens", 16, "Generated after the prompt.", lower_bound=1)
_PROMPT = flags.DEFINE_string("prompt", "The capital of France is", "What is continued.")
_SAMPLE = 1 << 28  # bytes of which speeds are taken


def write_variant(base: pathlib.Path, out: pathlib.Path, density: float) -> None:
    """Copy a model and change the sign of some entries of each tensor."""
    shutil.copytree(base, out)
    rng = np.random.default_rng(0)
    for tensor in Checkpoint(out).tensors.values():
        with open(tensor.path, "rb+") as file:
            file.seek(tensor.offset)
            for bits in runs_of(tensor):
                sign = np.array(1 << 8 * bits.itemsize - 1, BITS[tensor.dtype])
                bits ^= np.where(rng.random(len(bits), np.float32) < density, sign, 0).astype(
                    sign.dtype
                )
                file.write(bits.tobytes())


def speeds() -> tuple[float, float]:
    """Return the bytes a second of a copy in memory (read and written) and of SHA-256."""
    source = np.ones(_SAMPLE, np.uint8)
    target = np.ones_like(source)
    copying, hashing = [], []
    for _ in range(3):
        start = time.perf_counter()
        np.copyto(target, source)
        copying.append(time.perf_counter() - start)
        start = time.perf_counter()
        hashlib.sha256(memoryview(source)).digest()
        hashing.append(time.perf_counter() - start)
    return 2 * _SAMPLE / min(copying), _SAMPLE / min(hashing)


def floors(patch: PatchFile) -> dict[str, float]:
    """Return the seconds below which nothing that reads or hashes every tensor can be."""
    copy, sha256 = speeds()
    model = changed = entries = 0
    for tensor in patch.tensors.values():
        size = BITS[tensor.dtype].itemsize
        model += tensor.size * size
        changed += tensor.size * size * bool(tensor.entries)
        entries += tensor.entries * size
    return {"bytes": (model + 3 * entries) / copy, "hashes": (model + changed) / sha256}


def resident(field: str) -> int:
    """Return bytes of /proc/self/status."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) << 10
    raise ValueError(f"/proc/self/status has no {field}")


def measured(call: Callable[[], object]) -> tuple[float, float, int]:
    """Return seconds, CPU seconds, and bytes of memory that were held above those before."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else memory that was freed before hides what is taken
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before, wall, cpu = resident("VmRSS"), time.perf_counter(), time.process_time()
    call()
    spent = time.perf_counter() - wall, time.process_time() - cpu
    return *spent, resident("VmHWM") - before


def differing(state, folder: pathlib.Path) -> int:
    """Return how many tensors of a live model differ in a bit from those of a folder."""
    import torch

    count = 0
    for name, tensor in Checkpoint(folder).tensors.items():
        ours = state[name].detach().contiguous().view(torch.uint8).numpy().reshape(-1)
        count += not np.array_equal(ours, tensor.read().view(np.uint8).reshape(-1))
    return count


def generate(model, tokenizer) -> str:
    ids = tokenizer(_PROMPT.value, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=_TOKENS.value, do_sample=False)
    return tokenizer.decode(out[0][ids["input_ids"].shape[1] :])


def main(_) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = pathlib.Path(_MODEL.value)
    with tempfile.TemporaryDirectory() as place:
        variant, exported = pathlib.Path(place, "variant"), pathlib.Path(place, "exported")
        write_variant(base, variant, _DENSITY.value)
        patch = create(base, variant, pathlib.Path(place, "x.patch"))
        shutil.rmtree(variant)
        apply(patch.path, base, exported)
        model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(base)
        texts, taken = [generate(model, tokenizer)], {"apply": [], "revert": []}
        wrong = {"apply": 0, "revert": 0}
        for _ in range(_REPEATS.value):
            for verb, move, folder in (
                ("apply", apply_tensors, exported),
                ("revert", revert_tensors, base),
            ):
                taken[verb].append(measured(lambda move=move: move(patch, model.state_dict())))
                wrong[verb] += differing(model.state_dict(), folder)
                if len(texts) < 3:
                    texts.append(generate(model, tokenizer))
        report(patch, taken, wrong, texts, floors(patch))


def report(patch: PatchFile, taken: dict, wrong: dict, texts: list[str], least: dict) -> None:
    total = sum(tensor.size * BITS[tensor.dtype].itemsize for tensor in patch.tensors.values())
    print(f"{machine()}; model {total / 1e6:,.0f} MB, {patch.entries():,} entries change\n")
    print("| | seconds | least - most | CPU seconds | extra memory, MB | tensors that differ |")
    print("|---|---|---|---|---|---|")
    for verb, runs in taken.items():
        seconds, cpu, extra = zip(*runs)
        spread = f"{min(seconds):.2f} - {max(seconds):.2f}"
        print(
            f"| {verb} | {statistics.median(seconds):.2f} | {spread} | "
            f"{statistics.median(cpu):.2f} | {max(extra) / 1e6:,.0f} | {wrong[verb]} |"
        )
    for name, seconds in least.items():
        print(f"| floor: {name} | {seconds:.2f} | | | | |")
    for when, text in zip(("before", "patched", "reverted"), texts):
        print(f"\n{when}: {text!r}")
    if any(wrong.values()) or texts[0] == texts[1] or texts[0] != texts[2]:
        raise SystemExit("bits or texts are not as they should be")


if __name__ == "__main__":
    app.run(main)
