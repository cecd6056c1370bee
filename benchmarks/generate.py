"""Greedy generation on CPU, a whole evaluation: our engine against Hugging Face's `generate`.

  python -m benchmarks.generate --model=DIR            # e.g. SmolLM2-135M-Instruct; 20 minutes

Prompts are the built-in ordinary instructions in the model's chat template, float32, both sides end
at the model's stop tokens. Each figure is one fresh process that loads the model and then answers
all prompts twice; seconds count from the loaded model to the last answer. The sides take turns:

  ours, cold     compiled programs are not cached; the prompts are written and tokenised as well
  ours, warm     the compile cache of the run before
  HF             generate with its own cache of growing length; prompts come tokenised
  HF static      cache_implementation='static', with --static (it compiles with torch.compile)

Batches of HF are by length, as many prompts as run together in ours. The answers are compared. The
floor of a token step is the larger of its weights at the speed of reading memory and its products
at the speed of a 2048 x 2048 product; of a run, the steps of full batches, and the prompts' tokens.
"""

from __future__ import annotations

import itertools
import json
import os
import pathlib
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

from absl import app, flags

from benchmarks.common import machine, read_speed, spread

_MODEL = flags.DEFINE_string("model", None, "A Hugging Face folder of a chat model.", required=True)
_BATCHES = flags.DEFINE_list("batches", ["1", "16", "32"], "Prompts that run together.")
_PROMPTS = flags.DEFINE_integer("prompts", 32, "How many; of batch 1 an eighth.", lower_bound=1)
_NEW = flags.DEFINE_integer("new", 64, "New tokens of a prompt, at most.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 3, "Processes of each side.", lower_bound=1)
_STATIC = flags.DEFINE_bool("static", False, "Measure HF with its static cache, too.")
_SIDE = flags.DEFINE_string("side", None, "Of a process that this command starts.")
_FOLDER = flags.DEFINE_string("folder", None, "Its files.")


def ours(folder: pathlib.Path, count: int, batch: int):
    """Return (the engine's prompts, stop tokens, a call that answers them)."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from safepatch_jax.data.records import load_records
    from safepatch_jax.evaluation.engine import Engine
    from safepatch_jax.runtime.programs import keep_programs

    keep_programs(folder)
    engine = Engine.open(_MODEL.value, batch_size=batch)

    def call():
        records = load_records("ordinary", "builtin")[:count]
        prompts = [engine.ask(record.prompt) for record in records]
        answers = engine.complete_ids(prompts, _NEW.value)
        work = {"prompts": prompts, "stops": list(engine.stop_ids)}
        (folder / "prompts.json").write_text(json.dumps(work))
        return answers

    return call


def theirs(folder: pathlib.Path, batch: int, static: bool):
    """Return a call of Hugging Face generate on the same prompts."""
    import torch
    import transformers

    work = json.loads((folder / "prompts.json").read_text())
    prompts, stops = work["prompts"], work["stops"]
    model = transformers.AutoModelForCausalLM.from_pretrained(
        _MODEL.value, dtype=torch.float32
    ).eval()
    options = {"cache_implementation": "static"} if static else {}

    def call():
        answers: list[list[int]] = [[] for _ in prompts]
        order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
        for start in range(0, len(order), batch):
            numbers = order[start : start + batch]
            group = [prompts[i] for i in numbers]
            width = max(map(len, group))
            with torch.no_grad():
                out = model.generate(
                    torch.tensor([[0] * (width - len(p)) + p for p in group]),
                    attention_mask=torch.tensor(
                        [[0] * (width - len(p)) + [1] * len(p) for p in group]
                    ),
                    max_new_tokens=_NEW.value,
                    do_sample=False,
                    eos_token_id=stops,
                    pad_token_id=0,
                    **options,
                )
            for i, row in zip(numbers, out[:, width:].tolist()):
                end = next((k for k, token in enumerate(row) if token in stops), len(row))
                answers[i] = row[:end]
        return answers

    return call


def measure(side: str, folder: pathlib.Path, count: int, batch: int) -> None:
    """Answer all prompts twice and print what it took, as one line of JSON."""
    begun = time.perf_counter()
    if side.startswith("ours"):
        call = ours(folder, count, batch)
    else:
        call = theirs(folder, batch, side == "HF static")
    loaded = time.perf_counter()
    answers = call()
    first = time.perf_counter()
    repeated = call()
    again = time.perf_counter()
    if repeated != answers:
        sys.exit(f"{side}: the second answers differ from the first.")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)
    seconds = {"load": loaded - begun, "first": first - loaded, "again": again - first}
    print(json.dumps(seconds | {"peak": peak, "answers": answers}))


def run(side: str, folder: pathlib.Path, count: int, batch: int) -> dict:
    """Measure a side in a process of its own."""
    options = [f"--model={_MODEL.value}", f"--new={_NEW.value}", f"--prompts={count}"]
    command = [sys.executable, "-m", "benchmarks.generate", f"--side={side}", f"--folder={folder}"]
    env = {name: x for name, x in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    done = subprocess.run(
        [*command, *options, f"--batches={batch}"],
        capture_output=True,
        text=True,
        env=env | {"TQDM_DISABLE": "1"},
    )
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def floor(folder: pathlib.Path, answers: list[list[int]], batch: int) -> tuple[float, str]:
    """Return the least seconds of a run, and what bounds its steps."""
    import numpy as np

    config = json.loads((pathlib.Path(_MODEL.value) / "config.json").read_text())
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    kv = hidden * config["num_key_value_heads"] // config["num_attention_heads"]
    block = 2 * hidden * (hidden + kv) + 3 * hidden * config["intermediate_size"]
    head = config["vocab_size"] * hidden
    x = np.ones((2048, 2048), np.float32)
    times = []
    for _ in range(4):
        begun = time.perf_counter()
        x @ x
        times.append(time.perf_counter() - begun)
    peak, read = 2 * 2048**3 / min(times), read_speed()
    prompts = json.loads((folder / "prompts.json").read_text())["prompts"]
    tokens = sum(map(len, prompts))
    prefill = 2 * (tokens * layers * block + len(prompts) * head) / peak
    weights = layers * block + head
    of_bytes, of_products = 4 * weights / read, 2 * batch * weights / peak
    steps = sum(min(_NEW.value, len(ids) + 1) - 1 for ids in answers) / batch
    told = f"{read / 1e9:.1f} GB/s, {peak / 1e9:.0f} GFLOP/s"
    return prefill + steps * max(of_bytes, of_products), told


def compare(batch: int) -> bool:
    """Print the table of one batch size; tell whether the answers are equal."""
    count = _PROMPTS.value if batch > 1 else max(1, _PROMPTS.value // 8)
    sides = ["ours, cold", "ours, warm", "HF"] + ["HF static"] * _STATIC.value
    results: dict[str, list[dict]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as name:
        for _ in range(_REPEATS.value):
            for side in sides:
                folder = pathlib.Path(name)
                if side == "ours, cold":
                    shutil.rmtree(folder / "compiled", ignore_errors=True)
                results[side].append(run(side, folder, count, batch))
        answers = results["HF"][0]["answers"]
        least, bounds = floor(pathlib.Path(name), answers, batch)
    tokens, equal = sum(map(len, answers)), count
    for result in itertools.chain.from_iterable(results.values()):
        equal = min(equal, sum(a == b for a, b in zip(result["answers"], answers)))
    print(
        f"\n{count} prompts, batch {batch}, at most {_NEW.value} new tokens, {tokens} in all; "
        f"{equal} of {count} answers are equal. {machine()}, {bounds}; median of "
        f"{_REPEATS.value} (least - most), seconds\n"
    )
    print("| | load | first call | HF's first by it | again | HF's again by it | peak, GiB |")
    print("|---|---|---|---|---|---|---|")
    middle = {}
    for key in ("first", "again"):
        middle[key] = statistics.median(result[key] for result in results["HF"])
    for side, of_side in results.items():
        cells = [side, f"{statistics.median(r['load'] for r in of_side):.1f}"]
        for key in ("first", "again"):
            seconds = [result[key] for result in of_side]
            cells += [spread(seconds, ".1f"), f"{middle[key] / statistics.median(seconds):.2f}"]
        cells.append(f"{max(result['peak'] for result in of_side):.2f}")
        print(f"| {' | '.join(cells)} |")
    print(f"| floor | | | | {least:.1f} | {middle['again'] / least:.2f} | |", flush=True)
    return equal == count


def main(argv) -> None:
    del argv
    if _SIDE.value:
        measure(_SIDE.value, pathlib.Path(_FOLDER.value), _PROMPTS.value, int(_BATCHES.value[0]))
        return
    equal = [compare(int(batch)) for batch in _BATCHES.value]
    if not all(equal):
        sys.exit("The answers differ.")


if __name__ == "__main__":
    app.run(main)
