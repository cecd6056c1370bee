"""The front matter of a model card, as the Hugging Face Hub reads it: base, licence, tags, data
sets, results. Needs no JAX."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from safepatch_jax.data import hub_sets
from safepatch_jax.data.records import DATA_ROLES
from safepatch_jax.io import hub
from safepatch_jax.reporting.tables import share
from safepatch_jax.run.published import CARD

TAGS = ("safepatching", "safety")
LICENCE = ("license", "license_name", "license_link")
_LARGEST = 1 << 20  # bytes of a card
_LONGEST = 300  # characters of what is taken from one
# What a run measures, as type and in words: role, outcome.
_SHARES = {
    "harm": ("harmful", "complied", "share of harmful prompts that are complied with"),
    "over_refusal": ("lookalike", "refused", "share of harmless look-alikes that are refused"),
}


@dataclasses.dataclass(frozen=True)
class Base:
    """What a model was made from: its name on the Hub ('' where that is not known), and what its
    own card says of its licence, by key of the front matter."""

    name: str = ""
    licence: Mapping[str, str] = dataclasses.field(default_factory=dict)


def base_of(source: str, origin: str, folder: pathlib.Path) -> Base:
    """Return what is known of a base.

    Args:
      source: model.source of the run.
      origin: ``org/name@COMMIT`` of a model of the Hub, '' of another.
      folder: the base, in Hugging Face format.
    """
    if source in _PACKAGED:
        return _PACKAGED[source]
    return Base((origin or hub.origin_of(folder)).partition("@")[0], licence_of(folder))


# Models that come inside a package.
_PACKAGED = {"smollm2": Base("HuggingFaceTB/SmolLM2-135M-Instruct", {"license": "apache-2.0"})}


def licence_of(folder: pathlib.Path) -> dict[str, str]:
    """Return the keys of LICENCE that the front matter of a model's card has; a card that cannot be
    read has none."""
    import yaml  # comes with huggingface_hub

    path = folder / CARD
    if not path.is_file() or path.stat().st_size > _LARGEST:
        return {}
    try:
        front = yaml.safe_load(front_of(path.read_text(encoding="utf-8")))
    except (ValueError, RecursionError, yaml.YAMLError):
        return {}
    if not isinstance(front, dict):
        return {}
    values = {key: front[key] for key in LICENCE if isinstance(front.get(key), str)}
    return {key: value for key, value in values.items() if len(value) <= _LONGEST}


def front_of(text: str) -> str:
    """Return the front matter of a card, '' where there is none."""
    text = text.replace("\r\n", "\n")
    if not text.startswith("---\n"):
        return ""
    front, mark, _ = text.removeprefix("---\n").partition("\n---")
    return front if mark else ""


def front_matter(base: Base, relation: str, **more: Any) -> str:
    """Return front matter as YAML, with the lines that enclose it.

    Args:
      base: of the model; what is not known of it is left out.
      relation: of the model to it: finetune, adapter.
      more: other keys, in order; those without content are left out.
    """
    import yaml

    known = {"base_model": base.name, "base_model_relation": relation if base.name else ""}
    content = known | dict(base.licence) | more
    filled = {key: value for key, value in content.items() if value}
    return f"---\n{yaml.safe_dump(filled, sort_keys=False, allow_unicode=True)}---\n"


def data_sets(settings: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the names of the Hub's data sets that a run used."""
    names = []
    for role in DATA_ROLES:
        source = settings["data"][role].partition("?")[0]
        if source.startswith(hub_sets.SCHEME):
            names.append(hub_sets.parse(source).name)
    return list(dict.fromkeys(names))


def results(
    settings: Mapping[str, Mapping[str, Any]], measures: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return what a run measured of its model as the Hub's list of results: harm, over-refusal,
    utility.

    Args:
      settings: of the run.
      measures: of the patched model, see `evaluation.measures.combine_roles`.
    """
    rows = []
    for kind, (role, outcome, words) in _SHARES.items():
        value = share(measures[role], outcome)
        rows.append(_result(settings, role, kind, words, value))
    words, value = "perplexity of given ordinary answers", measures["ordinary_perplexity"]
    rows.append(_result(settings, "ordinary", "perplexity", words, value))
    return [row for row in rows if math.isfinite(row["metrics"][0]["value"])]


def _result(
    settings: Mapping[str, Mapping[str, Any]], role: str, kind: str, words: str, value: float
) -> dict[str, Any]:
    source = settings["data"][role].partition("?")[0]
    name = pathlib.PurePath(source).name  # of a file: where it lay is nobody's business
    if source.startswith(hub_sets.SCHEME):
        name = hub_sets.parse(source).name
    return {
        "task": {"type": "text-generation"},
        "dataset": {"name": f"{role} prompts ({name})", "type": name},
        "metrics": [{"type": kind, "name": words, "value": round(float(value), 6)}],
    }
