"""GGUF in: tiny files of every family and type, against transformers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safepatch_jax.data.chat import Chat
from safepatch_jax.io.gguf import convert_gguf
from safepatch_jax.io.hf import load_params
from tests.io.gguf_files import (
    QUANTISED,
    D,
    F,
    K,
    L,
    N,
    V,
    assert_loads,
    tensors_of,
    transformers_model,
    write_tiny,
)


@pytest.mark.parametrize(
    "family, kind",
    [
        *(("llama", kind) for kind in ("F32", "F16", "BF16", *QUANTISED)),
        ("mistral", "Q8_0"),
        ("qwen2", "Q4_1"),
    ],
)
def test_families_and_types(tmp_path, family, kind):
    expected = write_tiny(tmp_path / "x.gguf", family, kind)
    convert_gguf(tmp_path / "x.gguf", tmp_path / "out")
    ours = tensors_of(tmp_path / "out")
    assert ours.keys() == expected.keys()
    for name, x in expected.items():
        assert ours[name].shape == x.shape, name
        assert ours[name].dtype == x.dtype and ours[name].tobytes() == x.tobytes(), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (
        config["dtype"]
        == config["torch_dtype"]
        == {"F16": "float16", "BF16": "bfloat16"}.get(kind, "float32")
    )
    assert not config["tie_word_embeddings"]


@pytest.mark.parametrize(
    "family, head_dim, tied",
    [("llama", 64, True), ("llama", 32, False), ("mistral", 128, True), ("qwen2", 64, False)],
)
def test_folder_loads_in_transformers(tmp_path, family, head_dim, tied):
    write_tiny(tmp_path / "x.gguf", family, head_dim=head_dim, tied=tied)
    convert_gguf(tmp_path / "x.gguf", tmp_path / "out", shard_bytes=1_500_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    config = assert_loads(tmp_path / "out", family).config
    assert (
        config.hidden_size,
        config.intermediate_size,
        config.vocab_size,
        config.num_hidden_layers,
    ) == (D, F, V, L)
    assert (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.max_position_embeddings,
    ) == (N, K, 512)
    assert config.rms_norm_eps == 1e-5 and config.rope_parameters == {
        "rope_type": "default",
        "rope_theta": 5e4,
    }
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (263, 262, 264)
    assert config.tie_word_embeddings == tied and config.hidden_act == "silu"
    if family == "mistral":
        assert config.sliding_window == 128
    if family == "qwen2":
        assert not config.use_sliding_window and set(config.layer_types) == {"full_attention"}


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_our_reader_takes_the_folder(tmp_path, family, sharder):
    write_tiny(tmp_path / "x.gguf", family, "Q8_0")
    convert_gguf(tmp_path / "x.gguf", tmp_path / "out")
    config, params = load_params(tmp_path / "out", sharder)
    assert (config.family, config.head_dim, config.tied_head) == (family, 64, False)
    assert jax.tree.leaves(params)
    assert Chat(tmp_path / "out", V).encode("hello", "world").prompt == "hello"


@pytest.mark.parametrize(
    "family, kind",
    [("llama", "F16"), ("llama", "Q4_K"), ("qwen2", "Q8_0")],
)
def test_equals_what_transformers_reads_from_the_file(tmp_path, family, kind):
    torch = pytest.importorskip(
        "torch", reason="transformers reads GGUF with torch alone: pip install torch"
    )
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    write_tiny(tmp_path / "x.gguf", family, kind)
    convert_gguf(tmp_path / "x.gguf", tmp_path / "out")
    ours, _ = transformers_model(tmp_path / "out")
    # `from_pretrained(gguf_file=...)` does the same, and needs the accelerate package.
    config = AutoConfig.from_pretrained(tmp_path, gguf_file="x.gguf")
    theirs = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    loaded = load_gguf_checkpoint(
        str(tmp_path / "x.gguf"), return_tensors=True, model_to_load=theirs
    )["tensors"]
    theirs.load_state_dict(loaded, strict=True)
    assert loaded.keys() == tensors_of(tmp_path / "out").keys()
    for name, x in ours.state_dict().items():
        torch.testing.assert_close(x, loaded[name].float(), rtol=1e-6, atol=1e-9)
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)
    for key in (
        "hidden_size",
        "num_key_value_heads",
        "max_position_embeddings",
        "hidden_act",
        "tie_word_embeddings",
    ):
        assert getattr(ours.config, key) == getattr(config, key), key
    assert ours.config.rope_parameters["rope_theta"] == config.rope_parameters["rope_theta"]


def llama3_divisors(factor: float, theta: float, head_dim: int) -> np.ndarray:
    """As llama.cpp's converter computes them."""
    divisors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * np.pi * np.float32(theta) ** np.float32(i / head_dim)
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192 / 1:
            divisors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_rope_divisors_become_llama3_scaling(tmp_path, factor):
    torch = pytest.importorskip("torch", reason="the reference is torch: pip install torch")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    divisors = llama3_divisors(factor, 500000.0, 64)
    write_tiny(
        tmp_path / "x.gguf",
        extra={"rope_freqs.weight": divisors},
        meta={"rope.freq_base": 500000.0},
    )
    convert_gguf(tmp_path / "x.gguf", tmp_path / "out")
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert (
        raw["rope_parameters"] == raw["rope_scaling"] | {"rope_theta": 500000.0}
        and raw["rope_theta"] == 500000.0
    )
    config = assert_loads(tmp_path / "out", "llama").config
    scaled, attention = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1 / 500000.0 ** (np.arange(0, 64, 2) / 64)
    np.testing.assert_allclose(scaled.numpy(), plain / divisors, rtol=1e-5)
    assert attention == 1.0 and any(1 < d < factor for d in divisors)


@pytest.mark.parametrize(
    "divisors, message",
    [
        (
            llama3_divisors(8.0, 500000.0, 64) * np.float32(1.001),
            "does not follow from LLaMA 3's RoPE scaling",
        ),
        (np.zeros(32, np.float32), "does not follow"),
        (np.full(32, np.nan, np.float32), "does not follow"),
        (
            np.ones(31, np.float32),
            r"rope_freqs\.weight is float32 \(31,\), expected float32 \(32,\)",
        ),
        (np.ones(32, np.float16), r"rope_freqs\.weight is float16"),
    ],
)
def test_other_rope_divisors_are_refused(tmp_path, divisors, message):
    write_tiny(
        tmp_path / "x.gguf",
        extra={"rope_freqs.weight": divisors},
        meta={"rope.freq_base": 500000.0},
    )
    with pytest.raises(ValueError, match=message):
        convert_gguf(tmp_path / "x.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_dtype(tmp_path):
    expected = write_tiny(tmp_path / "x.gguf", "llama", "Q8_0")
    for dtype in ("bfloat16", "float16", "float32"):
        convert_gguf(tmp_path / "x.gguf", tmp_path / dtype, dtype=dtype)
        for name, x in tensors_of(tmp_path / dtype).items():
            assert x.dtype == jnp.dtype(dtype)
            assert np.array_equal(x, expected[name].astype(np.float32).astype(x.dtype)), name
        assert json.loads((tmp_path / dtype / "config.json").read_text())["dtype"] == dtype
    with pytest.raises(ValueError, match="dtype 'int8' is unknown; choose 'keep'"):
        convert_gguf(tmp_path / "x.gguf", tmp_path / "out", dtype="int8")
    write_tiny(
        tmp_path / "x.gguf", change=lambda name, x: x * 1e7 if name == "blk.1.ffn_up.weight" else x
    )
    with pytest.raises(
        ValueError,
        match=r"layers\.1\.mlp\.up_proj\.weight holds numbers beyond the range of float16",
    ):
        convert_gguf(tmp_path / "x.gguf", tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_layers_of_one_kind_get_one_dtype(tmp_path, sharder):
    """Mixed files (some layers quantised more) load: a stacked parameter has one dtype."""
    kinds = {"blk.1.ffn_up.weight": "Q8_0", "token_embd.weight": "BF16"}
    expected = write_tiny(tmp_path / "x.gguf", "llama", lambda name: kinds.get(name, "F16"))
    convert_gguf(tmp_path / "x.gguf", tmp_path / "out")
    ours = tensors_of(tmp_path / "out")
    assert {ours[f"model.layers.{i}.mlp.up_proj.weight"].dtype for i in range(L)} == {
        np.dtype(np.float32)
    }
    assert (
        ours["model.embed_tokens.weight"].dtype == jnp.bfloat16
        and ours["lm_head.weight"].dtype == np.float16
    )
    for name, x in expected.items():
        np.testing.assert_allclose(
            ours[name].astype(np.float64), x.astype(np.float64), rtol=1e-6, atol=1e-9
        )
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    load_params(tmp_path / "out", sharder)


def test_a_window_as_long_as_the_context_is_none(tmp_path):
    for family in ("mistral", "qwen2"):
        write_tiny(tmp_path / "x.gguf", family, meta={"attention.sliding_window": 512})
        convert_gguf(tmp_path / "x.gguf", tmp_path / family)
        config = json.loads((tmp_path / family / "config.json").read_text())
        assert (
            config["model_type"] == {"mistral": "llama"}.get(family, family)
            and "sliding_window" not in config
        )


def test_ends_of_a_turn(tmp_path):
    write_tiny(
        tmp_path / "x.gguf",
        meta={"tokenizer.ggml.eot_token_id": 265, "tokenizer.ggml.eom_token_id": 262},
    )
    convert_gguf(tmp_path / "x.gguf", tmp_path / "out")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text())["eos_token_id"] == [262, 265]
