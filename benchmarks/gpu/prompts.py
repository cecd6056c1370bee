"""Prompts for both sides of decoding. Imports neither JAX nor torch."""

from __future__ import annotations

import numpy as np


def prompt_ids(vocab_size: int, batch: int, length: int) -> list[list[int]]:
    """Return the same random ids for every caller; no special tokens of Llama."""
    return np.random.default_rng(0).integers(3, vocab_size, (batch, length)).tolist()
