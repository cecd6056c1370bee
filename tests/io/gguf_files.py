"""GGUF files that the tests write with the gguf package's own writer, and what they read."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

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
