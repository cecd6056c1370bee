"""How a margin map is made. Needs no JAX."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from safepatch_jax.data.prompt_format import AS_IS, PromptFormat, read_format
from safepatch_jax.data.rendering import DATE


@dataclasses.dataclass(frozen=True)
class MarginOptions:
    """How a margin map is made; the fields are the launcher's flags.

    Attributes:
      suite: see `load_suite`; its measures of kind harm, refusal and text count.
      forced: answer tokens that are forced before the content.
      longest: answer tokens at most, content and opening.
      mesh, compute_dtype, batch_size, date: see `Engine`.
      manual_dir, data_dir: see `load_records`.
      template, system, template_kwargs, thinking: see `data.prompt_format.read_format`.
    """

    suite: str = "gate"
    forced: int = 8
    longest: int = 128
    mesh: str = "data:1,fsdp:-1,tensor:1"
    compute_dtype: str = "float32"
    batch_size: int = 24
    manual_dir: str = ""
    data_dir: str = "~/.cache/safepatch_jax/datasets"
    date: str = DATE
    template: str = ""
    system: str = ""
    template_kwargs: str = ""
    thinking: str = AS_IS

    @functools.cached_property
    def prompt_format(self) -> PromptFormat:
        """How prompts are written."""
        return read_format(self.template, self.system, self.template_kwargs, self.thinking)

    def deciding(self) -> dict[str, Any]:
        """Return the options on which the rows depend."""
        names = ("forced", "longest", "compute_dtype", "date")
        options = {name: getattr(self, name) for name in names} | self.prompt_format.key()
        if self.thinking != AS_IS:
            options["thinking"] = self.thinking
        return options
