"""SafePatching (arXiv 2405.13820) in JAX: post safety alignment of chat models by controllable
patching."""

__version__ = "0.1.0"
