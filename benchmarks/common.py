"""Parts that the benchmarks share: shapes of Llama models, the least work of a train step, sides
that take turns, and how a figure is printed.

Imports neither JAX nor torch, so that a side's memory is its own.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import pathlib
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

SHAPES = {  # hidden, feed-forward, heads, KV heads, vocabulary, blocks
    "1b": (2048, 5632, 32, 4, 32000, 22),
    "7b": (4096, 11008, 32, 32, 32000, 32),
    "8b": (4096, 14336, 32, 8, 128256, 32),
    "135m": (576, 1536, 9, 3, 49152, 30),
    "362m": (960, 2560, 15, 5, 49152, 32),
    "tiny": (64, 176, 4, 2, 512, 2),
}
BEGINS = re.compile(r"^(\S+): running(?:,|$)")  # the line with which a run begins a stage
TIED = ("135m", "362m")  # their head is the embedding

# Dense bfloat16 FLOP/s of GPUs by a part of their name, the longer names first; TF32 has half.
PEAKS = {
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
}


def rated_flops(kind: str, dtype: str) -> float | None:
    """Return the data sheet's FLOP/s of a GPU in an arithmetic, None where its name is unknown."""
    rated = next((x for name, x in PEAKS.items() if name in kind), None)
    return rated if rated is None or dtype == "bfloat16" else rated / 2


def needed_flops(config: Any, batch: int, length: int, answer: int) -> float:
    """Return the FLOPs that a train step cannot do without: 6 a weight of the blocks and token, 6 a
    weight of the head and answer token, and attention's lower triangle.

    Args:
      config: a DecoderConfig.
      batch, length, answer: sequences, tokens of each, answer tokens of each.
    """
    from safepatch_jax.planning.needs import train_flops

    return train_flops(config, batch, length, answer)


def raw_config(shape: str, layers: int | None, dtype: str = "float32") -> dict[str, Any]:
    """Return the config.json of a Llama of this shape, with so many blocks (None: all)."""
    hidden, mlp, heads, kv_heads, vocab, blocks = SHAPES[shape]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers or blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": shape in TIED,
        "torch_dtype": dtype,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def machine() -> str:
    """Return cores, instruction set, and load over the last minute, to stand beside figures."""
    flags: set[str] = set()
    with contextlib.suppress(OSError):
        flags |= set(pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    known = {"avx512f": "AVX-512", "avx2": "AVX2", "asimd": "NEON"}
    found = (name for flag, name in known.items() if flag in flags)
    cores = len(os.sched_getaffinity(0))
    return f"{cores} cores, {next(found, 'unknown instructions')}, load {os.getloadavg()[0]:.1f}"


def available() -> int:
    """Return the bytes of memory that the machine has left."""
    text = pathlib.Path("/proc/meminfo").read_text()
    return 1024 * int(re.search(r"MemAvailable:\s+(\d+)", text).group(1))


def read_speed(size: int = 1 << 29) -> float:
    """Return the bytes a second at which all cores together read memory that is mapped already:
    the best of five passes over so many bytes."""
    import numpy as np

    cores = len(os.sched_getaffinity(0))
    parts = np.array_split(np.ones(size // 4, np.float32), 8 * cores)
    with concurrent.futures.ThreadPoolExecutor(cores) as pool:
        seconds = []
        for _ in range(5):
            begun = time.perf_counter()
            list(pool.map(np.max, parts))
            seconds.append(time.perf_counter() - begun)
    return size / min(seconds)


def take_turns(sides: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Call the sides in turns; return {name: seconds of each call}."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            begun = time.perf_counter()
            side()
            times[name].append(time.perf_counter() - begun)
    return times


def spread(values: Sequence[float], form: str = ".0f") -> str:
    """Return median (least - most)."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} - {max(values):{form}})"


def on_disk(stages: pathlib.Path) -> dict[str, int]:
    """Return the bytes that are allocated in each folder of stages; half-made ones too, and a file
    that several hold once."""
    sizes: dict[str, int] = {}
    linked: set[int] = set()
    for root, _, names in os.walk(stages):
        parts = pathlib.Path(root).relative_to(stages).parts
        for name in names if parts else ():
            with contextlib.suppress(OSError):  # it was renamed or deleted
                status = os.lstat(os.path.join(root, name))
                if status.st_ino not in linked:
                    sizes[parts[0]] = sizes.get(parts[0], 0) + 512 * status.st_blocks
                if status.st_nlink > 1:
                    linked.add(status.st_ino)
    return sizes
