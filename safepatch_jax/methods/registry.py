"""Every method of the comparison, a line each; docs/compare.md shows how to add one."""

from __future__ import annotations

import difflib

from safepatch_jax.methods import decoding, mismatch, patching, preference
from safepatch_jax.methods.bench import GROUPS, Made, Method

_PATCH = ("patch.", "score.")
_EQUAL = {"patch.alpha": 1.0, "patch.beta": 1.0}  # the sources' weights, not those that SafePatching was given


def _variant(name: str, label: str, **settings: object) -> Method:
    """Return an ablation: SafePatching with other settings, named group_option."""
    own = {key.replace("_", ".", 1): value for key, value in settings.items()}
    return Method(name, label, "ablation", patching.patched, own, _PATCH, ablation=label)


def _merging(name: str, label: str, **settings: object) -> Method:
    own = _EQUAL | {f"patch.{key}": value for key, value in settings.items()}
    return Method(name, label, "merging", patching.patched, own, _PATCH)


METHODS = {method.name: method for method in (
    Method("backbone", "backbone", "backbone", lambda bench: Made(), seeded=False, ablation="backbone"),
    Method("safepatching", "SafePatching", "patching", patching.patched, options=_PATCH, ablation="SafePatching"),
    Method("ga", "GA", "training", patching.se_alone, ablation="SE alone (= GA)"),
    Method("ga_mismatch", "GA + Mismatch", "training", mismatch.ga_mismatch, {"derive.se_learning_rate": 2e-6}, ("derive.",)),
    Method("npo", "NPO", "training", preference.npo, options=("derive.",)),
    Method("simnpo", "SimNPO", "training", preference.simnpo, options=("derive.",)),
    _merging("average", "average", merge="average"),
    _merging("task_arithmetic", "task arithmetic", merge="task_arithmetic"),
    _merging("ties", "TIES", merge="ties", density=0.2),
    _merging("dare", "DARE", merge="dare"),
    _merging("dare_ties", "DARE-TIES", merge="dare_ties"),
    _merging("resta", "RESTA", merge="resta", retention=1.0),
    Method("self_cd", "Self-CD", "decoding", decoding.self_cd, seeded=False),
    Method("rose", "ROSE", "decoding", decoding.rose, seeded=False),
    Method("safe_decoding", "SafeDecoding", "decoding", decoding.safe_decoding, options=("derive.",)),
    Method("osm", "OSM alone", "ablation", patching.osm_alone, jailbroken=True, ablation="OSM alone"),
    _variant("no_retention", "no retention (p = 1)", patch_retention=1.0),
    _variant("intersection", "intersection", patch_combine="intersection"),
    _variant("union", "union", patch_combine="union"),
    _variant("random", "random instead of SNIP", patch_importance="random"),
    _variant("magnitude", "magnitude instead of SNIP", patch_importance="magnitude"),
    _variant("batched", "batched SNIP", score_mode="batched"),
)}
FIRST = ("backbone", "safepatching")  # in every comparison


def parse_methods(text: str) -> tuple[str, ...]:
    """Read --methods: 'all', or names and groups between commas; backbone and SafePatching always come first.

    Raises:
      ValueError: an unknown name (with the nearest match).
    """
    chosen = list(FIRST)
    for name in filter(None, (part.strip() for part in text.split(","))):
        found = [m.name for m in METHODS.values() if name in ("all", m.name, m.group)]
        if not found:
            groups = list(dict.fromkeys(m.group for m in METHODS.values()))
            close = difflib.get_close_matches(name, [*METHODS, *groups], n=1)
            raise ValueError(f"--methods: there is no '{name}'" + (f" (did you mean '{close[0]}'?)" if close else "")
                             + f". There are {', '.join(METHODS)}; all; or a group: {', '.join(groups)}.")
        chosen += found
    return tuple(dict.fromkeys(chosen))
