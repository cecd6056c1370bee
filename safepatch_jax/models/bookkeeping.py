"""Attributes of config.json that say nothing about the forward pass, and those that must have one
value.

Sources: the configuration base class and the generation settings of transformers 3 to 5.24, which
older versions wrote into config.json, and what trainers add.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safepatch_jax.runtime.text import printable

# `pretraining_tp` cuts a product into parts with the same sum. `auto_map` names code, which is
# never run; `io.beside` says so.
_MODEL = """
_name_or_path name_or_path _commit_hash architectures auto_map transformers_version
transformers.js_config use_cache initializer_range is_llama_config pretraining_tp tokenizer_class
keys_to_ignore_at_inference torch_dtype dtype torchscript use_bfloat16 tf_legacy_loss xla_device
return_dict output_attentions _output_attentions output_hidden_states tie_last_hidden_states
is_decoder finetuning_task id2label label2id num_labels problem_type prefix task_specific_params
custom_pipelines bos_token_id pad_token_id unk_token_id sep_token_id cls_token_id mask_token_id
decoder_start_token_id gradient_checkpointing use_gradient_checkpointing attn_implementation
_attn_implementation _attn_implementation_internal _attn_implementation_autoset
experts_implementation _experts_implementation _experts_implementation_internal
_flash_attn_2_enabled use_flash_attention use_flash_attention_2 use_flash_attn base_model_tp_plan
base_model_pp_plan base_model_ep_plan
"""
_GENERATION = """
max_length max_new_tokens min_length min_new_tokens early_stopping max_time stop_strings do_sample
num_beams cache_implementation cache_config max_cache_len temperature top_k top_p min_p top_h
typical_p epsilon_cutoff eta_cutoff repetition_penalty encoder_repetition_penalty length_penalty
no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids force_words_ids constraints
renormalize_logits forced_bos_token_id forced_eos_token_id remove_invalid_values
exponential_decay_length_penalty suppress_tokens begin_suppress_tokens sequence_bias token_healing
guidance_scale watermarking_config num_return_sequences output_scores output_logits
return_dict_in_generate is_assistant num_assistant_tokens num_assistant_tokens_schedule
assistant_confidence_threshold prompt_lookup_num_tokens max_matching_ngram_size
assistant_early_exit assistant_lookbehind target_lookbehind assistant_ensemble_weight
speculation_type compile_config disable_compile continuous_batching_config low_memory penalty_alpha
dola_layers diversity_penalty num_beam_groups prefill_chunk_size use_mtp _from_model_config
generation_config
"""
_TRAINERS = """
model_max_length max_seq_length max_sequence_length seq_length padding_side neftune_noise_alpha
"""
BENIGN = frozenset(f"{_MODEL} {_GENERATION} {_TRAINERS}".split())
_BENIGN_BEGINNINGS = ("unsloth_", "tokenizer_")
# Attributes of any family that must have one of these values (or be absent): the decoder has no
# switch for another.
FIXED: Mapping[str, tuple] = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0.0,),
    "partial_rotary_factor": (1.0,),
    "rope_interleaved": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
    "chunk_size_feed_forward": (0,),
    "pruned_heads": ({}, []),
    "per_layer_config": ({},),
    "is_causal": (True,),
}
QUANTISED = ("quantization_config", "quantization", "compression_config")
DEQUANTISE = (
    "Give the original model in bfloat16, float16 or float32, or dequantise this one first "
    "(model.dequantize() of transformers, then save_pretrained)"
)


def is_benign(key: str) -> bool:
    """Return whether an attribute says nothing about the forward pass, whatever its value."""
    return key in BENIGN or key.startswith(_BENIGN_BEGINNINGS)


def quantised_by(raw: Mapping[str, Any]) -> str | None:
    """Return how config.json says that the weights are quantised; None if it does not."""
    for key in QUANTISED:
        settings = raw.get(key)
        if settings in (None, {}, False):
            continue
        method = settings.get("quant_method") if isinstance(settings, Mapping) else None
        if isinstance(settings, Mapping) and method is None:
            bits = [name for name in ("load_in_4bit", "load_in_8bit") if settings.get(name)]
            method = "bitsandbytes" if bits else None
        if not isinstance(method, str):
            method = "MLX" if key == "quantization" else "an unnamed method"
        return f"{printable(method, 40)}, according to {key}"
    return None
