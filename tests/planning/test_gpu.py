"""What XLA's CUDA compiler takes, without a GPU: attention of each kind, and the programs of a run.

Needs JAX's CUDA plugin and cuDNN (make test-gpu installs them); skips without. Nothing is run.
"""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import pytest

from safepatch_jax.planning.cards import installed

if not installed() or importlib.util.find_spec("nvidia.cudnn") is None:
    pytest.skip(
        "the CUDA compiler is not installed: pip install -e '.[gpu-aot]'", allow_module_level=True
    )

from safepatch_jax.evaluation.generate import Prompts, Whole
from safepatch_jax.mesh import local_bytes
from safepatch_jax.models.config import config_from_hf
from safepatch_jax.models.families import FAMILIES
from safepatch_jax.models.kernels import compiling_for, fused_attention, kernel_for
from safepatch_jax.models.table import param_table
from safepatch_jax.planning.chips import topology
from safepatch_jax.planning.compile import measure
from safepatch_jax.planning.programs import programs
from safepatch_jax.planning.work import read_work
from safepatch_jax.run.context import Context
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
        mixed = fused_attention("cudnn", q, k, v, window, None, scale=heads**-0.5)
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


# Family, changes of its config.json, whether its train step takes cuDNN's attention (docs/gpu.md).
KINDS = [
    ("llama", {}, True),
    ("gemma", {}, True),
    ("gemma2", {}, False),  # capped logits
    ("gemma3_text", {}, True),  # its window is wider than the sequences
    ("gemma3_text", {"sliding_window": 16}, False),
    ("mistral", {}, True),  # one window
    ("qwen2", {}, True),
    (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
        False,
    ),
    ("qwen3", {}, True),
    ("smollm3", {}, True),
    ("granite", {}, True),
    ("olmo2", {}, True),
]


def test_every_family_is_there():
    assert {family for family, _, _ in KINDS} == set(FAMILIES)


@pytest.mark.parametrize("family, changes, fused", KINDS)
def test_the_train_step_of_every_family_compiles(family, changes, fused):
    target = topology("h100:2")
    config = config_from_hf(tiny_config(model_type=family, **SIZES, **changes))
    settings = SETTINGS.override({"mesh.shape": "fsdp:2"})
    text = compiled(settings, config, target, "train")
    assert read_work(text).sent() > 0 and ("__cudnn$fmha" in text) == fused


def test_float32_takes_plain_attention():
    settings = SETTINGS.override({"mesh.shape": "data:1", "model.compute_dtype": "float32"})
    config = config_from_hf(tiny_config(**SIZES))
    assert "__cudnn$fmha" not in compiled(settings, config, topology("h100:1"), "train")


@pytest.mark.parametrize("kind", ["score", "decode"])
@pytest.mark.parametrize(
    "family, changes", [("gemma2", {}), ("gemma3_text", {"sliding_window": 9})]
)
def test_caps_and_windows_score_and_decode(family, changes, kind):
    config = config_from_hf(tiny_config(model_type=family, **SIZES, **changes))
    settings = SETTINGS.override({"mesh.shape": "fsdp:2"})
    text = compiled(settings, config, topology("h100:2"), kind)
    assert read_work(text).flops > 0 and "__cudnn$fmha" not in text


def compiled(settings, config, target, kind):
    """Return the text of the largest program of a kind."""
    sharder = target.sharder(settings.mesh.shape)
    with compiling_for(target.capability):
        every = programs(settings, config, sharder, [kind])
        return max((p.trace().lower().compile().as_text() for p in every), key=len)


@pytest.mark.parametrize("mesh", ["fsdp:2", "data:2", "tensor:2"])
def test_an_engine_on_several_gpus_writes_its_cache_in_place(mesh):
    """Prompts are read into rows of the cache, and token follows token, without a copy of it."""
    rows, slots, new = 16, 1024, 8
    context = Context(SETTINGS)
    config = config_from_hf(tiny_config(**SIZES, num_hidden_layers=12))
    context.sharder = topology("h100:2").sharder(mesh)
    decoder, whole = context.decoder(config), context.sharder.replicated()
    ints = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32, sharding=whole)
    params = param_table(config).abstract(context.sharder, jnp.bfloat16)

    def idle():
        return Whole(decoder, params).idle(rows, slots, new, False)

    def advance(state, params, stop_ids):
        return Whole(decoder, params).advance(state, stop_ids, None, new - 1, rows)

    def admit(state, params, stop_ids, tokens_GT, number_G):
        prompts = Prompts(tokens_GT, number_G)
        return Whole(decoder, params).admit(state, prompts, number_G, stop_ids, None)

    shardings = jax.jit(idle).lower().compile().output_shardings
    state = jax.tree.map(struct, jax.eval_shape(idle), shardings)
    cache = local_bytes(state.past.cache)
    prompts = ints((2, 64)), ints((2,))
    for program, inputs in ((advance, ()), (admit, prompts)):
        traced = jax.jit(program, donate_argnums=0).trace(state, params, ints((1,)), *inputs)
        compiled = traced.lower().compile()
        memory = compiled.memory_analysis()
        # A copy of its keys, or of its values, would be half of it.
        assert memory.alias_size_in_bytes >= cache > 2 * memory.temp_size_in_bytes
        largest = max(c.result for c in read_work(compiled.as_text()).collectives)
        assert largest < cache / 3  # the prompts' own, 2 rows of 16, are sent


def struct(shape, sharding):
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)


def test_decoding_a_batch_compiles_for_several_gpus():
    target = topology("h200:4")
    settings = SETTINGS.override({"mesh.shape": "fsdp:2,tensor:2"})
    sharder, config = target.sharder(settings.mesh.shape), config_from_hf(tiny_config(**SIZES))
    with compiling_for(target.capability):
        (program,) = programs(settings, config, sharder, ["decode"])
        f = measure(program, target, sharder)
    assert f.fits and not f.work.unknown_loops and f.work.sent() > 0
