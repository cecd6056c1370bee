"""Does a patch outlive what is done to models afterwards? Base and patched model, each quantised,
cast, or tuned further on ordinary answers, and measured again.

WORKDIR/measured holds each model's values and each treatment's entries, from which a killed study
is resumed; durability.md, durability.json and durability.png follow from these. Treated models live
in memory alone, unless they are to be kept.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from safepatch_jax.data.records import DATA_ROLES
from safepatch_jax.io import hub
from safepatch_jax.io.hf import save_model
from safepatch_jax.models.config import read_hf_config
from safepatch_jax.models.table import Param, nest, param_table
from safepatch_jax.numerics import NotFinite
from safepatch_jax.reporting import charts
from safepatch_jax.run import environment
from safepatch_jax.run.agreement import SAME_COMMAND
from safepatch_jax.run.job import open_run
from safepatch_jax.run.pins import pinned
from safepatch_jax.run.stages import KEYED, versions
from safepatch_jax.run.state import Run
from safepatch_jax.run.table import evaluate_settings
from safepatch_jax.runtime import files, processes
from safepatch_jax.runtime.console import progress, say
from safepatch_jax.runtime.paths import resolve
from safepatch_jax.runtime.workdir import Workdir
from safepatch_jax.settings import Settings
from safepatch_jax.studies.durability import report
from safepatch_jax.studies.durability.effects import BASE, MODEL, WHOS
from safepatch_jax.studies.durability.entries import entries_of, total
from safepatch_jax.studies.durability.meter import OPENINGS, Meter, check_records
from safepatch_jax.studies.durability.options import (
    ANSWERS,
    MARGINS,
    NONE,
    DurabilityOptions,
    Treatment,
)
from safepatch_jax.studies.durability.pair import Pair
from safepatch_jax.studies.durability.quantise import quantised_rows
from safepatch_jax.studies.durability.treat import (
    Overflow,
    Weights,
    finetuned,
    training_key,
    treated,
    treated_row,
)
from safepatch_jax.studies.record import refuse_other

RECORD, MEASURED, KEPT = "durability_inputs.json", "measured", "treated"
_NAMES = (RECORD, MEASURED, KEPT, OPENINGS, environment.FILE, *report.FILES)
_FIX = "Delete it, and it is measured again."
_BEFORE = Treatment(NONE)


def durability(
    settings: Settings,
    workdir: str | pathlib.Path,
    model: str = "",
    patch: str = "",
    options: DurabilityOptions = DurabilityOptions(),
    command: Sequence[str] = (),
) -> pathlib.Path:
    """Measure what is left of a patch after treatments of base and patched model.

    Args:
      settings: model.source is the base; of the others data.*, evaluate.*, mesh.*, model.*, those
        of derive.* that say how a step is taken, and patch.scope count.
      workdir: its folder; one that was begun with the same models and settings is resumed.
      model: the patched model's folder in Hugging Face format, or org/name of the Hub; '' for the
        base with the patch.
      patch: the patch file, '' for none.
      options: see `DurabilityOptions`.
      command: with which it was started; it is noted.

    Returns:
      The path of the report.

    Raises:
      ValueError: bad settings, model, patch or data; models that hold the same weights; a workdir
        of something else, or one in which another process is at work.
    """
    charts.check()
    treatments = options.parsed()
    asked = dataclasses.asdict(options) | {"--model": model, "--patch": patch}
    processes.agree(asked, SAME_COMMAND)
    changes = {"align.enabled": False, "derive.batch_size": options.batch_size}
    place = resolve(workdir)
    run = open_run(pinned(settings.override(changes), place / RECORD), place)
    pair = Pair(_base(run), hub.folder_of(model) if model else "", patch)
    study = _Study(run, pair, options)
    folder = Workdir(
        workdir,
        "a durability study",
        RECORD,
        _NAMES,
        refuse=study.check_record,
        declared=(RECORD, OPENINGS, environment.FILE),
    )
    with folder.claimed(run.context.cache_dir):
        processes.on_first(study.begin, command)
        return study.run(treatments)


def _base(run: Run) -> pathlib.Path:
    """Return the base in Hugging Face format; another format is converted, once, in the cache."""
    if run.source.kind != "hf":
        run.runner.need("import")
    return run.imported


class _Study:
    """A study of one pair of models in a folder."""

    def __init__(self, run: Run, pair: Pair, options: DurabilityOptions):
        self._run, self._pair, self._options = run, pair, options
        self._out = run.workdir
        self._table = param_table(read_hf_config(pair.folder))
        matrices = quantised_rows(self._table, run.settings.patch.scope)
        self._quantised = frozenset(row.path for row in matrices)
        self._record = {
            "models": pair.record,
            "data": dict(run.inputs.data_hashes),
            "options": self._deciding(),
        }

    def _deciding(self) -> dict[str, Any]:
        settings = self._run.settings
        limit = settings.evaluate.margin_limit
        return (
            evaluate_settings(settings)
            | self._run.inputs.prompt_format.key()
            | {"margin_limit": limit, "scope": settings.patch.scope}
        )

    def check_record(self) -> None:
        """Raise ValueError if the folder is of other models, data or settings."""
        refuse_other(self._out / RECORD, self._record, "a durability study", "--workdir", _FIX)

    def begin(self, command: Sequence[str]) -> None:
        """Note what the folder is for."""
        if not (self._out / RECORD).is_file():
            source = {"model.source": self._run.settings.model.source}
            content = self._record | {"settings": source, "versions": versions()}
            files.write_json(self._out / RECORD, content)
        (self._out / MEASURED).mkdir(exist_ok=True)
        environment.write(self._out, command, self._run.context.sharder)

    def run(self, treatments: Sequence[Treatment]) -> pathlib.Path:
        """Measure what is missing; write the report and return its path."""
        self._weights = self._pair.weights(self._run.context.sharder)
        check_records(self._run, self._options.kinds, any(x.trains for x in treatments))
        self._entries(_BEFORE, {})  # refuses models that are one and the same
        self._meter = Meter(
            self._run, self._options.kinds, self._out / OPENINGS, files.text_hash(self._record)
        )
        every, results = [_BEFORE, *treatments], {}
        for number, treatment in enumerate(every, 1):
            results[treatment.name] = self._result(treatment, f"[{number}/{len(every)}]")
        content = report.gather(results, self._options, self._about(treatments))
        processes.on_first(report.write, content, self._out)
        for line in report.summary(content):
            say(line)
        path = self._out / report.FILES[0]
        say(f"Report: {path}")
        return path

    def _about(self, treatments: Sequence[Treatment]) -> dict[str, Any]:
        settings = self._run.settings
        names = {"treatments": [treatment.name for treatment in treatments]}
        return {
            "models": {BASE: settings.model.source, MODEL: self._pair.model_name},
            "options": dataclasses.asdict(self._options) | names,
            "data": {role: getattr(settings.data, role) for role in DATA_ROLES},
            "record": self._record,
            "quantised": sum(row.num_layers for row in self._table if row.path in self._quantised),
            "tensors": len(self._table.hf_names()),
            "trained": settings.derive.train,
            "versions": versions(),
        }

    def _result(self, treatment: Treatment, place: str) -> dict[str, Any]:
        """Return {'values': by model and measure, 'entries', 'failed': '' or why nothing was
        measured, 'nll': of training steps, by model} of one treatment."""
        failed = self._noted(treatment, "failed")
        if failed is None and self._open(treatment):
            say(f"{place} {treatment.name}")
            try:
                self._do(treatment)
            except (Overflow, NotFinite) as error:
                if treatment == _BEFORE:
                    raise
                failed = {"failed": str(error)}
                self._note(treatment, "failed", failed)
        else:
            say(f"{place} {treatment.name}: measured already")
        if failed is not None:
            say(f"  {treatment.name}: not measured: {failed['failed']}")
            return {"failed": failed["failed"]}
        values: dict[str, dict[str, Any]] = {who: {} for who in WHOS}
        nll = {}
        for who in WHOS:
            for kind in self._options.kinds:
                values[who] |= self._noted(treatment, f"{who}.{kind}")["values"]
            if treatment.trains:
                nll[who] = self._noted(treatment, f"{who}.training")["nll"]
        entries = self._noted(treatment, "entries")
        return {"values": values, "entries": entries["total"], "failed": "", "nll": nll}

    def _parts(self, treatment: Treatment) -> list[str]:
        """Return the names of what is noted of a treatment."""
        parts = []
        for who in WHOS:
            parts += [f"{who}.{kind}" for kind in self._options.kinds]
            if treatment.trains:
                parts.append(f"{who}.training")
        return [*parts, "entries"]

    def _open(self, treatment: Treatment) -> list[str]:
        """Return what is missing of a treatment."""
        missing = []
        for part in self._parts(treatment):
            if self._noted(treatment, part) is None:
                missing.append(part)
        for who in WHOS:
            if self._keeps(treatment) and not self._is_kept(treatment, who):
                missing.append(f"{who}.kept")
        return missing

    def _do(self, treatment: Treatment) -> None:
        """Treat both models, and note what is missing; they are made only where something is."""
        missing, trained = self._open(treatment), {}
        for who in WHOS:
            of_both = treatment.trains and "entries" in missing
            parts = [part for part in missing if part.startswith(f"{who}.")]
            if parts or of_both:
                flat = self._made(treatment, who)
                if of_both:
                    trained[who] = flat
                for part in parts:
                    self._note_part(treatment, who, part.partition(".")[2], flat)
                del flat
        if "entries" in missing:
            self._entries(treatment, trained)

    def _made(self, treatment: Treatment, who: str) -> Weights:
        """Return a model's parameters after a treatment."""
        title, weights = self._title(treatment, who), self._weights[who]
        if treatment == _BEFORE:
            return {row.path: weights[row.path] for row in self._table}
        if not treatment.trains:
            return treated(treatment, self._table, self._quantised, weights, title)
        flat, nll = finetuned(self._run, weights, self._options, title)
        self._note(treatment, f"{who}.training", {"nll": nll})
        return flat

    def _title(self, treatment: Treatment, who: str) -> str:
        return f"{treatment.name}, {'base' if who == BASE else 'patched'}"

    def _note_part(self, treatment: Treatment, who: str, part: str, flat: Weights) -> None:
        if part in (MARGINS, ANSWERS):
            values = self._meter.measured(part, flat, self._title(treatment, who))
            self._note(treatment, f"{who}.{part}", {"values": values})
        elif part == "kept":
            self._keep(treatment, who, flat)

    def _entries(self, treatment: Treatment, trained: Mapping[str, Weights]) -> dict[str, Any]:
        """Return what a treatment leaves of the patch's entries."""
        noted = self._noted(treatment, "entries")
        if noted is None:
            tensors: dict[str, Any] = {}
            with progress(self._table.size, f"{treatment.name}: entries", "weight") as bar:
                for row, before, after in self._rows(treatment, trained):
                    tensors |= entries_of(row, *before, *after)
                    bar.update(before[0].size)
            if not any(x["changed"] for x in tensors.values()):
                raise ValueError(
                    f"{self._run.settings.model.source} and {self._pair.model_name} hold the same "
                    "weights, so there is no patch to outlive anything. Give --base the model "
                    "before it was patched."
                )
            changed = {name: x for name, x in tensors.items() if x["changed"] or x["outside"]}
            noted = {"total": total(tensors), "tensors": changed}
            self._note(treatment, "entries", noted)
        return noted

    def _rows(
        self, treatment: Treatment, trained: Mapping[str, Weights]
    ) -> Iterator[tuple[Param, list[jax.Array], list[jax.Array]]]:
        """Yield each parameter of both models, before and after."""
        for row in self._table:
            before = [self._weights[who][row.path] for who in WHOS]
            if treatment.trains:
                after = [trained[who][row.path] for who in WHOS]
            else:
                quantised = row.path in self._quantised
                after = [treated_row(treatment, row, x, quantised) for x in before]
            yield row, before, after

    def _keeps(self, treatment: Treatment) -> bool:
        return self._options.keep and treatment != _BEFORE

    def _kept(self, treatment: Treatment, who: str) -> pathlib.Path:
        key = self._key(treatment, "kept")[:8]
        return self._out / KEPT / f"{treatment.name}-{key}" / who

    def _is_kept(self, treatment: Treatment, who: str) -> bool:
        return processes.on_first(self._kept(treatment, who).is_dir)

    def _keep(self, treatment: Treatment, who: str, flat: Weights) -> None:
        """Write a treated model, in the dtype that holds its weights exactly."""
        folder, config = self._kept(treatment, who), read_hf_config(self._pair.folder)
        dtype = treatment.dtype or "float32"
        save_model(folder, nest(flat), config, self._pair.folder, dtype=dtype)
        say(f"  {self._title(treatment, who)}: kept in {folder}")

    def _key(self, treatment: Treatment, part: str) -> str:
        """Return the hash of all that a part depends on."""
        about: dict[str, Any] = {
            "record": self._record,
            "treatment": dataclasses.asdict(treatment),
            "part": part,
            "versions": {package: versions()[package] for package in KEYED},
        }
        if treatment.trains:
            about["training"] = training_key(self._run, self._options)
        if part.endswith(MARGINS):
            about["openings"] = self._meter.openings
        return files.text_hash(about)

    def _path(self, treatment: Treatment, part: str, key: str) -> pathlib.Path:
        return self._out / MEASURED / f"{treatment.name}.{part}.{key[:8]}.json"

    def _noted(self, treatment: Treatment, part: str) -> dict[str, Any] | None:
        """Return what is noted of a part, None where nothing is."""
        key = self._key(treatment, part)
        noted = processes.on_first(_read, self._path(treatment, part, key))
        return noted if noted.get("key") == key else None

    def _note(self, treatment: Treatment, part: str, content: Mapping[str, Any]) -> None:
        key = self._key(treatment, part)
        path = self._path(treatment, part, key)
        processes.on_first(files.write_json, path, {"key": key} | dict(content))


def _read(path: pathlib.Path) -> dict[str, Any]:
    return files.read_json(path, _FIX) if path.is_file() else {}
