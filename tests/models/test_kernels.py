"""Fused attention: the calls into the libraries' kernels, and when they are made."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safepatch_jax.mesh import Sharder, make_mesh
from safepatch_jax.models import attention
from safepatch_jax.models.config import config_from_hf
from safepatch_jax.models.decoder import Decoder
from safepatch_jax.models.kernels import SPLASH_FROM, fused_attention, kernel_for
from safepatch_jax.models.table import param_table
from safepatch_jax.testing import tiny_config
from tests.conftest import sharder_of


def reference(q_BTNH, k_BTKH, v_BTKH, window, scale):
    """Causal attention in float64, head by head."""
    q, k, v = (np.asarray(x, np.float64) for x in (q_BTNH, k_BTKH, v_BTKH))
    groups = q.shape[2] // k.shape[2]
    distance = np.arange(q.shape[1])[:, None] - np.arange(q.shape[1])
    seen = (distance >= 0) & (distance < (window or q.shape[1]))
    out = np.zeros_like(q)
    for head in range(q.shape[2]):
        logits = scale * np.einsum("bth,bsh->bts", q[:, :, head], k[:, :, head // groups])
        weights = np.where(seen, np.exp(logits - logits.max(-1, keepdims=True)), 0)
        out[:, :, head] = np.einsum(
            "bts,bsh->bth", weights / weights.sum(-1, keepdims=True), v[:, :, head // groups]
        )
    return out


def inputs(length, heads=4, kv_heads=2, head_dim=128):
    rng = np.random.default_rng(0)
    return [
        jnp.asarray(rng.standard_normal((2, length, n, head_dim)), jnp.float32)
        for n in (heads, kv_heads, kv_heads)
    ]


@pytest.mark.parametrize("window", [None, 1, 5, 200])
# 'xla' is the plain version of the call that is made for cuDNN.
@pytest.mark.parametrize("kernel", ["xla", "splash"])
def test_same_as_the_definition(kernel, window):
    q, k, v = inputs(24)
    for scale in (128**-0.5, 168**-0.5):  # Gemma 3 27B has the latter
        out = fused_attention(kernel, q, k, v, window, None, scale=scale, interpret=True)
        np.testing.assert_allclose(out, reference(q, k, v, window, scale), atol=2e-5)


def test_a_scale_of_the_architecture_reaches_the_kernel_unrounded(monkeypatch):
    """The plain version stands in for cuDNN, whose calls it is to see."""
    config = dataclasses.replace(config_of(sliding_window=None), attention_scale=168**-0.5)
    params, scales = param_table(config).init(jax.random.key(0)), []

    def plain(kernel, q_BTNH, *others, scale):
        scales.append(scale)
        return fused_attention("xla", q_BTNH, *others, scale=scale)

    def run(dtype):
        decoder = Decoder(config, dtype, None, attention="auto")
        tokens = jnp.arange(8)[None]
        return decoder.apply({"params": params}, tokens, tokens, tokens >= 0)[0]

    expected = run(jnp.float32)
    monkeypatch.setattr(attention, "kernel_for", lambda *_: "cudnn")
    monkeypatch.setattr(attention, "fused_attention", plain)
    np.testing.assert_allclose(run(jnp.float32), expected, atol=1e-5)
    run(jnp.bfloat16)
    assert set(scales) == {168**-0.5}


def test_splash_over_devices_and_its_gradient():
    sharder = Sharder(make_mesh("data:1,fsdp:2,tensor:2", jax.devices()[:4]))
    q, k, v = inputs(20)

    def gradient(kernel, sharder):
        def total(q, k, v):
            options = {"scale": 128**-0.5, "interpret": True}
            return jnp.sum(jnp.sin(fused_attention(kernel, q, k, v, 6, sharder, **options)))

        return jax.grad(total, argnums=(0, 1, 2))

    ours = jax.jit(gradient("splash", sharder))(q, k, v)
    plain = gradient("xla", None)(q, k, v)
    for a, b in zip(ours, plain):
        np.testing.assert_allclose(a, b, atol=2e-5)


def config_of(**changes):
    return config_from_hf(tiny_config(**{"head_dim": 128, "model_type": "mistral", **changes}))


def test_when_a_fused_kernel_runs():
    config = config_of(sliding_window=None)
    mixed = dataclasses.replace(config, windows=(0, 64))
    assert kernel_for("auto", config, jnp.bfloat16, 64, "cpu") == "xla"
    assert kernel_for("auto", config, jnp.bfloat16, SPLASH_FROM, "tpu") == "splash"
    assert kernel_for("auto", config, jnp.bfloat16, SPLASH_FROM - 1, "tpu") == "xla"
    assert kernel_for("fused", config, jnp.float32, 16, "tpu") == "splash"
    assert kernel_for("auto", config, jnp.bfloat16, 16, "gpu") == "cudnn"
    assert kernel_for("auto", config, jnp.float32, 1024, "gpu") == "xla"
    assert kernel_for("xla", config, jnp.bfloat16, 1024, "gpu") == "xla"
    assert kernel_for("auto", mixed, jnp.bfloat16, 65, "gpu") == "xla"
    # No sequence reaches beyond the window.
    assert kernel_for("auto", mixed, jnp.bfloat16, 64, "gpu") == "cudnn"


@pytest.mark.parametrize(
    "platform, dtype, changes, message",
    [
        ("cpu", jnp.bfloat16, {}, "the platform 'cpu' has no fused kernel"),
        ("gpu", jnp.float32, {}, "compute_dtype=bfloat16"),
        ("gpu", jnp.bfloat16, {"head_dim": 512}, "head size"),
        ("tpu", jnp.bfloat16, {"head_dim": 64}, "multiple of 128, not 64"),
    ],
)
def test_why_not(platform, dtype, changes, message):
    with pytest.raises(ValueError, match=f"{message}.*--model.attention=auto"):
        kernel_for("fused", config_of(sliding_window=None, **changes), dtype, 1024, platform)


def test_layers_with_different_windows_are_refused():
    mixed = dataclasses.replace(config_of(sliding_window=None), windows=(0, 64))
    with pytest.raises(ValueError, match="different windows"):
        kernel_for("fused", mixed, jnp.bfloat16, 1024, "gpu")


@pytest.mark.skipif(
    jax.default_backend() != "gpu", reason="needs a GPU: cuDNN's kernel runs there alone"
)
@pytest.mark.parametrize("window", [None, 16])
def test_decoder_on_a_gpu(window):
    config, sharder = config_of(sliding_window=window), sharder_of(1)
    params = param_table(config).init(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 64), 0, config.vocab_size)
    valid = jnp.ones((2, 64), bool)

    def run(attention):
        decoder = Decoder(config, jnp.bfloat16, sharder, attention=attention)
        return decoder.apply({"params": params}, tokens, jnp.arange(64)[None], valid)[0]

    np.testing.assert_allclose(run("fused"), run("xla"), atol=0.05)
