"""What the models of a chain are measured on: each harm category, look-alikes, ordinary answers;
each model once on each.

A measurement is a stage of its own, kept under the hashes of model and records, so a chain that was
killed or that grows measures nothing twice.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from safepatch_jax.evaluation.generate import generate
from safepatch_jax.evaluation.judges.base import OUTCOMES
from safepatch_jax.evaluation.judges.phrases import judge
from safepatch_jax.evaluation.measures import answer_nll
from safepatch_jax.models.config import read_hf_config
from safepatch_jax.patch_file.log import folder_hash
from safepatch_jax.run.context import Context
from safepatch_jax.run.stages import FINISHED, Runner, Stage
from safepatch_jax.runtime import files, processes

ANSWERS = "answers.jsonl"
COMMON = ("lookalike", "ordinary")


@dataclasses.dataclass(frozen=True)
class Model:
    """A model to be measured: its hash, and what returns its folder, which is asked only where
    something is left to measure."""

    hash: str
    folder: Callable[[], pathlib.Path]


class Measures:
    """Measures models on the evaluation records of a chain.

    Args:
      context: of the chain's settings.
      harmful: contexts by the name of a link, of the chain's settings with the link's harmful data.
      workdir: where measurements are kept.
      tokenizer: the model folder whose tokenizer and architecture all models of the chain have.
      companions: a hash of its files beside the weights.
    """

    def __init__(
        self,
        context: Context,
        harmful: Mapping[str, Context],
        workdir: pathlib.Path,
        tokenizer: pathlib.Path,
        companions: str,
    ):
        self.names, self.context = tuple(harmful), context
        self._contexts, self._workdir, self._tokenizer, self._companions = (
            dict(harmful),
            workdir,
            tokenizer,
            companions,
        )
        self._digest = functools.cache(
            lambda folder: processes.on_first(lambda: folder_hash(folder))
        )

    def data_hash(self, part: str) -> str:
        """Return the hash of a part's records: of a link by its name, or 'lookalike' or
        'ordinary'."""
        context, role = self._of(part)
        return context.data_hashes[role]

    def records(self, name: str) -> int:
        """Return how many harmful records a link has."""
        return len(self._contexts[name].records["harmful"])

    def measure(self, model: Model, parts: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Return by part what a model does there, see `_measure`; what was measured before is not
        run again."""
        params = functools.cache(lambda: self.context.load(model.folder())[1])  # released on return
        runner = self._runner(model, parts, lambda part, out: self._measure(part, params(), out))
        for stage in runner.stages:
            if runner.status(stage) not in FINISHED:
                runner.need(stage)
        return {part: runner.result(self._stage(model, part)) for part in parts}

    def answers(self, model: Model, part: str) -> list[dict[str, Any]]:
        """Return the judged answers of a measurement that was made; as this process sees it."""
        folder = self._runner(model, (part,), lambda part, out: {}).folder(self._stage(model, part))
        return files.read_jsonl(folder / ANSWERS)

    def of_run(
        self, folder: pathlib.Path, name: str
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Return what `evaluate_model` returns, for a model folder and the records of a link's
        run."""
        model = Model(self._digest(folder), lambda: folder)
        found = self.measure(model, (name, *COMMON))
        harmful, lookalike, ordinary = found.values()
        counts = lambda part: {outcome: part[outcome] for outcome in (*OUTCOMES, "n")}
        measures = {
            "data": {
                role: part["data"] for role, part in zip(("harmful", *COMMON), found.values())
            },
            "harmful": counts(harmful),
            "lookalike": counts(lookalike),
            "harmful_nll": harmful["nll"],
            "ordinary_nll": ordinary["nll"],
            "ordinary_perplexity": perplexity(ordinary["nll"]),
        }
        return measures, processes.on_first(
            lambda: self.answers(model, name) + self.answers(model, "lookalike")
        )

    def _of(self, part: str) -> tuple[Context, str]:
        """Return the context and the role in which the records of a part are."""
        return (self.context, part) if part in COMMON else (self._contexts[part], "harmful")

    def _stage(self, model: Model, part: str) -> str:
        return f"{model.hash[:16]}.{self._of(part)[1]}-{self.data_hash(part)[:16]}"

    def _runner(
        self,
        model: Model,
        parts: Sequence[str],
        run: Callable[[str, pathlib.Path], Mapping[str, Any]],
    ) -> Runner:
        s = self.context.settings
        told = (
            dataclasses.asdict(s.evaluate)
            | {"compute_dtype": s.model.compute_dtype}
            | {
                k: getattr(s.data, k)
                for k in ("max_prompt_tokens", "max_answer_tokens", "eval_limit")
            }
        )
        sources = lambda part: {
            "model": model.hash,
            "companions": self._companions,
            "data": self.data_hash(part),
        }
        return Runner(
            [
                Stage(
                    self._stage(model, part), (), told, sources(part), functools.partial(run, part)
                )
                for part in parts
            ],
            self._workdir,
            self.context.cache_dir,
        )

    def _measure(self, part: str, params: Any, out: pathlib.Path) -> dict[str, Any]:
        """Measure a model on one set of records.

        Returns:
          data: the numbers of examples, of prompts left out and of answers cut; for harmful
            requests and look-alikes the number
          of each outcome and ``n``; for harmful and ordinary answers ``nll``, in nats a token.
        """
        (context, role), folder, evaluate = (
            self._of(part),
            self._tokenizer,
            self.context.settings.evaluate,
        )
        encoded = context.encoded(folder, role, evaluate.split)
        examples, rows = encoded.examples, min(evaluate.batch_size, len(encoded.examples))
        result: dict[str, Any] = {
            "data": {"examples": len(examples), "left_out": encoded.dropped, "cut": encoded.cut}
        }
        decoder = self.context.decoder(read_hf_config(folder))
        if role != "ordinary":
            chat = self.context.chat(folder)
            texts = [
                chat.decode(ids)
                for ids in generate(
                    decoder,
                    params,
                    [e.prompt_ids for e in examples],
                    self.context.stop_ids(folder),
                    max_new=evaluate.max_new_tokens,
                    batch_size=rows,
                    sharder=decoder.sharder,
                    title=f"{part}: answers",
                )
            ]
            answers = [
                {
                    "role": role,
                    "number": i,
                    "prompt": example.prompt,
                    "outcome": judge(text),
                    "answer": text,
                }
                for i, (example, text) in enumerate(zip(examples, texts))
            ]
            processes.on_first(
                lambda: files.write_text(
                    out / ANSWERS,
                    "".join(json.dumps(a, ensure_ascii=False) + "\n" for a in answers),
                )
            )
            outcomes = [answer["outcome"] for answer in answers]
            result |= {outcome: outcomes.count(outcome) for outcome in OUTCOMES} | {
                "n": len(outcomes)
            }
        if role != "lookalike":
            result["nll"] = answer_nll(
                decoder, params, examples, rows, decoder.sharder, f"{part}: NLL"
            )
        return result


def perplexity(nll: float) -> float:
    """Return exp(nll), bounded so that a broken model's is still a number."""
    return math.exp(min(nll, 80.0))
