"""How far a run is, and about how long it still takes: from what stages took before, else from the
share of the work that is done."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Mapping, Sequence

from safepatch_jax.data.records import Record
from safepatch_jax.run import manifests
from safepatch_jax.runtime.console import duration
from safepatch_jax.settings import Settings

_BACKWARD = 3  # passes of a training step, of which one is forwards
_CHARACTERS = 4  # of a token, about
_TEMPLATE = 30  # tokens of a chat template, about


class Pace:
    """The stages that a run will run, in order, and what is known of their time.

    Args:
      names: of the stages.
      recorded: seconds of stages in earlier runs, by name.
      work: tokens times passes of stages, by name; of the others next to nothing is expected.
    """

    def __init__(
        self, names: Sequence[str], recorded: Mapping[str, float], work: Mapping[str, float]
    ):
        self._left, self._count = list(names), len(names)
        self._recorded, self._work = dict(recorded), dict(work)
        self._seconds: dict[str, float] = {}

    def before(self, name: str) -> str:
        """Say which stage this is, and how long the run still takes where that is known."""
        if name not in self._left:
            return ""
        text = f", stage {self._count - len(self._left) + 1} of {self._count}"
        seconds = self.seconds_left()
        return f"{text}, {duration(seconds)} left" if seconds else text

    def done(self, name: str, seconds: float) -> None:
        """Note what a stage took."""
        if name in self._left:
            self._left.remove(name)
            self._seconds[name] = seconds

    def seconds_left(self) -> float | None:
        """Return about how long the stages that are left take; None without a basis."""
        total, rate = 0.0, self._rate()
        for name in self._left:
            if name in self._recorded:
                total += self._recorded[name]
            elif self._work.get(name):
                if rate is None:
                    return None
                total += rate * self._work[name]
        return total

    def _rate(self) -> float | None:
        """Return the seconds of a unit of work, over the stages done in this run."""
        done = [name for name in self._seconds if self._work.get(name)]
        if not done:
            return None
        return sum(self._seconds[name] for name in done) / sum(self._work[name] for name in done)


def recorded(names: Iterable[str], folders: Iterable[pathlib.Path], model: str) -> dict[str, float]:
    """Return the seconds that stages took in earlier runs of a model, by name; the newest where
    there are several.

    Args:
      model: its key in the manifests of stages; a stage of another takes another time.
      folders: that hold folders of stages: of the workdir, of the cache.
    """
    newest: dict[str, tuple[str, float]] = {}
    names = set(names)
    for parent in folders:
        for path in parent.glob(f"*/{manifests.MANIFEST}"):
            _, manifest = manifests.read(path.parent)
            name, seconds = manifest.get("stage"), manifest.get("seconds")
            other = manifest.get("model") != model
            if other or name not in names or not isinstance(seconds, int | float):
                continue
            look = str(manifest.get("finished", "")), float(seconds)
            newest[name] = max(look, newest.get(name, look))
    return {name: seconds for name, (_, seconds) in newest.items()}


def work(settings: Settings, records: Mapping[str, Sequence[Record]]) -> dict[str, float]:
    """Return about how many tokens go through the model, times passes, by stage.

    Args:
      records: by data role.
    """
    s = settings
    harmful = records["harmful"]
    length = _TEMPLATE + sum(map(_tokens, harmful)) / max(1, len(harmful))
    trained = _BACKWARD * length
    result = {
        "derive_se": trained * s.derive.se_steps * s.derive.batch_size,
        "derive_osm": trained * s.derive.osm_steps * s.derive.batch_size,
    }
    if s.align.enabled:
        result["align"] = trained * s.align.steps * s.align.batch_size
    for role in ("se", "osm"):
        result[f"score_{role}"] = trained * s.score.samples
    read = 0.0
    for role, of_role in records.items():
        held = [r for r in of_role if r.split == s.evaluate.split]
        count = min(len(held), s.data.eval_limit or len(held))
        written = 0
        if role != "ordinary":
            written = s.evaluate.max_new_tokens + s.evaluate.think_tokens
        read += count * (length + written)
    for variant in ("shipped", "backbone", "se", "osm", "intersection", "safepatching"):
        result[f"evaluate_{variant}"] = read
    return result


def _tokens(record: Record) -> float:
    return (len(record.prompt) + len(record.answer)) / _CHARACTERS
