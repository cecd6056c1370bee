"""The model card that goes with an exported model: recipe, before and after, certificate."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from safepatch_jax.data.hub_sets import SCHEME
from safepatch_jax.data.prompt_format import PromptFormat
from safepatch_jax.data.records import DATA_ROLES
from safepatch_jax.patching.importances import IMPORTANCES
from safepatch_jax.reporting import templates
from safepatch_jax.run import certificate as certificates
from safepatch_jax.run.card_data import TAGS, Base, data_sets, front_matter, results
from safepatch_jax.run.published import CERTIFICATE, describe_patch
from safepatch_jax.run.report import labels


def model_card(
    content: Mapping[str, Any],
    certificate: Mapping[str, Any],
    hashes: Mapping[str, str],
    versions: Mapping[str, str],
    prompts: PromptFormat = PromptFormat(),
    base: Base = Base(),
) -> str:
    """Render the card as Markdown.

    Args:
      content: of the report, see `report.gather`.
      certificate: of the export, see `certificate.certify`.
      hashes: of the data, by role.
      versions: of the packages.
      prompts: how they were written.
      base: what the model was made from.
    """
    settings = content["settings"]
    knobs, score, source = settings["patch"], settings["score"], settings["model"]["source"]
    name = base.name or pathlib.PurePath(source.partition(":")[2] or source).name
    front = front_matter(
        base,
        "finetune",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=list(TAGS),
        datasets=data_sets(settings),
        **{"model-index": _index(name, settings, content["measures"])},
    )
    snip = f"SNIP on '{knobs['importance']}', {score['samples']} samples ({score['mode']})"
    return templates.render(
        "run/card.md.jinja",
        name=name,
        front=front,
        base=base,
        knobs=knobs,
        labels=labels(settings),
        importance=IMPORTANCES[knobs["importance"]].without_snip or snip,
        patch_text=describe_patch(settings),
        sources={role: _source(settings["data"][role]) for role in DATA_ROLES},
        hashes={role: hashes[role] for role in DATA_ROLES},
        prompts=prompts,
        versions=versions,
        repeated=json.dumps(_settings(settings, prompts), indent=1),
        certificate=certificate,
        file=CERTIFICATE,
        summary=certificates.summary(certificate),
        **content,
    )


def _index(
    name: str, settings: Mapping[str, Mapping[str, Any]], measures: Mapping[str, Any]
) -> list[dict[str, Any]]:
    rows = results(settings, measures["safepatching"])
    return [{"name": f"{name}, patched", "results": rows}] if rows else []


def _source(source: str) -> str:
    """Return the name of a data source, without the folder where a file lay."""
    return source if source.startswith(SCHEME) else pathlib.PurePath(source).name


def _settings(settings: Mapping[str, Mapping[str, Any]], prompts: PromptFormat) -> dict[str, Any]:
    """Return the settings that a repetition needs; where files lay on some machine is not among
    them."""
    left_out = {
        "model": ("source",),
        "data": ("harmful", "lookalike", "ordinary", "manual_dir"),
        "run": ("cache_dir", "keep_scratch"),
    }
    if prompts.text:  # of a file
        left_out["data"] += ("template",)
    result = {}
    for group, options in settings.items():
        dropped = left_out.get(group, ())
        result[group] = {name: x for name, x in options.items() if name not in dropped}
    return result
