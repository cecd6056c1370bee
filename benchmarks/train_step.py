"""One train step (forward, backward, clip, AdamW), ours and Hugging Face torch's: tokens/s, share
of peak, memory.

  python -m benchmarks.train_step --model=DIR        # a Hugging Face folder; both sides, CPU
  # Ours alone, random weights.
  python -m benchmarks.train_step --device=gpu --shape=7b --layers=8 --dtype=bfloat16

Both sides use the same weights, the same batch, float32 and the same number of threads, and lower
the same answer-only loss: the mean NLL of the last `--answer` tokens of each sequence, with the
head run at their positions alone. Each side runs in a process of its own, so that its memory is its
own; they take turns, one step each, and between steps each multiplies large matrices: the faster
one's speed is the peak of the machine at that time. The losses of every step must agree to 1e-4:
then it is the same work.

The floor is the time of the step's needed products at that peak: 6 FLOPs a weight and token (2
forward, 4 backward), for the head at answer positions only, and attention's lower triangle. What a
side computes twice or masks out is not counted.

With `--shared` the sequences begin alike, as a chat template's system message makes them. On one
CPU device ours computes that once, and the floor counts it once; torch computes it for each.

With `--shape` a model of that width gets random weights: for sizes that no small machine holds,
with as many blocks as fit. On a GPU several steps are timed together, and the share is of the
chip's dense bfloat16 peak (float32: half of it, TF32).
"""

from __future__ import annotations

import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
from absl import app, flags

from benchmarks.common import machine, needed_flops, rated_flops, raw_config, spread

_MODEL = flags.DEFINE_string("model", None, "Hugging Face folder.")
_SHAPE = flags.DEFINE_enum(
    "shape", None, ["7b", "8b", "tiny"], "In place of --model: random weights; ours alone."
)
_LAYERS = flags.DEFINE_integer("layers", None, "Blocks with --shape.", lower_bound=1)
_DEVICE = flags.DEFINE_enum("device", "cpu", ["cpu", "gpu"], "Where ours runs.")
_DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "Arithmetic; bfloat16 with --shape alone."
)
_BATCH = flags.DEFINE_integer("batch", 8, "Sequences.", lower_bound=1)
_LENGTH = flags.DEFINE_integer(
    "length", None, "Tokens of a sequence; by default 128, on a GPU 2048.", lower_bound=4
)
_ANSWER = flags.DEFINE_integer(
    "answer", None, "Answer tokens at the end of each; by default a quarter.", lower_bound=1
)
_SHARED = flags.DEFINE_integer(
    "shared", 0, "Tokens that all sequences begin with; a multiple of 8.", lower_bound=0
)
_REPEATS = flags.DEFINE_integer("repeats", 7, "Times each figure is taken.", lower_bound=1)
_THREADS = flags.DEFINE_integer(
    "threads", len(os.sched_getaffinity(0)), "CPU threads of each side.", lower_bound=1
)
_REMAT = flags.DEFINE_enum(
    "remat", None, ["none", "dots", "full"], "model.remat; default: the setting's (--shape: dots)."
)
_SIDE = flags.DEFINE_enum("side", None, ["ours", "torch"], "Used by the benchmark itself.")

PRODUCT = {"cpu": 2048, "gpu": 8192}  # side of the square matrices
TOGETHER = {"cpu": 1, "gpu": 5}  # steps timed together
# glibc keeps freed memory for the process: torch then spares itself new pages at every step. Ours
# uses its own memory again.
KEEPS = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
}
LEARNING_RATE, CLIP_NORM = 1e-5, 1.0
AGREE = 1e-4


def work() -> tuple[int, int, int]:
    """Return sequences, tokens of each, answer tokens of each."""
    length = _LENGTH.value or (2048 if _DEVICE.value == "gpu" else 128)
    answer = _ANSWER.value or max(length // 4, 1)
    if answer >= length:
        raise app.UsageError(f"--answer={answer} must be less than --length={length}.")
    if _SHARED.value % 8 or _SHARED.value > length - answer:
        raise app.UsageError(
            f"--shared={_SHARED.value} must be a multiple of 8 and leave the answer's tokens out."
        )
    return _BATCH.value, length, answer


def token_ids(vocab_size: int) -> np.ndarray:
    """Return random ids [B, T + 1]: the last is predicted and never read."""
    batch, length, _ = work()
    ids = np.random.default_rng(0).integers(3, vocab_size, (batch, length + 1))
    if shared := _SHARED.value:
        ids[:, :shared] = ids[:1, :shared]
        ids[:, shared] = 3 + np.arange(batch)  # no two are alike there
    return ids


class Ours:
    """The library's Trainer on one device."""

    def __init__(self):
        import jax
        import jax.numpy as jnp

        from safepatch_jax.data.chat import Example, shared_prefix, training_batch
        from safepatch_jax.io.hf import load_params
        from safepatch_jax.mesh import Sharder, make_mesh
        from safepatch_jax.models.config import config_from_hf
        from safepatch_jax.models.decoder import Decoder
        from safepatch_jax.models.table import param_table
        from safepatch_jax.settings import ModelSettings
        from safepatch_jax.training.batch import put_batch
        from safepatch_jax.training.step import Trainer

        self.device = jax.devices()[0]
        if self.device.platform != _DEVICE.value:
            raise ValueError(
                f"JAX has no {_DEVICE.value} here, only {self.device.platform}. A GPU needs "
                "jax[cuda13]."
            )
        sharder = Sharder(make_mesh("data:1", [self.device]))
        remat = _REMAT.value or ("dots" if _SHAPE.value else ModelSettings().remat)
        if _SHAPE.value:
            config = config_from_hf(raw_config(_SHAPE.value, _LAYERS.value))
            table = param_table(config)
            params = jax.jit(table.init, out_shardings=table.shardings(sharder))(jax.random.key(0))
        else:
            config, params = load_params(_MODEL.value, sharder)
            table = param_table(config)
        decoder = Decoder(config, jnp.dtype(_DTYPE.value), sharder, remat=remat, attention="auto")
        trainer = Trainer(decoder, table, sharder, clip_norm=CLIP_NORM)
        self._step, self._state = trainer.stepper(), trainer._init(params)
        self._wait = jax.block_until_ready
        _, length, answer = work()
        prompt = length + 1 - answer
        sequences = token_ids(config.vocab_size).tolist()
        rows = [Example(tuple(ids[:prompt]), tuple(ids[prompt:])) for ids in sequences]
        shared = 0
        if trainer.compact and _SHARED.value:
            shared = shared_prefix([row.prompt_ids for row in rows])
        batch = training_batch(rows, length - shared, answer, prefix=shared)
        self._batch = put_batch(batch, sharder)
        self._scalars = [jnp.float32(x) for x in (1.0, LEARNING_RATE, 0.0, np.inf)]
        size = PRODUCT[_DEVICE.value]
        x = jnp.ones((size, size), jnp.dtype(_DTYPE.value))
        self._product = jax.jit(lambda x: x @ x).lower(x).compile()
        self._matrix, self.product_flops = x, 2 * size**3
        self.facts = {
            "flops": needed_flops(config, *work())
            - needed_flops(config, _BATCH.value - 1, shared, 0),
            "parameters": table.size,
            "shared": shared,
            "remat": remat,
            "kind": self.device.device_kind,
            "version": f"JAX {jax.__version__}",
        }

    def steps(self, count: int) -> list[float]:
        """Take steps; return the NLL of each."""
        losses = []
        for _ in range(count):
            self._state, metrics = self._step(self._state, {}, self._batch, *self._scalars)
            losses.append(metrics["nll"])
        self._wait(self._state)
        return [float(nll) for nll in losses]

    def products(self, count: int) -> None:
        for _ in range(count):
            out = self._product(self._matrix)
        out.block_until_ready()

    def peak_memory(self) -> int | None:
        """Return the most bytes held on an accelerator."""
        stats = self.device.memory_stats() if self.device.platform != "cpu" else None
        return stats["peak_bytes_in_use"] if stats else None


class Torch:
    """The same step as a user of transformers writes it, with torch's fused AdamW and its default
    attention (SDPA)."""

    def __init__(self):
        import torch
        import transformers

        torch.set_num_threads(_THREADS.value)
        self._torch = torch
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            _MODEL.value, dtype=torch.float32
        ).train()
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True
        )
        ids = torch.tensor(token_ids(self._model.config.vocab_size))
        _, _, self._answer = work()
        self._tokens, self._targets = ids[:, :-1], ids[:, -self._answer :].reshape(-1)
        size = PRODUCT[_DEVICE.value]
        self._matrix, self.product_flops = torch.ones(size, size), 2 * size**3
        self.facts = {
            "version": f"torch {torch.__version__}, transformers {transformers.__version__}"
        }

    def steps(self, count: int) -> list[float]:
        losses = []
        for _ in range(count):
            logits = self._model(
                input_ids=self._tokens, use_cache=False, logits_to_keep=self._answer
            ).logits
            loss = self._torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), self._targets
            )
            loss.backward()
            self._torch.nn.utils.clip_grad_norm_(self._model.parameters(), CLIP_NORM)
            self._optimizer.step()
            self._optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    def products(self, count: int) -> None:
        for _ in range(count):
            self._matrix @ self._matrix

    def peak_memory(self) -> None:
        return None


def resident_peak() -> int:
    """Return the most bytes of memory that this process held since `forget_peak`."""
    line = next(x for x in open("/proc/self/status") if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    """Let the peak begin anew, so that reading the weights is not in it."""
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # the peak then holds the loading too


def serve(kind) -> None:
    """Answer each request on standard input, ``steps N`` or ``products N``, with a line of JSON."""
    # JAX has as many threads as it sees cores.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: _THREADS.value])
    replies, sys.stdout = sys.stdout, sys.stderr
    side = kind()
    forget_peak()
    print(json.dumps(side.facts), file=replies, flush=True)
    for line in sys.stdin:
        what, count = line.split()
        begun, cpu = time.perf_counter(), time.process_time()
        result = getattr(side, what)(int(count))
        seconds = (time.perf_counter() - begun) / int(count)
        cpu = (time.process_time() - cpu) / int(count)
        memory = side.peak_memory() or resident_peak()
        print(
            json.dumps(
                {
                    "seconds": seconds,
                    "losses": result,
                    "flops_per_second": side.product_flops / seconds,
                    "cpu": cpu,
                    "total_cpu": time.process_time(),
                    "memory": memory,
                }
            ),
            file=replies,
            flush=True,
        )


class Worker:
    """A side in a process of its own."""

    def __init__(self, side: str):
        self._log = tempfile.TemporaryFile("w+")
        environment = {**os.environ, "OMP_NUM_THREADS": str(_THREADS.value), "HF_HUB_OFFLINE": "1"}
        for name in KEEPS:
            environment.pop(name, None)
        if side == "torch":
            environment |= KEEPS
        if _DEVICE.value == "cpu":
            environment["JAX_PLATFORMS"] = "cpu"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.train_step", *sys.argv[1:], f"--side={side}"],
            text=True,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )
        self.facts = self._read()

    def ask(self, what: str, count: int) -> dict:
        self._process.stdin.write(f"{what} {count}\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._log.seek(0)
            sys.exit(f"a side failed:\n{self._log.read()[-3000:]}")
        return json.loads(line)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._log.close()


def busy_seconds() -> float:
    """Return the CPU seconds that this machine's cores have worked since its start."""
    user, nice, system, _, _, *rest = map(int, open("/proc/stat").readline().split()[1:9])
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")


def report(facts: dict[str, dict], replies: dict[str, list[dict]], others: float) -> None:
    """Print the tables; `replies` holds each side's steps and products, the warm-up first. Exits
    with 1 if losses differ."""
    batch, length, answer = work()
    ours = facts["ours"]
    flops, tokens = ours["flops"], batch * length
    model = f"{_SHAPE.value} shape, random weights"
    if _MODEL.value:
        model = pathlib.Path(_MODEL.value).name
    versions = ", ".join(f["version"] for f in facts.values())
    print(
        f"{model}: {ours['parameters'] / 1e6:.0f} M parameters; {batch} sequences of {length} "
        f"tokens, {ours['shared']} computed once, {answer} answer; {_DTYPE.value}, remat "
        f"{ours['remat']}; median of {_REPEATS.value} (least - most)"
    )
    print(
        f"{versions}; {ours['kind']}, {_THREADS.value} CPU threads ({machine()}); other processes "
        f"took {others:.0%} of the machine\n"
    )
    product, seconds = {}, {}
    for side in facts:
        product[side] = [r["flops_per_second"] for r in replies[f"{side} products"][1:]]
        seconds[side] = [r["seconds"] for r in replies[side][1:]]
    peak = max(statistics.median(x) for x in product.values())
    of = "its measured peak"
    if _DEVICE.value == "gpu":
        if rated := rated_flops(ours["kind"], _DTYPE.value):
            peak, of = rated, "the chip's peak (MFU)"
    print(
        f"| | ms a step | tokens/s | share of {of} | CPU seconds a step | peak memory, GiB "
        "|\n|---|---|---|---|---|---|"
    )
    for side, values in seconds.items():
        middle = statistics.median(values)
        cpu = spread([r["cpu"] for r in replies[side][1:]], ".2f")
        memory = max(r["memory"] for r in replies[side]) / 2**30
        steps = spread([1e3 * x for x in values])
        print(
            f"| {side} | {steps} | {tokens / middle:.0f} | {flops / middle / peak:.1%} | {cpu} | "
            f"{memory:.2f} |"
        )
    floor = flops / peak
    work_at = f"{flops / 1e9:.0f} GFLOP at {peak / 1e9:.0f} GFLOP/s"
    print(f"| floor: {work_at} | {1e3 * floor:.0f} | {tokens / floor:.0f} | 100% | | |\n")
    for side, values in product.items():
        print(f"Product of matrices, {side}: {spread([x / 1e9 for x in values])} GFLOP/s")
    losses = {}
    for side in facts:
        losses[side] = list(itertools.chain.from_iterable(r["losses"] for r in replies[side]))
        print(f"NLL, {side}: {' '.join(f'{nll:.6f}' for nll in losses[side])}")
    if "torch" in facts:
        ratios = [theirs / our for our, theirs in zip(seconds["ours"], seconds["torch"])]
        print(f"torch's time / ours, turn by turn: {spread(ratios, '.2f')}")
        far = max(abs(a - b) for a, b in zip(losses["ours"], losses["torch"]))
        print(f"The losses differ by {far:.1e} at most.")
        if far > AGREE:
            sys.exit(f"That is more than {AGREE}: the sides do not do the same work.")


def main(argv) -> None:
    del argv
    if bool(_MODEL.value) == bool(_SHAPE.value):
        raise app.UsageError("give either --model=DIR or --shape.")
    if _SIDE.value:
        serve({"ours": Ours, "torch": Torch}[_SIDE.value])
        return
    if _LAYERS.value and not _SHAPE.value:
        raise app.UsageError("--layers goes with --shape.")
    sides = ["ours"] if _SHAPE.value or _DEVICE.value != "cpu" else ["ours", "torch"]
    if _DTYPE.value != "float32" and len(sides) > 1:
        raise app.UsageError("the two sides are compared in float32; bfloat16 goes with --shape.")
    workers = {side: Worker(side) for side in sides}
    count = TOGETHER[_DEVICE.value]
    replies: dict[str, list[dict]] = {}
    turn = {}  # seconds on the clock, of all cores, of the sides
    for repeat in range(_REPEATS.value + 1):  # the first compiles and warms up
        for side, worker in workers.items():
            replies.setdefault(f"{side} products", []).append(worker.ask("products", 3))
            replies.setdefault(side, []).append(worker.ask("steps", count))
        cpu = sum(replies[side][-1]["total_cpu"] for side in sides)
        turn[repeat] = np.array([time.perf_counter(), busy_seconds(), cpu])
    for worker in workers.values():
        worker.close()
    clock, busy, cpu = turn[_REPEATS.value] - turn[0]
    facts = {side: worker.facts for side, worker in workers.items()}
    report(facts, replies, max(busy - cpu, 0) / clock / os.cpu_count())


if __name__ == "__main__":
    app.run(main)
