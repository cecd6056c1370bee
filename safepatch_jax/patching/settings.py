"""The patch group of the settings; needs no JAX."""

from __future__ import annotations

import dataclasses

from safepatch_jax.option import option, row_of
from safepatch_jax.patching.importances import IMPORTANCES
from safepatch_jax.patching.methods import MERGE_METHODS, MergeMethod, merge_method


def _methods_help() -> str:
    texts = []
    for method in MERGE_METHODS.values():
        names = [name for name in method.settings if name not in ("alpha", "beta")]
        takes = f" [{', '.join(names)}]" if names else ""
        texts.append(f"{method.name}, {method.help}{takes}")
    return "; ".join(texts)


def _importances_help() -> str:
    return "; ".join(f"{row.name}, {row.help}" for row in IMPORTANCES.values())


@dataclasses.dataclass(frozen=True)
class PatchSettings:
    """How the two patches become one change of the backbone."""

    merge: str = option(
        "safepatching",
        "The method, or a baseline on the same patches; in brackets the settings that it takes "
        f"beside alpha and beta, which weigh the two patches: {_methods_help()}.",
        choices=tuple(MERGE_METHODS),
    )
    importance: str = option(
        "delta",
        f"What entries are ranked by: {_importances_help()}.",
        choices=tuple(IMPORTANCES),
    )
    scope: str = option(
        "block_linear",
        "What is ranked and patched: linear layers of the blocks, also lm_head, or everything.",
        choices=("block_linear", "all_linear", "all"),
    )
    granularity: str = option(
        "matrix",
        "Within what entries are ranked: each weight matrix, each of its rows (the weights of one "
        "output), or the whole scope at once.",
        choices=("matrix", "row", "global"),
    )
    top_rate_se: float = option(
        0.1, "a: share of entries in the SE patch's top set.", low=0.0, high=1.0
    )
    top_rate_osm: float = option(
        0.1, "b: share of entries in the OSM patch's top set.", low=0.0, high=1.0
    )
    combine: str = option(
        "difference",
        "Which entries of the two top sets are candidates.",
        choices=("difference", "intersection", "union"),
    )
    retention: float = option(
        0.3,
        "p: probability with which a candidate is kept; see patch.support.",
        above=0.0,
        high=1.0,
    )
    support: str = option(
        "sequential",
        "Of the candidates, keep each with probability p; or keep all and fill up with random "
        "entries outside both top sets, to a share p of each matrix and patch.",
        choices=("sequential", "fill"),
    )
    rescale: bool = option(False, "Divide kept entries by the retention, as DARE does.")
    density: float = option(
        0.2,
        "Share of entries, the largest by magnitude, that TIES keeps of each patch.",
        low=0.0,
        high=1.0,
    )
    alpha: float = option(1.0, "Weight of the SE patch in the merge.")
    beta: float = option(1.0, "Weight of the OSM patch in the merge.")

    @property
    def method(self) -> MergeMethod:
        """The row of the merging method. Raises ValueError for an unknown name."""
        return merge_method(self.merge)

    @property
    def ranking(self) -> str:
        """The importance by which entries are ranked. Raises ValueError for an unknown name."""
        if self.method.ranks != "importance":
            return "magnitude"
        return row_of(IMPORTANCES, self.importance, "importance (patch.importance)").name

    @property
    def needs_sensitivity(self) -> bool:
        """Whether entries are ranked by SNIP."""
        return IMPORTANCES[self.ranking].needs_sensitivity

    @property
    def ranks_whole_scope(self) -> bool:
        """Whether a top set is one of all tensors together, whose threshold needs them all."""
        return self.granularity == "global" and self.method.ranks is not None
