"""Greedy generation on CPU: our engine against Hugging Face's `generate`, the same prompts,
tokens/s side by side.

  python -m benchmarks.generate --model=DIR            # e.g. SmolLM2-135M-Instruct; five minutes

32 prompts of the built-in ordinary instructions in the model's chat template, batches of 16 by
length, 64 new tokens, float32. Both sides stop at the model's stop tokens; tokens are counted up to
these. The sides take turns; compilation is left out (it is stated), and the answers are compared.
The floor is reading the weights once a step: decode steps x bytes of the weights over the bandwidth
of a copy.
"""

from __future__ import annotations

import os
import statistics
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from absl import app, flags

from safepatch_jax.data.records import load_records
from safepatch_jax.evaluation.engine import Engine

_MODEL = flags.DEFINE_string("model", None, "A Hugging Face folder of a chat model.", required=True)
_PROMPTS = flags.DEFINE_integer("prompts", 32, "How many prompts.", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch", 16, "Prompts that run together.", lower_bound=1)
_NEW = flags.DEFINE_integer("new", 64, "New tokens of a prompt, at most.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 3, "Times each figure is taken.", lower_bound=1)


def torch_side(engine: Engine, prompts: list[list[int]]):
    """Return a call of Hugging Face generate on the same batches."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        _MODEL.value, dtype=torch.float32
    ).eval()
    pad = engine.tokenizer.pad_token_id or 0
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))

    def call() -> list[list[int]]:
        answers: list[list[int]] = [[] for _ in prompts]
        for start in range(0, len(order), _BATCH.value):
            group = [prompts[i] for i in order[start : start + _BATCH.value]]
            width = max(map(len, group))
            tokens = torch.tensor([[pad] * (width - len(p)) + p for p in group])
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in group])
            with torch.no_grad():
                out = model.generate(
                    tokens,
                    attention_mask=mask,
                    max_new_tokens=_NEW.value,
                    do_sample=False,
                    eos_token_id=list(engine.stop_ids),
                    pad_token_id=pad,
                )
            for i, row in zip(order[start:], out[:, width:].tolist()):
                end = next((k for k, t in enumerate(row) if t in engine.stop_ids), len(row))
                answers[i] = row[:end]
        return answers

    return call


def main(argv) -> None:
    del argv
    engine = Engine.open(_MODEL.value, batch_size=_BATCH.value)
    prompts = [engine.ask(r.prompt) for r in load_records("ordinary", "builtin")[: _PROMPTS.value]]
    sides = {
        "ours": lambda: engine.complete_ids(prompts, _NEW.value),
        "HF generate": torch_side(engine, prompts),
    }
    begun = time.perf_counter()
    answers = {"ours": sides["ours"]()}
    first = time.perf_counter() - begun
    answers["HF generate"] = sides["HF generate"]()
    equal = sum(a == b for a, b in zip(*answers.values()))
    weights = sum(x.nbytes for x in jax.tree.leaves(engine.params))
    copy = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree))
    taken, copies = {name: [] for name in sides}, []
    jax.block_until_ready(copy(engine.params))
    for _ in range(_REPEATS.value):
        for name, side in sides.items():
            begun = time.perf_counter()
            side()
            taken[name].append(time.perf_counter() - begun)
        begun = time.perf_counter()
        jax.block_until_ready(copy(engine.params))
        copies.append(time.perf_counter() - begun)
    tokens = sum(map(len, answers["ours"]))
    steps = sum(
        min(_NEW.value, 1 + max(len(answers["ours"][i]) for i in group))
        for group in _batches(prompts)
    )
    floor = steps * statistics.median(copies) / 2  # a copy reads and writes
    print(
        f"{len(prompts)} prompts in batches of {_BATCH.value}, at most {_NEW.value} new tokens, "
        f"float32, {os.cpu_count()} cores; "
        f"{tokens} tokens in {steps} steps; {equal} of {len(prompts)} answers are equal; our "
        "first call, with compilation, "
        f"{first:.1f} s; median of {_REPEATS.value} (least - most)\n"
    )
    print("| | seconds | tokens/s |\n|---|---|---|")
    for name, seconds in taken.items():
        print(
            f"| {name} | {statistics.median(seconds):.2f} ({min(seconds):.2f} - "
            f"{max(seconds):.2f}) | {tokens / statistics.median(seconds):.0f} |"
        )
    print(
        f"| floor: {steps} x {weights / 1e6:.0f} MB of weights | {floor:.2f} | "
        f"{tokens / floor:.0f} |"
    )
    ratios = [b / a for a, b in zip(taken["ours"], taken["HF generate"])]
    print(
        f"\nHF generate takes {statistics.median(ratios):.2f} times as long ({min(ratios):.2f} - "
        f"{max(ratios):.2f})."
    )
    if equal < len(prompts):
        sys.exit("The answers differ.")


def _batches(prompts: list[list[int]]) -> list[list[int]]:
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    return [order[start : start + _BATCH.value] for start in range(0, len(order), _BATCH.value)]


if __name__ == "__main__":
    app.run(main)
