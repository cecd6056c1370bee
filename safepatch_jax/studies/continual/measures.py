"""What the models of a chain are measured on: each harm category, look-alikes, ordinary answers;
each model once on each.

A measurement is a stage of its own, kept under the hashes of model and records, so a chain that was
killed or that grows measures nothing twice.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from safepatch_jax.data.chat import Encoded
from safepatch_jax.evaluation.engine import Engine
from safepatch_jax.evaluation.likelihoods import answer_likelihoods
from safepatch_jax.evaluation.measures import ANSWERS, combine_roles, measure_role
from safepatch_jax.patch_file.log import folder_hash
from safepatch_jax.run.context import Context
from safepatch_jax.run.stages import FINISHED, Runner, Stage
from safepatch_jax.run.table import evaluate_settings
from safepatch_jax.runtime import files, processes

COMMON = ("lookalike", "ordinary")
EACH = "ordinary, each"  # a part, no name of a link: the likelihood of each ordinary answer


@dataclasses.dataclass(frozen=True)
class Model:
    """A model to be measured: its hash, and what returns its folder, which is called only where
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
        self._contexts, self._workdir = dict(harmful), workdir
        self._tokenizer, self._companions = tokenizer, companions
        self._hashes: dict[pathlib.Path, str] = {}

    def data_hash(self, part: str) -> str:
        """Return the hash of a part's records: of a link by its name, 'lookalike', 'ordinary' or
        EACH."""
        context, role = self._records_of(part)
        return context.data_hashes[role]

    def records(self, name: str) -> int:
        """Return how many harmful records a link has."""
        return len(self._contexts[name].records["harmful"])

    def measure(self, model: Model, parts: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Return by part what a model does there, see `evaluation.measures.measure_role`; what was
        measured before is not run again."""
        engines: list[Engine] = []  # the model is loaded once, and released on return

        def run(part: str, out: pathlib.Path) -> dict[str, Any]:
            if not engines:
                params = self.context.load(model.folder())[1]
                engines.append(self.context.engine(self._tokenizer, params))
            return self._measure(part, engines[0], out)

        runner = self._runner(model, parts, run)
        for stage in runner.stages:
            if runner.status(stage) not in FINISHED:
                runner.need(stage)
        return {part: runner.result(self._stage(model, part)) for part in parts}

    def found(self, model: Model, parts: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Return by part what `measure` has found before; parts that were not measured are left
        out."""
        runner, results = self._runner(model, parts, lambda part, out: {}), {}
        for part in parts:
            stage = self._stage(model, part)
            if runner.status(stage) in FINISHED:
                results[part] = runner.result(stage)
        return results

    def answers(self, model: Model, part: str) -> list[dict[str, Any]]:
        """Return the judged answers of a measurement that was made, or the likelihoods of EACH; as
        this process sees it."""
        runner = self._runner(model, (part,), lambda part, out: {})
        return files.read_jsonl(runner.outputs(self._stage(model, part)) / ANSWERS)

    def of_run(
        self, folder: pathlib.Path, name: str
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Return (measures, answers) as a run has them, for a model folder and a link's records."""
        if folder not in self._hashes:
            self._hashes[folder] = processes.on_first(folder_hash, folder)
        model = Model(self._hashes[folder], lambda: folder)
        parts = self.measure(model, (name, *COMMON))
        parts["harmful"] = parts.pop(name)
        roles = {role: parts[role] for role in ("harmful", *COMMON)}
        return combine_roles(roles), processes.on_first(self._both_answers, model, name)

    def _both_answers(self, model: Model, name: str) -> list[dict[str, Any]]:
        return self.answers(model, name) + self.answers(model, "lookalike")

    def _records_of(self, part: str) -> tuple[Context, str]:
        """Return the context and the data role in which the records of a part are."""
        if part == EACH:
            return self.context, "ordinary"
        if part in COMMON:
            return self.context, part
        return self._contexts[part], "harmful"

    def _stage(self, model: Model, part: str) -> str:
        role = "each" if part == EACH else self._records_of(part)[1]
        return f"{model.hash[:16]}.{role}-{self.data_hash(part)[:16]}"

    def _runner(
        self,
        model: Model,
        parts: Sequence[str],
        run: Callable[[str, pathlib.Path], Mapping[str, Any]],
    ) -> Runner:
        settings = evaluate_settings(self.context.settings) | self.context.prompt_format.key()
        stages = []
        for part in parts:
            sources = {
                "model": model.hash,
                "companions": self._companions,
                "data": self.data_hash(part),
            }
            name = self._stage(model, part)
            stages.append(Stage(name, functools.partial(run, part), (), settings, sources))
        return Runner(stages, self._workdir, self.context.cache_dir)

    def _measure(self, part: str, engine: Engine, out: pathlib.Path) -> dict[str, Any]:
        context, role = self._records_of(part)
        settings = self.context.settings.evaluate
        encoded = context.encoded(self._tokenizer, role, settings.split)
        if part == EACH:
            return self._likelihoods(engine, encoded, out)
        result, answers = measure_role(engine, role, encoded, settings.max_new_tokens, part)
        if answers:
            processes.on_first(files.write_jsonl, out / ANSWERS, answers)
        return result

    def _likelihoods(self, engine: Engine, encoded: Encoded, out: pathlib.Path) -> dict[str, Any]:
        rows: dict[int, dict[str, Any]] = {}

        def keep(i: int, row: Mapping[str, Any]) -> None:
            rows[i] = {"prompt": encoded.examples[i].prompt, **row}

        answer_likelihoods(engine, encoded.examples, None, EACH, keep)
        processes.on_first(files.write_jsonl, out / ANSWERS, [rows[i] for i in sorted(rows)])
        return {"answers": len(rows)}
