"""What a method is, and what it works with: a backbone, harmful pairs, the two derived models and
their scores."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from safepatch_jax.data.chat import Encoded, Pair
from safepatch_jax.data.pipeline import Pool
from safepatch_jax.evaluation.decoding import Rule
from safepatch_jax.evaluation.engine import Engine
from safepatch_jax.evaluation.lines import file_name
from safepatch_jax.models.config import DecoderConfig, read_hf_config
from safepatch_jax.models.table import nest
from safepatch_jax.patching import PATCH_ROLES
from safepatch_jax.run import models, scratch
from safepatch_jax.run.state import Run
from safepatch_jax.runtime.console import say
from safepatch_jax.settings import Settings
from safepatch_jax.training.journal import Recipe, ignore
from safepatch_jax.training.losses import Loss


class NotMade(ValueError):
    """A method has no product from this backbone and data; others have."""


class Product(NamedTuple):
    """What a method makes: weights, or a way of decoding, or nothing (the backbone itself).

    Attributes:
      params: nested parameters of the new model, any float dtype; None for the backbone's.
      rule: how tokens are chosen; None for plainly.
      expert: nested parameters of the rule's second stream, where it needs them.
    """

    params: Any = None
    rule: Rule | None = None
    expert: Any = None


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of the registry.

    Attributes:
      name: in --methods, of letters, digits and '_'.
      label: in reports.
      group: one of GROUPS.
      make: makes it from a bench.
      settings: {'group.option': value} that it takes instead of the run's, such as its source's
        learning rate.
      options: which settings a user may give for it alone.
      seeded: whether the seed has a part in it; if not, it is made once.
      jailbroken: its answers are deleted after success, as its model is.
      ablation: its label among the ablations of SafePatching; '' if it is none.
    """

    name: str
    label: str
    group: str
    make: Callable[[Bench], Product]
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    options: tuple[str, ...] = ()
    seeded: bool = True
    jailbroken: bool = False
    ablation: str = ""


GROUPS = {
    "backbone": "backbone",
    "patching": "SafePatching",
    "ablation": "ablations",
    "training": "training",
    "merging": "merging",
    "decoding": "decoding",
}


class Bench:
    """What a method works with; each part is made when it is asked for.

    Args:
      run: of the backbone, its harmful pairs and a seed; it keeps derived models and scores for all
        methods.
      settings: the method's own; they differ from the run's in what its row says, and in what the
        user says of it.
      steps: a folder for checkpoints of training, which survive a kill.
      notes: a folder for what methods of all seeds may share.
    """

    def __init__(self, run: Run, settings: Settings, steps: pathlib.Path, notes: pathlib.Path):
        self.settings, self.notes, self._run, self._steps = settings, notes, run, steps
        self.context = run.context
        if settings != run.settings:
            self.context = run.context.with_settings(settings)

    @property
    def folder(self) -> pathlib.Path:
        """The backbone, a Hugging Face folder."""
        return self._run.backbone

    @functools.cached_property
    def config(self) -> DecoderConfig:
        return read_hf_config(self.folder)

    def backbone(self) -> Any:
        """Return the backbone's nested parameters, freshly loaded."""
        return self.context.load(self.folder)[1]

    def engine(self) -> Engine:
        """Return the backbone, freshly loaded and ready to answer."""
        return self.context.engine(self.folder, self.backbone())

    def examples(self, role: str = "harmful", field: str = "answer") -> Encoded:
        """Return the tokenised training pairs of a role: 'harmful', 'lookalike' or 'ordinary'."""
        return self.context.encoded(self.folder, role, "train", field)

    def encode(self, pairs: Sequence[Pair]) -> Encoded:
        """Tokenise pairs, as `Chat.encode` takes them, within the run's limits."""
        data, chat = self.settings.data, self.context.chat(self.folder)
        return chat.encode_all(pairs, data.max_prompt_tokens, data.max_answer_tokens)

    def derived(self, role: str) -> Any:
        """Return the nested parameters, float32, of the model that the SE ('se') or the OSM patch
        ('osm') comes from."""
        self._run.runner.need(f"derive_{role}")
        return nest(scratch.derived(self._run, role))

    def patched(self) -> Any:
        """Return the nested parameters, in their storage dtype, of the patch operation at this
        bench's patch settings.

        Raises:
          ValueError: the patch changes nothing, or overflows.
        """
        run, score = self._run, self.settings.score
        for stage in ("derive", "score"):
            for role in PATCH_ROLES:
                run.runner.need(f"{stage}_{role}")
        sensitivities = None
        if score != run.settings.score:
            sensitivities = {role: models.sensitivity(run, role, score) for role in PATCH_ROLES}
        return nest(models.patched(run, self.settings.patch, sensitivities=sensitivities))

    def tuned(
        self, loss: Loss, pools: Sequence[Pool], title: str, recipe: Recipe | None = None
    ) -> Any:
        """Tune all weights of the backbone; return nested parameters, float32.

        Args:
          loss: see `safepatch_jax.training.losses`.
          pools: (examples, rows of a batch) pairs.
          title: shown at the progress bar; of a method's several tunings each has its own.
          recipe: by default the steps, rate and ceiling of the SE patch, downhill.
        """
        derive, name = self.settings.derive, file_name(title)
        if recipe is None:
            recipe = Recipe(
                1.0,
                derive.se_steps,
                derive.se_learning_rate,
                derive.se_nll_ceiling,
                derive.weight_decay,
            )
        record = ignore
        if self._run.metrics is not None:
            record = self._run.metrics.recorder(name)
        tuned, outcome = self.context.tune(
            self.folder, pools, recipe, title, self._steps / name, record, loss
        )
        first, last = outcome.nll[0], outcome.nll[-1]
        say(f"  stopped by {outcome.stopped_by}: answer NLL {first:.2f} -> {last:.2f}")
        return tuned
