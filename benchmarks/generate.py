"""Greedy generation on CPU: our engine against Hugging Face's `generate`, the same prompts,
tokens/s side by side.

  python -m benchmarks.generate --model=DIR            # e.g. SmolLM2-135M-Instruct; five minutes

32 prompts of the built-in ordinary instructions in the model's chat template, batches of 16 by
length, 64 new tokens, float32. Both sides stop at the model's stop tokens; tokens are counted up to
these. The sides take turns; compilation is reported apart, and the answers are compared. The floor
is reading the weights once a step: decode steps x bytes of the weights over the bandwidth of a
copy.
"""

from __future__ import annotations

import os
import statistics
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from absl import app, flags

from benchmarks.common import spread, take_turns
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

    def call() -> list[list[int]]:
        answers: list[list[int]] = [[] for _ in prompts]
        for numbers in _batches(prompts):
            group = [prompts[i] for i in numbers]
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
            for i, row in zip(numbers, out[:, width:].tolist()):
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
    jax.block_until_ready(copy(engine.params))
    copies = {"copy": lambda: jax.block_until_ready(copy(engine.params))}
    times = take_turns(sides | copies, _REPEATS.value)
    seconds_of_copy = statistics.median(times.pop("copy"))
    tokens, steps = sum(map(len, answers["ours"])), 0
    for numbers in _batches(prompts):
        longest = max(len(answers["ours"][i]) for i in numbers)
        steps += min(_NEW.value, 1 + longest)
    floor = steps * seconds_of_copy / 2  # a copy reads and writes
    print(
        f"{len(prompts)} prompts in batches of {_BATCH.value}, at most {_NEW.value} new tokens, "
        f"float32, {os.cpu_count()} cores; "
        f"{tokens} tokens in {steps} steps; {equal} of {len(prompts)} answers are equal; our "
        "first call, with compilation, "
        f"{first:.1f} s; median of {_REPEATS.value} (least - most)\n"
    )
    print("| | seconds | tokens/s |\n|---|---|---|")
    for name, seconds in times.items():
        rate = tokens / statistics.median(seconds)
        print(f"| {name} | {spread(seconds, '.2f')} | {rate:.0f} |")
    print(
        f"| floor: {steps} x {weights / 1e6:.0f} MB of weights | {floor:.2f} | "
        f"{tokens / floor:.0f} |"
    )
    ratios = [b / a for a, b in zip(times["ours"], times["HF generate"])]
    middle, _, ends = spread(ratios, ".2f").partition(" ")
    print(f"\nHF generate takes {middle} times as long {ends}.")
    if equal < len(prompts):
        sys.exit("The answers differ.")


def _batches(prompts: list[list[int]]) -> list[list[int]]:
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    return [order[start : start + _BATCH.value] for start in range(0, len(order), _BATCH.value)]


if __name__ == "__main__":
    app.run(main)
