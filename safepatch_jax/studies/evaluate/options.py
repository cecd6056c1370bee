"""How an evaluation is done."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

from safepatch_jax.data.prompt_format import AS_IS, PromptFormat, read_format
from safepatch_jax.data.rendering import DATE
from safepatch_jax.evaluation.suites import GENERATED, Measure

if TYPE_CHECKING:  # they need JAX, and flags do not
    from safepatch_jax.evaluation.answers import Sources
    from safepatch_jax.evaluation.generate import Sampling

# Stored answers do not depend on these, or (template, system) as their format's key says; judges,
# graders, seeds and several templates have folders of their own.
_INDEPENDENT = (
    "suite",
    "judge",
    "second_judge",
    "grader",
    "mesh",
    "batch_size",
    "seeds",
    "manual_dir",
    "data_dir",
    "template",
    "system",
    "template_kwargs",
    "thinking",
    "think_tokens",
    "templates",
)


@dataclasses.dataclass(frozen=True)
class EvaluationOptions:
    """How an evaluation is done; the fields are the launcher's flags.

    Attributes:
      suite: see `load_suite`.
      judge, second_judge: see `open_judge`; the second one is for agreement with the first, '' for
        none.
      grader: grades the answers of mt_bench, see `mt_bench.open_grader`; needed by suites that have
        it.
      mesh, compute_dtype, batch_size: see `Engine`.
      temperature, top_p, seed: see `Sampling`.
      seeds: each measure in which a model writes is done once with each; () for once, with `seed`.
      manual_dir, data_dir: see `load_records`.
      date: see `data.rendering.render`.
      template, system, template_kwargs, thinking, think_tokens: see
        `data.prompt_format.read_format`.
      templates: all is done in each of them, and one report has them side by side; () for
        `template` alone.
    """

    suite: str = "quick"
    judge: str = "phrases"
    second_judge: str = ""
    grader: str = ""
    mesh: str = "data:1,fsdp:-1,tensor:1"
    compute_dtype: str = "float32"
    batch_size: int = 16
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    seeds: tuple[int, ...] = ()
    manual_dir: str = ""
    data_dir: str = "~/.cache/safepatch_jax/datasets"
    date: str = DATE
    template: str = ""
    system: str = ""
    template_kwargs: str = ""
    thinking: str = AS_IS
    think_tokens: int = 0
    templates: tuple[str, ...] = ()

    def deciding(self) -> dict[str, Any]:
        """Return the options on which stored answers depend, beside the suite's measures."""
        options = dataclasses.asdict(self)
        for name in _INDEPENDENT:
            del options[name]
        if self.seeds:
            options["seed"] = "several"
        if self.date == DATE:  # records from before it was an option go on
            del options["date"]
        for prompt_format in self.formats.values():
            options |= prompt_format.key()
        if self.thinking != AS_IS:
            options["thinking"] = self.thinking
        if self.think_tokens:
            options["think_tokens"] = self.think_tokens
        if self.templates:
            options["template"] = "several"
        return options

    @functools.cached_property
    def formats(self) -> dict[str, PromptFormat]:
        """How prompts are written, by label; '' is the label where no list of templates is given.

        Raises:
          ValueError: a file that cannot be read; two templates of one label.
        """
        if not self.templates:
            return {"": self._format(self.template)}
        text = ",".join(self.templates)
        if self.template:
            raise ValueError(
                f"template {self.template} and templates {text} are both given; leave --template "
                "out."
            )
        formats: dict[str, PromptFormat] = {}
        for name in self.templates:
            prompt_format = self._format(name)
            label = prompt_format.label
            if label.lower() in map(str.lower, formats):
                raise ValueError(
                    f"templates {text}: two are called {label}. Give each once, files under "
                    "different names."
                )
            formats[label] = prompt_format
        return formats

    def _format(self, template: str) -> PromptFormat:
        how = self.system, self.template_kwargs, self.thinking, self.think_tokens
        return read_format(template, *how)

    def place(self, who: str, label: str) -> str:
        """Return in which folder a model's lines lie, below those of answers, verdicts, grades."""
        if not label:
            return who
        sha256 = self.formats[label].sha256[:8]  # an edited template gets answers of its own
        return f"{who}/template-{label}-{sha256}" if sha256 else f"{who}/template-{label}"

    def runs(self, measure: Measure) -> tuple[int | None, ...]:
        """Return the seeds with which a measure is done; None stands for the one of `seed`, and for
        measures without a draw."""
        if self.seeds and measure.kind in GENERATED:
            return self.seeds
        return (None,)

    @property
    def sources(self) -> Sources:
        from safepatch_jax.evaluation.answers import Sources

        return Sources(self.manual_dir, self.data_dir)

    def sampling(self, seed: int | None) -> Sampling:
        from safepatch_jax.evaluation.generate import Sampling

        return Sampling(self.temperature, self.top_p, self.seed if seed is None else seed)

    def check_seeds(self, writes: bool) -> None:
        """Raise ValueError for seeds that do not go with the other options.

        Args:
          writes: whether the suite holds a measure in which a model writes.
        """
        self.sampling(None)
        if not self.seeds:
            return
        text = ",".join(map(str, self.seeds))
        if self.seed:
            raise ValueError(f"seed {self.seed} and seeds {text} are both given; leave --seed out.")
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds must be different whole numbers, 0 at least, got {text}.")
        if not self.temperature:
            raise ValueError(
                f"seeds {text}: at temperature 0 every seed gives the same answers. Sample with "
                "--temperature=0.7, or leave --seeds out."
            )
        if not writes:
            raise ValueError(
                f"seeds {text}: in suite {self.suite} no measure is sampled. Leave --seeds out."
            )
