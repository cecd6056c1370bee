"""The library as a notebook reads it: load, derive, score, patch, evaluate, compare.

Each call goes through the stages and functions of the launchers, so what one of them made the
other reuses. docs/api.md describes them; `import safepatch_jax as sp` has all names, listed there.
"""

from safepatch_jax.api.measures import Comparison as Comparison
from safepatch_jax.api.measures import Evaluation as Evaluation
from safepatch_jax.api.measures import Measured as Measured
from safepatch_jax.api.measures import Value as Value
from safepatch_jax.api.measures import compare as compare
from safepatch_jax.api.measures import evaluate as evaluate
from safepatch_jax.api.pair import Pair as Pair
from safepatch_jax.api.pair import Scores as Scores
from safepatch_jax.api.pair import Training as Training
from safepatch_jax.api.pair import derive as derive
from safepatch_jax.api.pair import score as score
from safepatch_jax.api.patches import Patch as Patch
from safepatch_jax.api.patches import patch as patch
from safepatch_jax.api.patches import read_patch as read_patch
from safepatch_jax.api.session import Model as Model
from safepatch_jax.api.session import load as load
from safepatch_jax.api.shown import Picture as Picture
