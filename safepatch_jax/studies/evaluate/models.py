"""The models that a study is given: looked at before anything is done, and opened."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from safepatch_jax.data.prompt_format import PromptFormat
from safepatch_jax.evaluation.answers import companions
from safepatch_jax.evaluation.engine import Engine
from safepatch_jax.evaluation.prompter import Prompter
from safepatch_jax.models.config import read_hf_config
from safepatch_jax.run.place import Place
from safepatch_jax.run.state import check_source
from safepatch_jax.runtime.console import say
from safepatch_jax.runtime.paths import resolve


class HowToRun(Protocol):
    """The options of a study on which an engine depends; see `Engine`."""

    mesh: str
    compute_dtype: str
    batch_size: int
    date: str


def check_model(folder: str, date: str, formats: Iterable[PromptFormat], asks: bool) -> None:
    """Raise ValueError for what can be seen of a model before its weights are read, so that a study
    that cannot begin leaves nothing.

    Args:
      folder: a Hugging Face folder or a checkpoint of launch.convert.
      date, formats: see `Prompter`; all formats that will be used.
      asks: whether there are prompts for its chat template.
    """
    if not resolve(folder).is_dir():
        raise ValueError(f"no model folder '{folder}'.")
    check_source(Place.parse(folder).absolute())
    path = companions(folder)
    for prompt_format in formats:
        prompter = Prompter(read_hf_config(path), path, date, prompt_format)
        if asks:
            prompter.needed_chat()


def open_model(folder: str, options: HowToRun, prompt_format: PromptFormat) -> Engine:
    """Load a model, and say so."""
    say(f"Loading {folder}")
    return Engine.open(
        folder,
        mesh=options.mesh,
        compute_dtype=options.compute_dtype,
        batch_size=options.batch_size,
        date=options.date,
        prompt_format=prompt_format,
    )
