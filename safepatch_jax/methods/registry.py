"""Every method of the comparison, a line each; docs/compare.md shows how to add one."""

from __future__ import annotations

import difflib

from safepatch_jax.methods import decoding, mismatch, patching, preference
from safepatch_jax.methods.bench import Method, Product
from safepatch_jax.patching.methods import MERGE_METHODS, MergeMethod

# Settings that a user may give for one method alone: those that have a part in it and do not define
# it.
TRAINING = (
    "derive.batch_size",
    "derive.se_steps",
    "derive.se_learning_rate",
    "derive.se_nll_ceiling",
    "derive.weight_decay",
    "derive.clip_norm",
)
_EXPERT = (
    "derive.batch_size",
    "derive.osm_steps",
    "derive.osm_learning_rate",
    "derive.loss",
    "derive.weight_decay",
    "derive.clip_norm",
)


def _variant(
    name: str, label: str, setting: str, value: object, options: tuple[str, ...] = ()
) -> Method:
    """Return an ablation: SafePatching with another value of one setting."""
    return Method(
        name, label, "ablation", patching.patched, {setting: value}, options, ablation=label
    )


def _merging(row: MergeMethod) -> Method:
    """Return a merging baseline: the patch operation with another method."""
    settings = {"patch.merge": row.name}
    for name, value in row.comparison.items():
        settings[f"patch.{name}"] = value
    options = tuple(f"patch.{name}" for name in row.settings)
    return Method(row.name, row.label, "merging", patching.patched, settings, options)


_BASELINES = [_merging(row) for row in MERGE_METHODS.values() if row.name != "safepatching"]

METHODS = {
    method.name: method
    for method in (
        Method(
            "backbone",
            "backbone",
            "backbone",
            lambda bench: Product(),
            seeded=False,
            ablation="backbone",
        ),
        Method(
            "safepatching", "SafePatching", "patching", patching.patched, ablation="SafePatching"
        ),
        Method("ga", "GA", "training", patching.se_alone, ablation="SE alone (= GA)"),
        Method(
            "ga_mismatch",
            "GA + Mismatch",
            "training",
            mismatch.ga_mismatch,
            {"derive.se_learning_rate": 2e-6},
            TRAINING,
        ),
        Method("npo", "NPO", "training", preference.npo, options=TRAINING),
        Method("simnpo", "SimNPO", "training", preference.simnpo, options=TRAINING),
        *_BASELINES,
        Method("self_cd", "Self-CD", "decoding", decoding.self_cd, seeded=False),
        Method("rose", "ROSE", "decoding", decoding.rose, seeded=False),
        Method(
            "safe_decoding", "SafeDecoding", "decoding", decoding.safe_decoding, options=_EXPERT
        ),
        Method(
            "osm",
            "OSM alone",
            "ablation",
            patching.osm_alone,
            jailbroken=True,
            ablation="OSM alone",
        ),
        _variant("no_retention", "no retention (p = 1)", "patch.retention", 1.0),
        _variant("intersection", "intersection", "patch.combine", "intersection"),
        _variant("union", "union", "patch.combine", "union"),
        _variant("random", "random instead of SNIP", "patch.importance", "random"),
        _variant("magnitude", "magnitude instead of SNIP", "patch.importance", "magnitude"),
        _variant("batched", "batched SNIP", "score.mode", "batched", ("score.batch_size",)),
    )
}
FIRST = ("backbone", "safepatching")  # in every comparison


def parse_methods(text: str) -> tuple[str, ...]:
    """Read --methods: 'all', or names and groups between commas; backbone and SafePatching always
    come first.

    Raises:
      ValueError: an unknown name (with the nearest match).
    """
    chosen = list(FIRST)
    for part in text.split(","):
        name = part.strip()
        names = [m.name for m in METHODS.values() if name in ("all", m.name, m.group)]
        if name and not names:
            raise ValueError(_unknown(name))
        chosen += names
    return tuple(dict.fromkeys(chosen))


def _unknown(name: str) -> str:
    groups = list(dict.fromkeys(method.group for method in METHODS.values()))
    close = difflib.get_close_matches(name, [*METHODS, *groups], n=1)
    hint = f" (did you mean '{close[0]}'?)" if close else ""
    return (
        f"--methods: there is no '{name}'{hint}. There are {', '.join(METHODS)}; all; or a group: "
        f"{', '.join(groups)}."
    )
