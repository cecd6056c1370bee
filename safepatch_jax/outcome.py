"""Which settings decide what comes out of a run: what stage keys and records hold, and workdirs are
compared by."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from safepatch_jax.settings import Settings, declared_options

# Settings that say where and how a run is done and do not change what comes out: names, or how they
# begin.
NEUTRAL = (
    "run.keep_scratch",
    "run.cache_dir",
    "run.certify",
    "run.checkpoint_minutes",
    "mesh.",
    "model.remat",
    "model.loss_chunk",
    "model.architecture",
    "derive.accumulate",
    "derive.memory",
    "score.in_flight",
    "score.inputs",
    "data.manual_dir",
    "evaluate.margin_limit",  # of sweeps, which note it in their rows
)

# Options that came after runs had been made without them. At its default such an option is no part
# of keys and records, so that older workdirs remain what they are.
LATER = (
    "derive.osm_seed",
    "derive.train",
    "derive.backward",
    "derive.se_prompts",
    "derive.osm_prompts",
    "derive.se_tokens",
    "derive.osm_tokens",
    "score.se_tokens",
    "score.osm_tokens",
    "derive.store",
    "score.store",
    "data.template",
    "data.system",
    "data.template_kwargs",
    "evaluate.thinking",
    "evaluate.think_tokens",
)


def outcome_settings(settings: Settings) -> dict[str, Any]:
    """Return the settings that decide what comes out of a run, by dotted name; of LATER those that
    are not at their defaults."""
    known, result = declared_options(), {}
    for name, value in settings.flat().items():
        silent = name in LATER and value == known[name].default
        if not silent and not name.startswith(NEUTRAL):
            result[name] = value
    return result


def settings_differences(old: Mapping, new: Mapping) -> list[str]:
    """List where two resolved dictionaries differ in what comes out, as ``name: old -> new``. One
    of LATER that is not there has its default."""
    known, lines = declared_options(), []
    for group in sorted(set(old) | set(new)):
        before, after = old.get(group, {}), new.get(group, {})
        for key in sorted(set(before) | set(after)):
            name = f"{group}.{key}"
            default = known[name].default if name in LATER else None
            values = before.get(key, default), after.get(key, default)
            if values[0] != values[1] and not name.startswith(NEUTRAL):
                lines.append(f"{name}: {json.dumps(values[0])} -> {json.dumps(values[1])}")
    return lines
