"""The table of judges, and a judge from the text that names it."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable

from safepatch_jax.evaluation.judges import formats, torch_folder
from safepatch_jax.evaluation.judges.base import Judge, nearest, options_of
from safepatch_jax.evaluation.judges.classifier import Classifier
from safepatch_jax.evaluation.judges.endpoint import Endpoint
from safepatch_jax.evaluation.judges.generative import Complete, Generative
from safepatch_jax.evaluation.judges.phrases import Phrases
from safepatch_jax.io import hub
from safepatch_jax.runtime import paths

# model folder -> what continues texts in the judge's own format, see `Generative`
OpenEngine = Callable[[str], Complete]


@dataclasses.dataclass(frozen=True)
class Form:
    """A kind of judge.

    Attributes:
      text: how a judge of this kind is written: KIND or KIND:REST.
      open: maps REST, '' where there is none, and what opens an engine to the judge.
      local: REST is the folder of a model, and options after a '?'.
    """

    text: str
    open: Callable[[str, OpenEngine], Judge]
    local: bool = False


def _generative(
    kind: str,
    format_of: Callable[..., formats.Format],
    *options: str,
    open_torch: Callable[[str, str], Complete] | None = None,
) -> Form:
    """Return the row of a generative judge.

    Args:
      options: arguments of its format.
      open_torch: opens what runs it where it is no model of this project.
    """

    def open_generative(rest: str, open_engine: OpenEngine) -> Judge:
        _, _, query = rest.partition("?")
        name = f"{kind}:{rest}"
        folder = folder_of(name)
        form = format_of(pathlib.Path(folder), **options_of(query, options, name))
        if open_torch:
            return Generative(name, form, open_torch(folder, kind))
        return Generative(name, form, open_engine(folder))

    return Form(f"{kind}:DIR", open_generative, local=True)


FORMS: dict[str, Form] = {
    "phrases": Form("phrases", lambda rest, open_engine: Phrases()),
    "classifier": Form("classifier:DIR", lambda rest, open_engine: Classifier(rest), local=True),
    "llama_guard": _generative("llama_guard", formats.llama_guard),
    "wildguard": _generative("wildguard", formats.wildguard),
    "qwen3guard": _generative(
        "qwen3guard", formats.qwen3guard, "controversial", open_torch=torch_folder.continues
    ),
    "harmbench": _generative("harmbench", formats.harmbench),
    "endpoint": Form("endpoint:URL?model=NAME", lambda rest, open_engine: Endpoint(rest)),
}


def open_judge(text: str, open_engine: OpenEngine) -> Judge:
    """Open a judge.

    Args:
      text: as the rows of FORMS write it; for options see `Classifier`, `qwen3guard` and `Client`.
      open_engine: opens the engine of a generative judge.

    Raises:
      ValueError: another text, or a folder that is not there; see the judges.
    """
    text = paths.judge(text)
    kind, _, rest = text.partition(":")
    form = FORMS.get(kind)
    if form is None or bool(rest) != (":" in form.text):
        hint = nearest(kind, list(FORMS)) if form is None else ""
        known = ", ".join(row.text for row in FORMS.values())
        raise ValueError(f"judge {text!r}{hint}: expected one of {known}")
    if form.local and not pathlib.Path(folder_of(text)).is_dir():
        raise ValueError(
            f"judge {text!r}: there is no folder {folder_of(text)}. Give a folder, or "
            "org/name of the Hugging Face Hub."
        )
    return form.open(rest, open_engine)


def folder_of(text: str) -> str:
    """Return the model folder that a judge's text names, '' for a judge without one; a model of the
    Hugging Face Hub is brought into its cache."""
    kind, _, rest = text.partition(":")
    if kind not in FORMS or not FORMS[kind].local:
        return ""
    return hub.folder_of(paths.plain(rest.partition("?")[0]), check=None)
