"""SafePatching, its ablations, and the merging baselines: the patch operation at the settings of a
row."""

from __future__ import annotations

from safepatch_jax.methods.bench import Bench, Made


def patched(bench: Bench) -> Made:
    """Merge the two patches as the patch settings say."""
    return Made(bench.patched())


def se_alone(bench: Bench) -> Made:
    """Take the model of gradient ascent as it is (GA; also the SE patch alone)."""
    return Made(bench.derived("se"))


def osm_alone(bench: Bench) -> Made:
    """Take the model of gradient descent as it is."""
    return Made(bench.derived("osm"))
