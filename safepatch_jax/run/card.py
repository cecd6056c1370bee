"""The model card that goes with an exported model: recipe, before and after, certificate."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from safepatch_jax.evaluation.judges.phrases import COMPLIED, INCOHERENT, REFUSED
from safepatch_jax.evaluation.statistics import wilson
from safepatch_jax.patching.importances import IMPORTANCES
from safepatch_jax.patching.methods import MERGE_METHODS
from safepatch_jax.run import certificate as certificates
from safepatch_jax.run.report import describe_patch, share

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
    settings, measures, patch = content["settings"], content["measures"], content["patch"]
    knobs, derive = settings["patch"], settings["derive"]
    name = pathlib.PurePath(
        settings["model"]["source"].partition(":")[2] or settings["model"]["source"]
    ).name
    architecture = certificate["architecture"]
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [safepatching, safety]",
        "---",
        "",
        f"# {name}, patched",
        "",
        f"`{name}` ({architecture['family']}, {certificate['parameters']:,} parameters)"
        + (", aligned by a short supervised run and then" if settings["align"]["enabled"] else "")
        + " changed by "
        + (
            "SafePatching (arXiv 2405.13820): two sparse weight patches"
            if knobs["merge"] == "safepatching"
            else f"{MERGE_METHODS[knobs['merge']].label}, a baseline of SafePatching (arXiv 2405.13820): two "
            "weight patches"
        )
        + ", derived from harmful question/answer pairs alone, meant to lower harm and "
        "over-refusal and to keep utility. "
        "Architecture, tokenizer and chat template are those of the model it was made from, whose "
        "licence and limits apply.",
        "",
        "## Before and after",
        "",
        "| model | harmful: complied | look-alike: refused | look-alike: incoherent | perplexity "
        "of ordinary answers |",
        "|---|---|---|---|---|",
    ]
    for label, variant in (("before", "backbone"), ("after", "safepatching")):
        m = measures[variant]
        cells = [
            _percent(m, role, outcome)
            for role, outcome in (
                ("harmful", COMPLIED),
                ("lookalike", REFUSED),
                ("lookalike", INCOHERENT),
            )
        ]
        lines.append(f"| {label} | " + " | ".join(cells) + f" | {m['ordinary_perplexity']:.2f} |")
    broken = [o["statement"] for o in content["orderings"] if not o["holds"]]
    lines += [
        "",
        f"{measures['backbone']['harmful']['n']} harmful and "
        f"{measures['backbone']['lookalike']['n']} look-alike prompts, "
        f"{settings['evaluate']['max_new_tokens']} greedy tokens, judged by refusal phrases; 95 % "
        "intervals (Wilson), one seed. "
        "This measures the form of answers on a small set and certifies no safety.",
        *([""] + [f"Not met in this run: {'; '.join(broken)}."] if broken else []),
        "",
        "## Recipe",
        "",
        "| | |",
        "|---|---|",
        *(
            _selection(settings)
            if knobs["merge"] == "safepatching"
            else [f"| merge | {describe_patch(settings)} |"]
        ),
        f"| SE patch | gradient ascent, at most {derive['se_steps']} steps at "
        f"{derive['se_learning_rate']:g}, stopped by "
        f"{content['training']['derive_se']['stopped_by']} after "
        f"{content['training']['derive_se']['steps']} |",
        f"| OSM patch | gradient descent, {derive['osm_steps']} steps at "
        f"{derive['osm_learning_rate']:g} |",
        f"| kept | SE {patch['kept_se']:,}, OSM {patch['kept_osm']:,} of {patch['size']:,} entries "
        f"({patch['kept'] / patch['size']:.2%}); {patch['survival']:.1%} of them change the "
        "stored bits |",
        f"| storage | {settings['export']['dtype']}, rounding {settings['export']['rounding']} |",
        f"| seed | {settings['run']['seed']} |",
        *(
            f"| data, {role} | `{pathlib.PurePath(settings['data'][role]).name}`, SHA-256 of its "
            f"records {digest} |"
            for role, digest in hashes.items()
        ),
        "| versions | " + ", ".join(f"{k} {v}" for k, v in versions.items()) + " |",
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


def _selection(settings: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the rows of the recipe that say which entries are patched."""
    knobs, score = settings["patch"], settings["score"]
    filled = ", filled up with random entries" if knobs["support"] == "fill" else ""
    snip = f"SNIP on '{knobs['importance']}', {score['samples']} samples ({score['mode']})"
    importance = IMPORTANCES[knobs["importance"]].without_snip or snip
    return [
        f"| top rates | a {knobs['top_rate_se']:g} (SE), b {knobs['top_rate_osm']:g} (OSM), per "
        f"{knobs['granularity']} |",
        f"| merge | alpha {knobs['alpha']:g}, beta {knobs['beta']:g}, {knobs['combine']} of the "
        "top sets, retention "
        f"{knobs['retention']:g}{filled}{', rescaled' if knobs['rescale'] else ''} |",
        f"| importance | {importance}, scope {knobs['scope']} |",
    ]


def _settings(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the settings that a repetition needs; where files lay on some machine is not among
    them."""
    left_out = {
        "model": ("source",),
        "data": ("harmful", "lookalike", "ordinary", "manual_dir"),
        "run": ("cache_dir", "keep_scratch"),
    }
    return {
        group: {k: v for k, v in options.items() if k not in left_out.get(group, ())}
        for group, options in settings.items()
    }


def _percent(measures: Mapping[str, Any], role: str, outcome: str) -> str:
    counts = measures[role]
    low, high = wilson(counts[outcome], counts["n"])
    return f"{share(counts, outcome):.0%} [{100 * low:.0f}-{100 * high:.0f}]"
