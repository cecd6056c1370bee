"""The other side of decoding: Hugging Face `generate` with torch on the same device."""

from __future__ import annotations

import importlib.util
import statistics
import time
from typing import Any

from benchmarks.common import raw_config
from benchmarks.gpu.parts import Sizes
from benchmarks.gpu.prompts import prompt_ids
from benchmarks.gpu.records import Record
from benchmarks.gpu.skip import Skip


def device_of(platform: str) -> str:
    """Return torch's name of the device that JAX has. Raises Skip: torch has none such."""
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise Skip(f"{package} is not installed")
    import torch

    if platform == "cpu":
        return "cpu"
    if platform != "gpu" or not torch.cuda.is_available():
        raise Skip(f"torch {torch.__version__} sees no CUDA device")
    return "cuda"


def run(sizes: Sizes, record: Record, platform: str, layers: int) -> None:
    """Time batches of the same ids, with random weights of the same shape; no token stops a
    sequence.

    Args:
      sizes, record: see `Bench`.
      platform: of JAX's device.
      layers: blocks of our side's model.
    """
    device = device_of(platform)
    import torch
    import transformers

    dtype = getattr(torch, sizes.dtype)
    raw = raw_config(sizes.shape, layers, sizes.dtype)
    begun = time.perf_counter()
    with torch.device(device):
        config = transformers.LlamaConfig(**raw)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.generation_config.eos_token_id = None  # every sequence gets all its new tokens
    record.note(
        version=f"torch {torch.__version__}, transformers {transformers.__version__}",
        attention=model.config._attn_implementation,
        layers=layers,
        made_in=time.perf_counter() - begun,
        batches={},
    )
    batches: dict[str, Any] = {}
    for number in sizes.decode_batches:
        ids = torch.tensor(prompt_ids(raw["vocab_size"], number, sizes.prompt), device=device)
        seconds = []
        for repeat in range(sizes.repeats + 1):  # the first warms up
            begun = time.perf_counter()
            with torch.no_grad():
                out = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=sizes.new,
                    do_sample=False,
                    pad_token_id=0,
                )
            out = out.cpu()  # waits for the device
            if repeat:
                seconds.append(time.perf_counter() - begun)
        assert out.shape == (number, sizes.prompt + sizes.new)
        batches[str(number)] = {
            "seconds": seconds,
            "tokens_per_second": number * sizes.new / statistics.median(seconds),
        }
        record.note(batches=batches)
    if device == "cuda":
        record.note(peak_bytes=torch.cuda.max_memory_allocated())
