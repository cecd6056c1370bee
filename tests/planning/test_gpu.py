"""What XLA's CUDA compiler takes, without a GPU: attention of each kind, and the programs of a run.

Needs JAX's CUDA plugin and cuDNN (make test-gpu installs them); skips without. Nothing is run.
"""

import importlib.util

import jax
import jax.numpy as jnp
import pytest

from safepatch_jax.planning.cards import installed

if not installed() or importlib.util.find_spec("nvidia.cudnn") is None:
    pytest.skip(
        "the CUDA compiler is not installed: pip install -e '.[gpu-aot]'", allow_module_level=True
    )

from safepatch_jax.models.config import config_from_hf
from safepatch_jax.models.kernels import compiling_for, fused_attention, kernel_for
from safepatch_jax.planning.chips import topology
from safepatch_jax.planning.programs import programs
from safepatch_jax.planning.work import read_work
from safepatch_jax.settings import Settings
from safepatch_jax.testing import tiny_config

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "vocab_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "torch_dtype": "bfloat16",
}
SETTINGS = Settings().override({"model.compute_dtype": "bfloat16", "evaluate.max_new_tokens": 8})


@pytest.mark.parametrize("card", ["a100-40:1", "h100:1"])
@pytest.mark.parametrize("heads, window", [(64, None), (80, None), (128, 100), (256, None)])
def test_cudnn_takes_what_the_plan_gives_it(card, heads, window):
    target = topology(card)
    sharding = target.sharder("data:1").replicated()
    config = config_from_hf(tiny_config(**SIZES, head_dim=heads))

    def loss(q, k, v):
        mixed = fused_attention("cudnn", q, k, v, window, None)
        return mixed.astype(jnp.float32).sum()

    def array(n):
        return jax.ShapeDtypeStruct((2, 256, n, heads), jnp.bfloat16, sharding=sharding)

    with compiling_for(target.capability):
        lowers = kernel_for("auto", config, jnp.bfloat16, 256, "gpu") == "cudnn"
        assert lowers == (heads <= 128 or card == "h100:1")
        gradient = jax.jit(jax.grad(loss, (0, 1, 2)))
        if lowers:
            text = gradient.lower(array(4), array(2), array(2)).compile().as_text()
            assert "__cudnn$fmhaSoftmaxBackward" in text
        else:
            with pytest.raises(NotImplementedError, match="head dim must be <= 128"):
                gradient.lower(array(4), array(2), array(2))


@pytest.mark.parametrize("family", ["llama", "gemma", "gemma2", "mistral", "qwen2"])
def test_the_train_step_of_every_family_compiles(family):
    target = topology("h100:2")
    config = config_from_hf(tiny_config(model_type=family, **SIZES))
    settings = SETTINGS.override({"mesh.shape": "fsdp:2"})
    sharder = target.sharder("fsdp:2")
    with compiling_for(target.capability):
        (program,) = programs(settings, config, sharder, ["train"])
        text = program.trace().lower().compile().as_text()
    assert read_work(text).sent() > 0
    fused = not config.attention_cap and len(set(config.windows)) <= 1
    assert ("__cudnn$fmha" in text) == fused
