"""Factors of embeddings and of parts, in bfloat16: the bits of transformers."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from safepatch_jax.models.config import config_from_hf
from safepatch_jax.models.decoder import Begin, Block
from tests.models.families import hf_config, tiny_raw

TOKENS = np.arange(24).reshape(2, 12)


def reference(raw):
    """Run a model of transformers in bfloat16; return it, and what enters and leaves its parts."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        hf_config(raw), dtype=torch.bfloat16, attn_implementation="eager"
    )
    entered, left = {}, {}

    def keep(name):
        def hook(_, args, kwargs, output):
            entered[name] = [*args, *kwargs.values()][0]
            left[name] = output[0] if isinstance(output, tuple) else output

        return hook

    for name, module in model.named_modules():
        module.register_forward_hook(keep(name), with_kwargs=True)
    with torch.no_grad():
        model.eval()(input_ids=torch.tensor(TOKENS), use_cache=False)
    return model, entered, left


def array(x):
    return jnp.asarray(x.detach().float().numpy(), jnp.bfloat16)


def assert_same_bits(ours, theirs):
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_array_equal(ours, array(theirs))


@pytest.mark.parametrize("family", ["granite", "gemma", "gemma2", "gemma3_text"])
def test_embeddings(family):
    changes = {"embedding_multiplier": 12.3} if family == "granite" else {"hidden_size": 48}
    raw = tiny_raw(family, **changes)
    model, entered, _ = reference(raw)
    params = {"embedder": {"embedding": array(model.model.embed_tokens.weight)}}
    begin = Begin(config_from_hf(raw), jnp.bfloat16, None)
    ours = begin.apply({"params": params}, TOKENS)
    assert_same_bits(ours, entered["model.layers.0"])


def test_what_granites_parts_add():
    raw = tiny_raw("granite", residual_multiplier=0.22)
    _, entered, left = reference(raw)
    block = Block(config_from_hf(raw), jnp.bfloat16, None)
    for i in range(raw["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        between = entered[f"{layer}.post_attention_layernorm"]
        for part, inner, x, after in (
            ("attention", "self_attn", entered[layer], between),
            ("mlp", "mlp", between, left[layer]),
        ):
            y = array(left[f"{layer}.{inner}"])
            ours = block.apply({}, part, array(x), y, method="added")
            assert_same_bits(ours, after)
