"""Margins of a run's models on its own records: what answers would show, by forward passes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from safepatch_jax.data.records import DATA_ROLES
from safepatch_jax.evaluation.engine import Engine
from safepatch_jax.evaluation.judges.base import COMPLIED, INCOHERENT, REFUSED
from safepatch_jax.evaluation.likelihoods import answer_likelihoods
from safepatch_jax.evaluation.margins import auroc, margins, margins_of, refused, summary
from safepatch_jax.evaluation.measures import ANSWERED, perplexity
from safepatch_jax.evaluation.openings import Openings, find_openings, some_of
from safepatch_jax.models.table import nest, unnest
from safepatch_jax.run.models import Flat
from safepatch_jax.run.state import Run

FORCED = 8  # answer tokens that are given before the content
Rows = dict[str, list[dict[str, float]]]


class MarginMeter:
    """Measures a run's models by margins, all with the openings of the backbone.

    Args:
      run: its settings and records; up to evaluate.margin_limit of each role and the split count.
      openings: None to find the backbone's.
    """

    def __init__(self, run: Run, openings: Openings | None = None):
        self._run, limit = run, run.settings.evaluate.margin_limit
        self._encoded = {}
        for role in DATA_ROLES:
            self._encoded[role] = run.context.encoded(
                run.imported, role, run.settings.evaluate.split, limit=limit
            )
        self.openings = openings or self._find()

    def backbone(self) -> Engine:
        """Return the backbone, ready to answer."""
        return self.engine(unnest(self._run.context.load(self._run.backbone)[1]))

    def engine(self, flat: Flat) -> Engine:
        """Return a model of the run, ready to answer."""
        return self._run.context.engine(self._run.imported, nest(flat))

    def _find(self) -> Openings:
        prompts = []
        for role in ANSWERED:
            prompts += [example.opening_ids for example in some_of(self._encoded[role].examples)]
        return find_openings(self.backbone(), prompts, "openings")

    def rows(self, engine: Engine, title: str) -> Rows:
        """Return what a model's measures follow from, by role a row for each example.

        Returns:
          of harmful and look-alike prompts 'refusal' and 'affirmative' (see `margins`); of harmful
          and ordinary answers 'nll' and 'tokens', of harmful ones after their opening, and
          'opening_nll' and 'opening_tokens' (see `answer_likelihoods`).
        """
        result = {}
        for role in ANSWERED:
            prompts = [example.opening_ids for example in self._encoded[role].examples]
            rows: dict[int, dict[str, float]] = {}
            margins(engine, prompts, self.openings, f"{title}: {role}", rows.__setitem__)
            result[role] = [rows[i] for i in range(len(prompts))]
        for row, content in zip(result["harmful"], self._nlls(engine, "harmful", title, FORCED)):
            row.update(content)
        return result | {"ordinary": self._nlls(engine, "ordinary", title, 0)}

    def _nlls(self, engine: Engine, role: str, title: str, forced: int) -> list[dict[str, float]]:
        examples, rows = self._encoded[role].examples, {}
        answer_likelihoods(engine, examples, None, f"{title}: {role} NLL", rows.__setitem__, forced)
        for i, example in enumerate(examples):
            rows[i]["opening_tokens"] = len(example.answer_ids) - rows[i]["tokens"]
        return [rows[i] for i in range(len(examples))]

    def measures(self, engine: Engine, title: str) -> dict[str, Any]:
        """Return a model's measures, see `expected_measures`, and the numbers of records."""
        data = {}
        for role, encoded in self._encoded.items():
            counts = {"examples": len(encoded.examples), "left_out": encoded.dropped}
            data[role] = counts | {"cut": encoded.cut}
        return {"data": data} | expected_measures(self.rows(engine, title))


def expected_measures(rows: Rows) -> dict[str, Any]:
    """Return the measures that follow from the rows of `MarginMeter.rows`: those of
    `evaluation.measures.combine_roles`, with EXPECTED numbers of refusals and compliances where the
    opening is drawn.

    Returns:
      also 'margins': AUROC between harmful and look-alike prompts with its interval, content NLL
      (nats a token, None where no answer has content), and the summary by role.
    """
    result: dict[str, Any] = {}
    by_role, values = {}, {}
    for role in ANSWERED:
        values[role] = margins_of(rows[role])
        share, n = float(refused(values[role]).mean()), len(rows[role])
        counts = {COMPLIED: n * (1 - share), REFUSED: n * share, INCOHERENT: 0.0}
        result[role] = counts | {"n": n}
        by_role[role] = summary(rows[role])
    harmful, ordinary = _totals(rows["harmful"]), _totals(rows["ordinary"])
    content_nll = None
    if harmful["tokens"]:
        content_nll = harmful["nll"] / harmful["tokens"]
    tokens = harmful["tokens"] + harmful["opening_tokens"]
    nll = ordinary["nll"] / ordinary["tokens"]
    return result | {
        "harmful_nll": (harmful["nll"] + harmful["opening_nll"]) / tokens,
        "ordinary_nll": nll,
        "ordinary_perplexity": perplexity(nll),
        "margins": by_role
        | {
            "auroc": auroc(values["harmful"], values["lookalike"]),
            "content_nll": content_nll,
        },
    }


def _totals(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the sums over rows."""
    totals = {}
    for name in ("nll", "tokens", "opening_nll", "opening_tokens"):
        totals[name] = math.fsum(row.get(name, 0.0) for row in rows)
    return totals
