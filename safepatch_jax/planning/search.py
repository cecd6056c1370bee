"""Searches for settings: the nearest that fit, and the mesh with the shortest train step."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from safepatch_jax.mesh import Sharder
from safepatch_jax.models.config import DecoderConfig
from safepatch_jax.models.table import param_table
from safepatch_jax.planning import PROGRAMS
from safepatch_jax.planning.chips import Target
from safepatch_jax.planning.compile import Figures, measure_all, whole_floor
from safepatch_jax.planning.flops import count_flops
from safepatch_jax.planning.programs import checked_kinds, in_blocks, lengths, programs
from safepatch_jax.planning.screen import screen_train
from safepatch_jax.runtime.console import say
from safepatch_jax.settings import Settings
from safepatch_jax.training.batch import cuts_evenly

REMAT = ("none", "dots", "full")
LAYERWISE = {"derive.train": "scope", "derive.backward": "layerwise"}
Changes = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Fit:
    """Settings that fit: the changes, and the figures of every program with them."""

    changes: Changes
    figures: tuple[Figures, ...]


def as_flags(changes: Mapping[str, Any]) -> str:
    """Return changed settings as flags of a launcher."""
    flags = [f"--{name}={value}" for name, value in changes.items()]
    return " ".join(flags).replace("--mesh.shape=", "--mesh=")


def _relevant(settings: Settings, kind: str) -> Settings:
    """Return settings in which all that a kind of program does not depend on is at its default."""
    groups = {
        "train": ("model", "data", "derive", "align"),
        "score": ("model", "data", "score", "patch"),
        "patch": ("patch", "export"),
        "decode": ("data", "evaluate"),
    }[kind]
    values = {name: getattr(settings, name) for name in ("mesh", "run", *groups)}
    single = {
        "train": ("patch.scope",),
        "score": ("derive.loss",),
        "decode": ("model.compute_dtype",),
    }.get(kind, ())
    relevant = dataclasses.replace(Settings(), **values)
    return relevant.override({name: settings.flat()[name] for name in single})


def meshes(settings: Settings, config: DecoderConfig, target: Target) -> dict[str, Sharder]:
    """Return every mesh of a target that divides the architecture's dimensions and the settings'
    micro-batches, {text: sharder}, smallest tensor axis first.

    The data axis has as many parts as there are slices.
    """
    chips, sharders = len(target.devices) // target.slices, {}
    for tensor in range(1, chips + 1):
        if chips % tensor:
            continue
        text = f"data:{target.slices},fsdp:{chips // tensor},tensor:{tensor}"
        try:
            sharder = target.sharder(text)
            param_table(config).shardings(sharder)
        except (ValueError, NotImplementedError):
            continue  # a dimension does not divide, or the machine cannot be ordered so
        if _cut_evenly(settings, settings.derive.accumulate, sharder.batch_ways):
            sharders[text] = sharder
    return sharders


def _cut_evenly(settings: Settings, accumulate: int, ways: int) -> bool:
    """Return whether the batches of all steps can be cut into so many micro-batches."""
    return all(cuts_evenly(rows, accumulate, ways) for rows in settings.step_rows.values())


def ladder(kind: str, settings: Settings, ways: int, blocks: bool = True) -> Iterator[Changes]:
    """Yield changes with which a kind of program needs less memory, the mildest first; each
    includes the one before.

    Args:
      kind: one of PROGRAMS.
      settings: to start from.
      ways: parts of the batch axis.
      blocks: whether the patch scope lies within the blocks.
    """
    if kind == "train":
        yield from _train_ladder(settings, ways, blocks)
    if kind == "score":
        yield from _score_ladder(settings, blocks)
    if kind == "decode":
        rows = settings.evaluate.batch_size
        while rows % 2 == 0 and (rows // 2) % ways == 0:
            rows //= 2
            yield {"evaluate.batch_size": rows}


def _train_ladder(settings: Settings, ways: int, blocks: bool) -> Iterator[Changes]:
    """Yield first what costs time alone, then the layerwise backward pass, which leaves what is
    outside the patch scope as it is, then another optimiser."""
    changes: Changes = {}
    parts: Changes = {}
    optimizer = settings.derive.optimizer
    if settings.derive.backward == "whole":
        for changes in _remats(settings):
            yield changes
        for parts in _micro_batches(settings, ways):
            yield changes | parts
        if not blocks:
            if optimizer != "adafactor":
                yield changes | parts | {"derive.optimizer": "adafactor"}
                # Without the sum of gradients, which is one more copy of the parameters.
                yield changes | {"derive.optimizer": "adafactor"}
            return
        if not settings.align.enabled:  # whose step is the whole tree's
            changes = {}
        changes = changes | LAYERWISE
        yield changes
    for name in dict.fromkeys((optimizer, "adafactor")):
        if name != optimizer:
            changes = changes | {"derive.optimizer": name}
            yield changes
        for parts in _micro_batches(settings, ways):
            yield changes | parts


def _remats(settings: Settings) -> Iterator[Changes]:
    for remat in REMAT[REMAT.index(settings.model.remat) + 1 :]:
        yield {"model.remat": remat}


def _remats_of_interest(settings: Settings) -> tuple[str, ...]:
    """Return the settings of model.remat that a suggestion tries: of a layerwise backward pass, for
    which it counts for nothing, the one that is set."""
    return (settings.model.remat,) if settings.derive.backward == "layerwise" else REMAT


def _micro_batches(settings: Settings, ways: int) -> Iterator[Changes]:
    accumulate = 2 * settings.derive.accumulate
    while _cut_evenly(settings, accumulate, ways):
        yield {"derive.accumulate": accumulate}
        accumulate *= 2


def _score_ladder(settings: Settings, blocks: bool) -> Iterator[Changes]:
    score, changes = settings.score, {}
    if not blocks or score.mode == "batched":
        yield from _remats(settings)
    else:
        if score.in_flight > 1:
            changes = {"score.in_flight": 1}
            yield changes
        if score.inputs != "some":
            yield changes | {"score.inputs": "some"}


def step(parts: Sequence[Figures]) -> Figures:
    """Return the figures of a whole step: memory of what needs most, the times of all."""
    most = max(parts, key=lambda f: f.required)
    return dataclasses.replace(most, floor=whole_floor(parts), flops=sum(f.flops for f in parts))


class Planner:
    """Compiles the programs of settings for a target, each combination once.

    Args:
      config: the architecture.
      target: devices.
      kinds: which programs count.
    """

    def __init__(self, config: DecoderConfig, target: Target, kinds: Sequence[str] = PROGRAMS):
        self._config, self._target, self._kinds = config, target, checked_kinds(kinds)
        self._sharder, self._once = functools.cache(target.sharder), functools.cache(self._measure)

    def measure(self, settings: Settings, kind: str) -> tuple[Figures, ...]:
        """Return the figures of a kind of program, which is compiled again only when a setting that
        it depends on has changed."""
        return self._once(_relevant(settings, kind), kind)

    def _measure(self, settings: Settings, kind: str) -> tuple[Figures, ...]:
        sharder = self._sharder(settings.mesh.shape)
        kinds = programs(settings, self._config, sharder, [kind])
        return tuple(measure_all(kinds, self._target, sharder, f"compile {kind}"))

    def all(self, settings: Settings) -> tuple[Figures, ...]:
        """Return the figures of all programs of these settings."""
        return tuple(itertools.chain.from_iterable(self.measure(settings, k) for k in self._kinds))

    def remedy(self, settings: Settings) -> Fit | None:
        """Return the nearest settings with which every program fits, or None.

        First come settings that cost only time (remat, micro-batches), then the layerwise backward
        pass, then another optimiser, then another mesh.
        """
        shape = self._sharder(settings.mesh.shape).mesh.shape
        distances = {}
        for text, sharder in meshes(settings, self._config, self._target).items():
            if sharder.mesh.shape != shape:
                ratio = sharder.mesh.shape["tensor"] / shape["tensor"]
                distances[text] = abs(math.log2(ratio))
        nearest = sorted(distances, key=distances.get)
        for changes in ({}, *({"mesh.shape": text} for text in nearest)):
            if fit := self._fit(settings, changes):
                return fit
        return None

    def fit(self, settings: Settings) -> Fit | None:
        """Return what `remedy` does on the mesh of the settings; they may fit as they are."""
        return self._fit(settings, {})

    def _fit(self, settings: Settings, changes: Changes) -> Fit | None:
        """Return these changes, with others that every kind of program needs to fit, or None."""
        extended: Changes | None = changes
        for kind in self._kinds:
            extended = self._extended(settings, kind, extended)
            if extended is None:
                return None
        figures = self.all(settings.override(extended))
        return Fit(extended, figures) if all(f.fits for f in figures) else None

    def _extended(self, settings: Settings, kind: str, changes: Changes) -> Changes | None:
        """Return these changes with the first of the ladder added with which a kind of program
        fits, or None."""
        base, memory = settings.override(changes), self._target.memory or math.inf
        ways = self._sharder(base.mesh.shape).batch_ways
        for more in [{}, *ladder(kind, base, ways, in_blocks(base, self._config))]:
            changed = base.override(more)
            if kind == "train" and self.least(changed) > memory:
                continue
            if more or "mesh.shape" in changes:
                say(f"Trying {kind} with {as_flags(changes | more)}")
            if all(f.fits for f in self.measure(changed, kind)):
                return changes | more
        return None

    def least(self, settings: Settings) -> int:
        """Return the bytes on each device that a train step of these settings needs at least."""
        sharder = self._sharder(settings.mesh.shape)
        return screen_train(settings, self._config, sharder, lengths(settings)).least

    def suggest(
        self, settings: Settings, most: int = 5
    ) -> tuple[list[tuple[Changes, Figures]], Fit | None]:
        """Search mesh and remat for the shortest train step that fits.

        All combinations are screened by arithmetic, the best few are compiled.

        Returns:
          a list of (changes, figures of the train step) of the compiled ones, shortest least time
            first;
          the best with which every program fits, or None.
        """
        sharders = meshes(settings, self._config, self._target)
        screened = self._screened(settings, sharders)[:most]
        say(
            f"{len(sharders)} meshes with {len(_remats_of_interest(settings))} setting(s) of "
            f"model.remat; compiling the train step of the best {len(screened)} by arithmetic"
        )
        compiled = []
        for changes in screened:
            figures = step(self.measure(settings.override(changes), "train"))
            compiled.append((changes, figures))
        compiled.sort(key=lambda row: (not row[1].fits, row[1].least_seconds, row[1].peak))
        for changes, figures in compiled:
            every = self.all(settings.override(changes)) if figures.fits else (figures,)
            if all(f.fits for f in every):
                return compiled, Fit(changes, every)
        return compiled, None

    def _screened(self, settings: Settings, sharders: Mapping[str, Sharder]) -> list[Changes]:
        """Return the combinations of mesh and remat that may fit, the most promising first."""
        memory, rows = self._target.memory or math.inf, []
        for remat in _remats_of_interest(settings):
            flops = None
            for text, sharder in sharders.items():
                changes = {"mesh.shape": text, "model.remat": remat}
                changed = settings.override(changes)
                if flops is None:  # the same on every mesh
                    flops = 0
                    for part in programs(changed, self._config, sharder, ["train"]):
                        flops += part.runs * count_flops(part.trace().jaxpr)
                s = screen_train(
                    changed, self._config, sharder, lengths(changed), self._target.chip, flops
                )
                if s.least <= memory:
                    rows.append((s.memory > memory, s.seconds, s.memory, changes))
        rows.sort(key=lambda row: row[:3])
        return [changes for *_, changes in rows]
