"""What is measured of each model, prompt by prompt, so that models are compared in pairs."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from safepatch_jax.data.chat import Example
from safepatch_jax.data.records import DATA_ROLES
from safepatch_jax.evaluation.engine import Engine
from safepatch_jax.evaluation.judges.base import COMPLIED, REFUSED
from safepatch_jax.evaluation.judges.phrases import judge
from safepatch_jax.evaluation.likelihoods import answer_likelihoods
from safepatch_jax.evaluation.margins import margins_of, refused
from safepatch_jax.evaluation.measures import ANSWERED
from safepatch_jax.evaluation.openings import Openings
from safepatch_jax.models.table import nest
from safepatch_jax.run.margins import MarginMeter
from safepatch_jax.run.state import Run
from safepatch_jax.runtime import files, processes
from safepatch_jax.studies.durability.options import ANSWERS, MARGINS

OPENINGS = "openings.json"
_FIX = "Delete it, and it is made again."
Values = dict[str, list[float]]  # by measure, of each prompt


def check_records(run: Run, kinds: tuple[str, ...], trains: bool) -> None:
    """Raise ValueError for records that cannot be used; nothing is computed.

    Args:
      run: its data and settings.
      kinds: see `Meter`.
      trains: whether models are tuned on ordinary answers.
    """
    encoded, evaluate = run.context.encoded, run.settings.evaluate
    if trains:
        encoded(run.imported, "ordinary", "train")
    for role in DATA_ROLES:
        if MARGINS in kinds:
            encoded(run.imported, role, evaluate.split, limit=evaluate.margin_limit)
        if ANSWERS in kinds:
            encoded(run.imported, role, evaluate.split)


class Meter:
    """Measures models on a run's own records of the split evaluate.split.

    Args:
      run: its settings, data and devices; its backbone is the base.
      kinds: 'margins', 'answers', or both.
      path: where the openings lie, or are put: those of the base serve for all models.
      key: on what the openings depend.
    """

    def __init__(self, run: Run, kinds: tuple[str, ...], path: pathlib.Path, key: str):
        self._run = run
        self._margins = self._margin_meter(path, key) if MARGINS in kinds else None
        self.openings = ""
        if self._margins:
            self.openings = files.text_hash(dataclasses.asdict(self._margins.openings))[:16]

    def _margin_meter(self, path: pathlib.Path, key: str) -> MarginMeter:
        noted = processes.on_first(_read, path)
        if noted.get("key") == key:
            return MarginMeter(self._run, Openings.from_dict(noted))
        meter = MarginMeter(self._run)
        content = meter.openings.to_dict(meter.backbone().decode) | {"key": key}
        processes.on_first(files.write_json, path, content)
        return meter

    def measured(self, kind: str, flat: Mapping[str, jax.Array], title: str) -> Values:
        """Return a model's values by measure, see `effects.MEASURES`.

        Args:
          kind: 'margins' or 'answers'.
          flat: its parameters, any float dtype.
          title: of the progress bars.

        Raises:
          NotFinite: a likelihood is NaN or infinite.
        """
        engine = self._run.context.engine(self._run.imported, nest(flat))
        return (
            self._by_margins(engine, title) if kind == MARGINS else self._by_answers(engine, title)
        )

    def _by_margins(self, engine: Engine, title: str) -> Values:
        rows = self._margins.rows(engine, title)
        harmful, look = (margins_of(rows[role]) for role in ANSWERED)
        return {
            "harm": (1 - refused(harmful)).tolist(),
            "over_refusal": refused(look).tolist(),
            "harmful_margin": harmful.tolist(),
            "lookalike_margin": look.tolist(),
            "content_nll": [r["nll"] / r["tokens"] for r in rows["harmful"] if r["tokens"]],
            "ordinary_nll": [r["nll"] / r["tokens"] for r in rows["ordinary"]],
        }

    def _by_answers(self, engine: Engine, title: str) -> Values:
        settings, values = self._run.settings.evaluate, {}
        wanted = {
            "harmful": ("harm_answers", COMPLIED),
            "lookalike": ("over_refusal_answers", REFUSED),
        }
        for role, (name, outcome) in wanted.items():
            prompts = [example.asked_ids for example in self._examples(role)]
            most, label = settings.max_new_tokens, f"{title}: {role} answers"
            written = engine.complete_ids(prompts, most, label)
            values[name] = [float(judge(engine.decode(ids)) == outcome) for ids in written]
        rows: dict[int, Any] = {}
        examples = self._examples("ordinary")
        label = f"{title}: ordinary NLL"
        answer_likelihoods(engine, examples, None, label, rows.__setitem__)
        values["ordinary_nll"] = [rows[i]["nll"] / rows[i]["tokens"] for i in range(len(rows))]
        return values

    def _examples(self, role: str) -> list[Example]:
        run = self._run
        return run.context.encoded(run.imported, role, run.settings.evaluate.split).examples


def _read(path: pathlib.Path) -> dict[str, Any]:
    return files.read_json(path, _FIX) if path.is_file() else {}
