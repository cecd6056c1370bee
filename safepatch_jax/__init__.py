"""SafePatching (arXiv 2405.13820) in JAX/Flax: post safety alignment of chat models by controllable
patching.

  import safepatch_jax as sp
  model = sp.load("DIR")        # docs/api.md

The names below come from `safepatch_jax.api` when they are first used: to import the package, as
every launcher does, costs nothing.
"""

__version__ = "0.2.0"
__all__ = [
    "Comparison",
    "Evaluation",
    "Measured",
    "Model",
    "Pair",
    "Patch",
    "Picture",
    "Scores",
    "Training",
    "Value",
    "compare",
    "derive",
    "evaluate",
    "load",
    "patch",
    "read_patch",
    "score",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    import importlib

    from safepatch_jax.runtime import libraries

    libraries.quiet_jax()
    return getattr(importlib.import_module("safepatch_jax.api"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
