"""What type checkers see of `safepatch_jax`: the names that are imported when first used."""

from safepatch_jax.api import Comparison as Comparison
from safepatch_jax.api import Evaluation as Evaluation
from safepatch_jax.api import Measured as Measured
from safepatch_jax.api import Model as Model
from safepatch_jax.api import Pair as Pair
from safepatch_jax.api import Patch as Patch
from safepatch_jax.api import Picture as Picture
from safepatch_jax.api import Scores as Scores
from safepatch_jax.api import Training as Training
from safepatch_jax.api import Value as Value
from safepatch_jax.api import compare as compare
from safepatch_jax.api import derive as derive
from safepatch_jax.api import evaluate as evaluate
from safepatch_jax.api import load as load
from safepatch_jax.api import patch as patch
from safepatch_jax.api import read_patch as read_patch
from safepatch_jax.api import score as score

__version__: str
