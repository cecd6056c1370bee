"""The model card that goes with an exported model: recipe, before and after, certificate."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from safepatch_jax.evaluation.judges.base import COMPLIED, INCOHERENT, REFUSED
from safepatch_jax.patching.importances import IMPORTANCES
from safepatch_jax.reporting import tables
from safepatch_jax.reporting.tables import counted
from safepatch_jax.run import certificate as certificates
from safepatch_jax.run.report import describe_patch, labels

NAME = "README.md"  # where Hugging Face looks for a model card


def model_card(
    content: Mapping[str, Any],
    certificate: Mapping[str, Any],
    hashes: Mapping[str, str],
    versions: Mapping[str, str],
) -> str:
    """Render the card as Markdown.

    Args:
      content: of the report, see `report.gather`.
      certificate: of the export, see `certificate.certify`.
      hashes: of the data, by role.
      versions: of the packages.
    """
    settings = content["settings"]
    lines = [
        *_introduction(settings, certificate),
        "",
        "## Before and after",
        "",
        *_before_and_after(content),
        "",
        "## Recipe",
        "",
        *tables.table(["", ""], _recipe(content, hashes, versions)),
        "",
        "All settings, as `config` of the same command takes them (paths left out):",
        "",
        "```json",
        json.dumps(_settings(settings), indent=1),
        "```",
        "",
        "## Certificate",
        "",
        f"`{certificates.FILE}` has the SHA-256 of every tensor. "
        f"{certificates.summary(certificate)}.",
        "",
    ]
    return "\n".join(lines)


def _introduction(
    settings: Mapping[str, Mapping[str, Any]], certificate: Mapping[str, Any]
) -> list[str]:
    """Return the metadata that Hugging Face reads, and what the model is."""
    source = settings["model"]["source"]
    name = pathlib.PurePath(source.partition(":")[2] or source).name
    aligned = ""
    if settings["align"]["enabled"]:
        aligned = ", aligned by a short supervised run and then"
    method = "SafePatching (arXiv 2405.13820): two sparse weight patches"
    if settings["patch"]["merge"] != "safepatching":
        label = labels(settings)["safepatching"]
        method = f"{label}, a baseline of SafePatching (arXiv 2405.13820): two weight patches"
    return [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [safepatching, safety]",
        "---",
        "",
        f"# {name}, patched",
        "",
        f"`{name}` ({certificate['architecture']['family']}, {certificate['parameters']:,} "
        f"parameters){aligned} changed by {method}, derived from harmful question/answer pairs "
        "alone, meant to lower harm and over-refusal and to keep utility. "
        "Architecture, tokenizer and chat template are those of the model it was made from, whose "
        "licence and limits apply.",
    ]


def _before_and_after(content: Mapping[str, Any]) -> list[str]:
    measures, rows = content["measures"], []
    for label, variant in (("before", "backbone"), ("after", "safepatching")):
        m = measures[variant]
        rows.append(
            [
                label,
                counted(m["harmful"], COMPLIED),
                counted(m["lookalike"], REFUSED),
                counted(m["lookalike"], INCOHERENT),
                f"{m['ordinary_perplexity']:.2f}",
            ]
        )
    head = ["model", "harmful: complied", "look-alike: refused", "look-alike: incoherent"]
    lines = [
        *tables.table([*head, "perplexity of ordinary answers"], rows),
        "",
        f"{measures['backbone']['harmful']['n']} harmful and "
        f"{measures['backbone']['lookalike']['n']} look-alike prompts, "
        f"{content['settings']['evaluate']['max_new_tokens']} greedy tokens, judged by refusal "
        "phrases; 95 % intervals (Wilson), one seed. "
        "This measures the form of answers on a small set and certifies no safety.",
    ]
    broken = [o["statement"] for o in content["orderings"] if not o["holds"]]
    if broken:
        lines += ["", f"Not met in this run: {'; '.join(broken)}."]
    return lines


def _recipe(
    content: Mapping[str, Any], hashes: Mapping[str, str], versions: Mapping[str, str]
) -> list[tuple[str, str]]:
    """Return the rows of the recipe."""
    settings, derive = content["settings"], content["settings"]["derive"]
    training, patch = content["training"]["derive_se"], content["patch"]
    recipe = [
        *_selection(settings),
        (
            "SE patch",
            f"gradient ascent, at most {derive['se_steps']} steps at "
            f"{derive['se_learning_rate']:g}, stopped by {training['stopped_by']} after "
            f"{training['steps']}",
        ),
        (
            "OSM patch",
            f"gradient descent, {derive['osm_steps']} steps at {derive['osm_learning_rate']:g}",
        ),
        (
            "kept",
            f"SE {patch['kept_se']:,}, OSM {patch['kept_osm']:,} of {patch['size']:,} entries "
            f"({patch['kept'] / patch['size']:.2%}); {patch['survival']:.1%} of them change the "
            "stored bits",
        ),
        ("storage", f"{settings['export']['dtype']}, rounding {settings['export']['rounding']}"),
        ("seed", str(settings["run"]["seed"])),
    ]
    for role, digest in hashes.items():
        source = pathlib.PurePath(settings["data"][role]).name
        recipe.append((f"data, {role}", f"`{source}`, SHA-256 of its records {digest}"))
    recipe.append(("versions", ", ".join(f"{name} {x}" for name, x in versions.items())))
    return recipe


def _selection(settings: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return the rows of the recipe that say which entries are patched."""
    knobs, score = settings["patch"], settings["score"]
    if knobs["merge"] != "safepatching":
        return [("merge", describe_patch(settings))]
    filled = ", filled up with random entries" if knobs["support"] == "fill" else ""
    rescaled = ", rescaled" * knobs["rescale"]
    snip = f"SNIP on '{knobs['importance']}', {score['samples']} samples ({score['mode']})"
    importance = IMPORTANCES[knobs["importance"]].without_snip or snip
    return [
        (
            "top rates",
            f"a {knobs['top_rate_se']:g} (SE), b {knobs['top_rate_osm']:g} (OSM), per "
            f"{knobs['granularity']}",
        ),
        (
            "merge",
            f"alpha {knobs['alpha']:g}, beta {knobs['beta']:g}, {knobs['combine']} of the top "
            f"sets, retention {knobs['retention']:g}{filled}{rescaled}",
        ),
        ("importance", f"{importance}, scope {knobs['scope']}"),
    ]


def _settings(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the settings that a repetition needs; where files lay on some machine is not among
    them."""
    left_out = {
        "model": ("source",),
        "data": ("harmful", "lookalike", "ordinary", "manual_dir"),
        "run": ("cache_dir", "keep_scratch"),
    }
    result = {}
    for group, options in settings.items():
        dropped = left_out.get(group, ())
        result[group] = {name: x for name, x in options.items() if name not in dropped}
    return result
