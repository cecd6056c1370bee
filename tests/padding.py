"""Prompts laid out as Hugging Face's `generate` takes them."""

import numpy as np


def left_padded(prompts):
    """Return tokens [B, T] int32, LEFT padded with 0, and which are real, bool."""
    width = max(map(len, prompts))
    tokens, valid = np.zeros((len(prompts), width), np.int32), np.zeros((len(prompts), width), bool)
    for row, mask, ids in zip(tokens, valid, prompts):
        row[width - len(ids) :], mask[width - len(ids) :] = ids, True
    return tokens, valid
