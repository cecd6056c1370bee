"""What Hugging Face's `generate` takes, and gives."""

import numpy as np


def left_padded(prompts):
    """Return tokens [B, T] int32, LEFT padded with 0, and which are real, bool."""
    width = max(map(len, prompts))
    tokens, valid = np.zeros((len(prompts), width), np.int32), np.zeros((len(prompts), width), bool)
    for row, mask, ids in zip(tokens, valid, prompts):
        row[width - len(ids) :], mask[width - len(ids) :] = ids, True
    return tokens, valid


def hf_greedy(model, prompts, max_new):
    """Return the new tokens of prompts, [B, n]."""
    import torch

    tokens, valid = left_padded(prompts)
    return model.generate(
        input_ids=torch.tensor(tokens).long(),
        attention_mask=torch.tensor(valid).long(),
        do_sample=False,
        max_new_tokens=max_new,
    )[:, tokens.shape[1] :]
