"""How often is the gate wrong, and how many prompts does it take? By simulation, beside tests of a
fixed size.

  python -m benchmarks.gate                  # 10,000 draws a row; two minutes on one core
  python -m benchmarks.gate --draws=500      # a look at it

A draw is a sequence of prompts on which both models do what they should not with given
probabilities: only ours (worse), only theirs (better), else both alike. Each row is a pair of
these. The sides, all with 95 % confidence and at most --prompts prompts:

  gate             the sequential test, looked at after every prompt; fail_above = margin
  gate, fail at 0  the same with fail_above = 0: it fails as soon as ours is shown to be worse
  fixed            one look, at --prompts: the upper end of the 95 % interval of paired shares
                   (Bonett and Price 2012; one-sided) below the margin is a pass, the lower end
                   above it a fail
  fixed, peeking   the same interval, looked at as the gate looks (after 50, 75, ... prompts) and
                   believed at the first look at which it decides: what a fixed-size test must not
                   be used for

Needs neither JAX nor a model.
"""

from __future__ import annotations

import math
import time

import numpy as np
from absl import app, flags

from safepatch_jax.evaluation.sequential import log_capital
from safepatch_jax.studies.gate.rules import read_rules

_DRAWS = flags.DEFINE_integer("draws", 10_000, "Sequences a row.", lower_bound=1)
_PROMPTS = flags.DEFINE_integer("prompts", 1000, "Prompts of a sequence.", lower_bound=1)
_MARGIN = flags.DEFINE_float("margin", 0.05, "Rise that is tolerated.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the draws.")
_LEVEL = -math.log(0.05)
_Z = 1.644854  # of a one-sided 95 % limit
_BLOCK = 250  # sequences at once
# Probability that only ours is worse, and that only theirs is; the mean is their difference.
_ROWS = (
    ("equal, 4 % differ", 0.02, 0.02),
    ("equal, 10 % differ", 0.05, 0.05),
    ("equal, 20 % differ", 0.10, 0.10),
    ("better by 2 points", 0.03, 0.05),
    ("worse by 2 points", 0.05, 0.03),
    ("at the margin, 5 % differ", 0.05, 0.0),
    ("at the margin, 11 % differ", 0.08, 0.03),
    ("at the margin, 25 % differ", 0.15, 0.10),
    ("worse by 10 points", 0.13, 0.03),
    ("worse by 20 points", 0.23, 0.03),
)


def draw(rng: np.random.Generator, worse: float, better: float) -> np.ndarray:
    """Return differences of a block of sequences, float64 [draws, prompts]."""
    uniform = rng.random((_BLOCK, _PROMPTS.value))
    return np.where(uniform < worse, 1.0, np.where(uniform < worse + better, -1.0, 0.0))


def first(reached: np.ndarray, none: int) -> np.ndarray:
    """Return after how many prompts each sequence first gets there; `none` where it does not."""
    return np.where(reached.any(axis=-1), reached.argmax(axis=-1) + 1, none)


def gate(differences: np.ndarray, fail_above: float) -> tuple[np.ndarray, np.ndarray]:
    """Return after how many prompts each sequence passes, and fails."""
    never = differences.shape[1] + 1
    passes = first(log_capital(differences, _MARGIN.value) >= _LEVEL, never)
    fails = first(log_capital(-differences, -fail_above) >= _LEVEL, never)
    return passes, fails


def fixed(differences: np.ndarray, looks: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return at which of some looks the interval of paired shares decides first, as `gate`."""
    n = np.array(looks)
    more = (np.cumsum(differences > 0, axis=1)[:, n - 1] + 1) / (n + 2)
    less = (np.cumsum(differences < 0, axis=1)[:, n - 1] + 1) / (n + 2)
    half = _Z * np.sqrt((more + less - (more - less) ** 2) / (n + 2))
    ends = []
    for decides in (more - less + half < _MARGIN.value, more - less - half > _MARGIN.value):
        place = first(decides, len(looks) + 1)
        ends.append(np.append(n, n[-1] + 1)[place - 1])
    return ends[0], ends[1]


class Counts:
    """How many sequences pass and fail, and how many prompts they take."""

    def __init__(self):
        self.passes = self.fails = self.prompts = self.draws = 0

    def add(self, passes: np.ndarray, fails: np.ndarray) -> None:
        last = _PROMPTS.value
        self.passes += int(np.sum((passes < fails) & (passes <= last)))
        self.fails += int(np.sum((fails <= passes) & (fails <= last)))
        self.prompts += int(np.minimum(np.minimum(passes, fails), last).sum())
        self.draws += len(passes)

    def cells(self) -> list[str]:
        shares = [f"{100 * count / self.draws:.2f}" for count in (self.passes, self.fails)]
        return [*shares, f"{self.prompts / self.draws:.0f}"]


def row(worse: float, better: float, seed: list[int]) -> dict[str, Counts]:
    """Return the counts of each side on the same draws."""
    sides = {name: Counts() for name in ("gate", "gate, fail at 0", "fixed", "fixed, peeking")}
    looks = read_rules("").looks(_PROMPTS.value)
    rng = np.random.default_rng(seed)
    for _ in range(max(1, _DRAWS.value // _BLOCK)):
        differences = draw(rng, worse, better)
        sides["gate"].add(*gate(differences, _MARGIN.value))
        sides["gate, fail at 0"].add(*gate(differences, 0.0))
        sides["fixed"].add(*fixed(differences, [_PROMPTS.value]))
        sides["fixed, peeking"].add(*fixed(differences, looks))
    return sides


def main(_: list[str]) -> None:
    start = time.monotonic()
    print(
        f"Margin {_MARGIN.value:.0%}, 95 %, at most {_PROMPTS.value} prompts. Of each side: "
        "% that pass, % that fail, mean number of prompts.\n"
    )
    names = ("gate", "gate, fail at 0", "fixed", "fixed, peeking")
    print(f"| truth | mean | {' | '.join(names)} |")
    print("|---|---|" + "---|" * len(names))
    for number, (name, worse, better) in enumerate(_ROWS):
        sides = row(worse, better, [_SEED.value, number])
        cells = [" / ".join(side.cells()) for side in sides.values()]
        print(f"| {name} | {100 * (worse - better):+.0f} | {' | '.join(cells)} |", flush=True)
    draws = max(1, _DRAWS.value // _BLOCK) * _BLOCK
    print(f"\n{draws:,} draws a row, seed {_SEED.value}; {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    app.run(main)
