"""Judges that run in Hugging Face torch, on the CPU: what this project's decoder does not have."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Sequence
from typing import Any

from safepatch_jax.evaluation.judges.generative import Complete
from safepatch_jax.runtime import libraries
from safepatch_jax.runtime.console import say


def load(folder: str, kind: str, auto_class: str, what: str) -> tuple[Any, Any, Any]:
    """Return (torch, tokenizer, model); nothing is downloaded, unpickled or run from the folder.

    Args:
      kind: of the judge.
      auto_class: of transformers, such as 'AutoModelForCausalLM'.
      what: the model is, such as 'classifier'.

    Raises:
      ValueError: torch is absent, or the folder holds no such model in safetensors.
    """
    torch = _import_torch(kind)
    transformers = libraries.transformers()
    safe: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **safe)
        model, info = getattr(transformers, auto_class).from_pretrained(
            folder, use_safetensors=True, output_loading_info=True, **safe
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{folder}: no usable {what} ({error}). Needed: config.json, the tokenizer, and "
            "the weights as safetensors (a pickle is not read: save the model with "
            "save_pretrained first)."
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{folder}: the folder lacks weights of a {what} ({', '.join(missing[:3])}): is it a "
            f"model without the {what}'s head?"
        )
    return torch, tokenizer, model.eval()


def _import_torch(kind: str) -> Any:
    try:
        import torch
    except ImportError:
        raise ValueError(
            f"The judge '{kind}' needs torch, which is not installed: pip install torch, or "
            "take another judge."
        ) from None
    return torch


def continues(folder: str, kind: str) -> Complete:
    """Return what continues texts greedily with the language model in a folder, which is loaded
    when first asked. Errors: see `load`; missing torch and missing safetensors show at once."""
    _import_torch(kind)
    if not any(pathlib.Path(folder).glob("*.safetensors")):
        raise ValueError(
            f"{folder}: no weights in safetensors, which the judge '{kind}' needs. Download the "
            "whole model, or save it with save_pretrained."
        )

    @functools.cache
    def loaded() -> tuple[Any, Any, Any]:
        say(f"Loading {folder} (torch, CPU)")
        return load(folder, kind, "AutoModelForCausalLM", "language model")

    def complete(texts: Sequence[str], max_new: int) -> list[str]:
        torch, tokenizer, model = loaded()
        replies = []
        for text in texts:
            inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
            with torch.inference_mode():
                (ids,) = model.generate(**inputs, max_new_tokens=max_new, do_sample=False)
            new = ids[inputs["input_ids"].shape[1] :]
            replies.append(tokenizer.decode(new, skip_special_tokens=True))
        return replies

    return complete
