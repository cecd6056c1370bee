"""Looks for settings: the nearest that fit where the given ones do not, and the mesh with the
shortest step."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from safepatch_jax.mesh import Sharder
from safepatch_jax.models.config import DecoderConfig
from safepatch_jax.models.table import param_table
from safepatch_jax.planning.chips import Target
from safepatch_jax.planning.compile import Figures, measure_all
from safepatch_jax.planning.flops import count_flops
from safepatch_jax.planning.programs import PROGRAMS, checked_kinds, lengths, programs
from safepatch_jax.planning.screen import screen_train
from safepatch_jax.runtime.console import say
from safepatch_jax.settings import Settings

REMAT = ("none", "dots", "full")
Changes = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Found:
    """Settings that fit: what to change, and the figures of every program with them."""

    changes: Changes
    figures: tuple[Figures, ...]


def as_flags(changes: Mapping[str, Any]) -> str:
    """Return changed settings as a launcher takes them."""
    return " ".join(
        f"--{'mesh' if name == 'mesh.shape' else name}={value}" for name, value in changes.items()
    )


def _own(settings: Settings, kind: str) -> Settings:
    """Return settings in which all that a kind of program does not depend on is at its default."""
    groups = {
        "train": ("model", "data", "derive"),
        "score": ("model", "data", "score", "patch"),
        "patch": ("patch", "export"),
        "decode": ("data", "evaluate"),
    }[kind]
    own = dataclasses.replace(
        Settings(), **{name: getattr(settings, name) for name in ("mesh", "run", *groups)}
    )
    few = {"score": ("derive.loss",), "decode": ("model.compute_dtype",)}.get(kind, ())
    return own.override({name: settings.flat()[name] for name in few})


def meshes(config: DecoderConfig, target: Target) -> dict[str, Sharder]:
    """Return every mesh of a target that the architecture's dimensions divide, {text: sharder},
    smallest tensor axis first.

    The data axis has as many parts as there are slices.
    """
    chips, found = len(target.devices) // target.slices, {}
    for tensor in (n for n in range(1, chips + 1) if chips % n == 0):
        text = f"data:{target.slices},fsdp:{chips // tensor},tensor:{tensor}"
        try:
            sharder = target.sharder(text)
            param_table(config).shardings(sharder)
        except (
            ValueError,
            NotImplementedError,
        ):  # a dimension that does not divide; an order the machine does not have
            continue
        found[text] = sharder
    return found


def ladder(kind: str, settings: Settings, ways: int) -> Iterator[Changes]:
    """Yield changes that make a kind of program need less memory, each on top of the one before,
    the mildest first.

    Args:
      kind: one of PROGRAMS.
      settings: to start from.
      ways: parts of the batch axis.
    """
    changes: Changes = {}
    if kind in ("train", "score"):
        for remat in REMAT[REMAT.index(settings.model.remat) + 1 :]:
            changes = changes | {"model.remat": remat}
            yield changes
    if kind == "train":
        rows, accumulate = settings.derive.batch_size, settings.derive.accumulate
        while rows % (2 * accumulate * ways) == 0:
            accumulate *= 2
            changes = changes | {"derive.accumulate": accumulate}
            yield changes
        if settings.derive.optimizer == "adamw":
            yield changes | {"derive.optimizer": "adafactor"}
            # A sum of gradients is one more copy of the parameters.
            if "derive.accumulate" in changes:
                whole = {
                    name: value for name, value in changes.items() if name != "derive.accumulate"
                }
                yield whole | {"derive.optimizer": "adafactor"}
    if kind == "decode":
        rows = settings.evaluate.batch_size
        while rows % 2 == 0 and (rows // 2) % ways == 0:
            rows //= 2
            yield {"evaluate.batch_size": rows}


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
        """Return the figures of a kind of program; compiled once, whatever settings change that it
        does not depend on."""
        return self._once(_own(settings, kind), kind)

    def _measure(self, settings: Settings, kind: str) -> tuple[Figures, ...]:
        sharder = self._sharder(settings.mesh.shape)
        made = programs(settings, self._config, sharder, [kind])
        return tuple(measure_all(made, self._target, sharder, f"compile {kind}"))

    def all(self, settings: Settings) -> tuple[Figures, ...]:
        """Return the figures of all programs of these settings."""
        return tuple(f for kind in self._kinds for f in self.measure(settings, kind))

    def remedy(self, settings: Settings) -> Found | None:
        """Return the nearest settings with which every program fits, or None.

        First what costs time alone (remat, micro-batches), then another optimiser, then another
        mesh.
        """
        own = self._sharder(settings.mesh.shape)
        others = {
            text: s
            for text, s in meshes(self._config, self._target).items()
            if s.mesh.shape != own.mesh.shape
        }
        tensor = own.mesh.shape["tensor"]
        nearest = sorted(
            others, key=lambda text: abs(math.log2(others[text].mesh.shape["tensor"] / tensor))
        )
        for mesh in ["", *nearest]:
            changes: Changes | None = {"mesh.shape": mesh} if mesh else {}
            for kind in self._kinds:
                changes = self._fitting(settings, kind, changes)
                if changes is None:
                    break
            else:
                changed = settings.override(changes)
                figures = self.all(changed)
                if all(f.fits for f in figures):
                    return Found(changes, figures)
        return None

    def _fitting(self, settings: Settings, kind: str, changes: Changes) -> Changes | None:
        """Return these changes with the first of the ladder added with which a kind of program
        fits, or None."""
        base = settings.override(changes)
        ways = self._sharder(base.mesh.shape).batch_ways
        for more in [{}, *ladder(kind, base, ways)]:
            changed = base.override(more)
            if (
                kind == "train"
                and self._target.memory is not None
                and self.least(changed) > self._target.memory
            ):
                continue
            if more or "mesh.shape" in changes:
                say(f"Trying {kind} with {as_flags(changes | more)}")
            if all(f.fits for f in self.measure(changed, kind)):
                return changes | more
        return None

    def least(self, settings: Settings) -> int:
        """Return the bytes a device without which no run of these settings can do, whatever its
        mesh: train and patch."""
        sharder = self._sharder(settings.mesh.shape)
        return screen_train(settings, self._config, sharder, lengths(settings)).least

    def suggest(
        self, settings: Settings, most: int = 5
    ) -> tuple[list[tuple[Changes, Figures]], Found | None]:
        """Search mesh and remat for the shortest train step that fits.

        All combinations are screened by arithmetic, the best few are compiled.

        Returns:
          ((changes, figures of the train step) of what was compiled, shortest least time first; the
          best with which every program fits, or None).
        """
        laid_out = meshes(self._config, self._target)
        screened = []
        for remat in REMAT:
            flops = None
            for text, sharder in laid_out.items():
                changes = {"mesh.shape": text, "model.remat": remat}
                changed = settings.override(changes)
                if flops is None:  # the same on every mesh
                    train, *_ = programs(changed, self._config, sharder, ["train"])
                    flops = count_flops(train.trace().jaxpr)
                s = screen_train(
                    changed, self._config, sharder, lengths(changed), self._target.chip, flops
                )
                if self._target.memory is None or s.least <= self._target.memory:
                    screened.append(
                        (s.memory > (self._target.memory or math.inf), s.seconds, s.memory, changes)
                    )
        screened.sort(key=lambda row: row[:3])
        say(
            f"{len(laid_out)} meshes with {len(REMAT)} settings of model.remat; compiling the "
            f"train step of the best {min(most, len(screened))} by arithmetic"
        )
        compiled = []
        for _, _, _, changes in screened[:most]:
            figures = max(self.measure(settings.override(changes), "train"), key=lambda f: f.peak)
            compiled.append((changes, figures))
        compiled.sort(key=lambda row: (not row[1].fits, row[1].least_seconds, row[1].peak))
        for changes, figures in compiled:
            every = self.all(settings.override(changes)) if figures.fits else (figures,)
            if all(f.fits for f in every):
                return compiled, Found(changes, every)
        return compiled, None
