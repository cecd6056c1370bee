"""The library as a notebook reads it: load, derive, score, patch, evaluate, compare.

Each call goes through the stages and functions of the launchers, so what one of them made the
other reuses. docs/api.md describes them; `import safepatch_jax as sp` has all names.
"""

from safepatch_jax.api.measures import (
    Comparison,
    Evaluation,
    Measured,
    Value,
    compare,
    evaluate,
)
from safepatch_jax.api.pair import Pair, Scores, Training, derive, score
from safepatch_jax.api.patches import Patch, patch, read_patch
from safepatch_jax.api.session import Model, load
from safepatch_jax.api.shown import Picture

__all__ = [
    "Comparison",
    "Evaluation",
    "Measured",
    "Model",
    "Pair",
    "Patch",
    "Picture",
    "Scores",
    "Training",
    "Value",
    "compare",
    "derive",
    "evaluate",
    "load",
    "patch",
    "read_patch",
    "score",
]
