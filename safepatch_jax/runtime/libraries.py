"""Libraries that write lines of their own between ours, imported without these."""

from __future__ import annotations

import os
from types import ModuleType


def transformers() -> ModuleType:
    """Import transformers (which takes seconds) without its advice on what else to install and its
    bars; warnings and errors stay."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers
