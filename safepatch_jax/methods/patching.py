"""SafePatching, its ablations, and the merging baselines: the patch operation at the settings of a
row."""

from __future__ import annotations

from safepatch_jax.methods.bench import Bench, Product


def patched(bench: Bench) -> Product:
    """Merge the two patches as the patch settings say."""
    return Product(bench.patched())


def se_alone(bench: Bench) -> Product:
    """Take the model of gradient ascent as it is (GA; also the SE patch alone)."""
    return Product(bench.derived("se"))


def osm_alone(bench: Bench) -> Product:
    """Take the model of gradient descent as it is."""
    return Product(bench.derived("osm"))
