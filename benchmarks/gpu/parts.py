"""What is measured: the parts, their share of the time, and the shapes. Imports no JAX."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The shapes of all parts.

    Attributes:
      shape: of `benchmarks.common.SHAPES`.
      layers: blocks at most, where as many are taken as fit.
      dtype: of the arithmetic; weights as stored are bfloat16, trained ones float32.
      batch, length, answer: of a train step: sequences, tokens of each, answer tokens of each.
      steps: train steps that are timed.
      score: tokens and answer tokens of a sample.
      samples: scored in one timing.
      decode_batches, prompt, new: of decoding.
      file_layers: blocks of the model that is written and read.
      exact_layers, exact_length, exact_steps, exact_weights: of the parts that compare bits; each
        weight compiles for itself, twice in each way to merge.
      copy_bytes, product: of the array that is copied, and side of the matrices multiplied, for the
        machine's own speeds.
      repeats: of every other timing.
    """

    shape: str
    layers: int
    dtype: str
    batch: int
    length: int
    answer: int
    steps: int
    score: tuple[int, int]
    samples: int
    decode_batches: tuple[int, ...]
    prompt: int
    new: int
    file_layers: int
    exact_layers: int
    exact_length: int
    exact_steps: int
    exact_weights: tuple[str, ...]
    copy_bytes: int
    product: int
    repeats: int


SIZES = {
    "full": Sizes(
        shape="7b",
        layers=32,
        dtype="bfloat16",
        batch=8,
        length=2048,
        answer=512,
        steps=8,
        score=(512, 256),
        samples=32,
        decode_batches=(1, 16),
        prompt=128,
        new=128,
        file_layers=8,
        exact_layers=1,
        exact_length=512,
        exact_steps=4,
        exact_weights=("layers/attention/k", "layers/mlp/down"),
        copy_bytes=1 << 30,
        product=8192,
        repeats=3,
    ),
    "tiny": Sizes(
        shape="tiny",
        layers=2,
        dtype="float32",
        batch=2,
        length=16,
        answer=4,
        steps=3,
        score=(16, 8),
        samples=2,
        decode_batches=(1, 2),
        prompt=8,
        new=4,
        file_layers=2,
        exact_layers=1,
        exact_length=16,
        exact_steps=2,
        exact_weights=("layers/mlp/down",),
        copy_bytes=1 << 20,
        product=128,
        repeats=2,
    ),
}


@dataclasses.dataclass(frozen=True)
class Mode:
    """A way to take the train step: its title, and the settings of a run that choose it."""

    title: str
    settings: Mapping[str, Any]


# The train step in each of its ways, one part each.
MODES = {
    "adamw": Mode("whole tree, AdamW", {"derive.optimizer": "adamw"}),
    "adafactor": Mode("whole tree, Adafactor", {"derive.optimizer": "adafactor"}),
    "layerwise": Mode(
        "patch scope block by block, Adafactor, not clipped",
        {
            "derive.train": "scope",
            "derive.backward": "layerwise",
            "derive.optimizer": "adafactor",
            "derive.clip_norm": 0.0,
        },
    ),
}


@dataclasses.dataclass(frozen=True)
class Part:
    """One part, a process of its own.

    Attributes:
      title: for people.
      weight: its share of the time.
      module, arguments: `run(bench, *arguments)` of this module of the package.
      environment: variables that it needs.
    """

    title: str
    weight: float
    module: str
    arguments: tuple[Any, ...] = ()
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


def _parts() -> dict[str, Part]:
    result = {}
    for name, mode in MODES.items():
        result[f"train_{name}"] = Part(f"train step, {mode.title}", 6, "train", (name,))
    # Each process compiles for itself, as two runs on two machines do.
    afresh = {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    return result | {
        "score": Part("score pass", 4, "score"),
        "patch": Part("patch operation", 4, "patch"),
        "decode": Part("decode", 3, "decode"),
        "decode_hf": Part("decode, Hugging Face torch", 2, "decode_hf"),
        "import_export": Part("export and import", 3, "folders"),
        "cpu_bits": Part("selection and merge, bits beside the CPU's", 3, "cpu_bits"),
        "repeat": Part("training twice", 3, "repeat"),
        "repeat_again": Part("training twice, another process", 3, "repeat", (), afresh),
    }


PARTS = _parts()


def limit(name: str, names: list[str], seconds: float) -> float:
    """Return a part's share of the time that is left for it and the parts that follow it."""
    following = names[names.index(name) :]
    return seconds * PARTS[name].weight / sum(PARTS[other].weight for other in following)


def layers_that_fit(bytes_of: Callable[[int], int], memory: int, most: int) -> int:
    """Return how many blocks fit, at least 1, by a line through the bytes of 2 and of 4: XLA lays a
    loop over a single block out in another way."""
    two, four = bytes_of(2), bytes_of(4)
    further = 2 * (memory - two) // max(four - two, 1)
    return int(min(most, max(1, 2 + further)))
