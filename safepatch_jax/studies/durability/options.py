"""How a durability study is done: what the models are treated with, and what is measured. Needs no
JAX."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from safepatch_jax.option import nearest

MARGINS, ANSWERS, BOTH = MEASURES = ("margins", "answers", "both")
NONE = "none"  # the treatment of what is measured before
FINETUNE = "finetune"
CASTS = {"bf16": "bfloat16", "fp16": "float16"}
DEFAULT = ("int8", "int4-g32", "int4-g128", "bf16", "fp16", FINETUNE)
_QUANTISED = re.compile(r"int(8|4)(?:-g([0-9]{1,6}))?(-asym)?")
_GROUP = 32  # of 4 bits
_KNOWN = (*DEFAULT, "int4-g32-asym", "int4-g128-asym", "int8-asym", "int8-g128")


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How the matrices are quantised, round to nearest.

    Attributes:
      bits: 8 or 4.
      group: input columns that share a scale; 0: all of an output channel.
      symmetric: the range is -m to m, m the largest magnitude; else the least to the largest
        weight, 0 included.
    """

    bits: int
    group: int = 0
    symmetric: bool = True


@dataclasses.dataclass(frozen=True)
class Treatment:
    """What both models are put through.

    Attributes:
      name: as it is given.
      scheme: of a quantisation, None of another.
      dtype: of a cast, '' of another.
    """

    name: str
    scheme: Scheme | None = None
    dtype: str = ""

    @property
    def trains(self) -> bool:
        return self.name == FINETUNE

    @classmethod
    def parse(cls, text: str) -> Treatment:
        """Read int8, int4 (groups of 32), int4-g128, int4-g32-asym and the like, bf16, fp16,
        finetune. Raises ValueError."""
        if text in CASTS:
            return cls(text, dtype=CASTS[text])
        if text == FINETUNE:
            return cls(text)
        match = _QUANTISED.fullmatch(text)
        if not match or match[2] and not int(match[2]):
            raise ValueError(
                f"--treatments: '{text}' is none{nearest(text, _KNOWN)}. There are "
                f"{', '.join(DEFAULT)}; int8 and int4 take -gN (weights that share a scale) and "
                "-asym behind them."
            )
        bits = int(match[1])
        default = _GROUP if bits == 4 else 0
        scheme = Scheme(bits, int(match[2] or default), not match[3])
        name = f"int{bits}" + (f"-g{scheme.group}" if scheme.group else "") + (match[3] or "")
        return cls(name, scheme)


@dataclasses.dataclass(frozen=True)
class DurabilityOptions:
    """How a durability study is done; the fields are the launcher's flags.

    Attributes:
      treatments: see `Treatment.parse`.
      measure: 'margins' (forward passes), 'answers' (written and judged) or 'both'.
      steps, learning_rate, batch_size, weight_decay, seed: of the benign fine-tuning.
      keep: write the treated models into the workdir.
    """

    treatments: tuple[str, ...] = DEFAULT
    measure: str = MARGINS
    steps: int = 24
    learning_rate: float = 2e-5
    batch_size: int = 8
    weight_decay: float = 0.0
    seed: int = 0
    keep: bool = False

    def __post_init__(self):
        if self.measure not in MEASURES:
            raise ValueError(f"--measure is one of {', '.join(MEASURES)}; got '{self.measure}'.")
        if not self.treatments:
            raise ValueError(f"--treatments names none. There are {', '.join(DEFAULT)}.")
        if self.steps < 1 or self.batch_size < 1 or self.seed < 0:
            raise ValueError(
                "--finetune.steps and --finetune.batch_size are 1 or more, --finetune.seed 0 or "
                f"more; got {self.steps}, {self.batch_size}, {self.seed}."
            )
        if not self.learning_rate > 0 or not self.weight_decay >= 0:
            raise ValueError(
                "--finetune.learning_rate is above 0 and --finetune.weight_decay 0 or more; got "
                f"{self.learning_rate:g} and {self.weight_decay:g}."
            )

    @property
    def kinds(self) -> tuple[str, ...]:
        """By what is measured: 'margins', 'answers'."""
        return (MARGINS, ANSWERS) if self.measure == BOTH else (self.measure,)

    def parsed(self) -> list[Treatment]:
        """Return the treatments, each once. Raises ValueError for one that there is not."""
        every = {}
        for text in self.treatments:
            treatment = Treatment.parse(text)
            every[treatment.name] = treatment
        return list(every.values())

    def finetuning(self) -> dict[str, Any]:
        """Return what decides the benign fine-tuning, beside settings."""
        names = ("steps", "learning_rate", "batch_size", "weight_decay", "seed")
        return {name: getattr(self, name) for name in names}
