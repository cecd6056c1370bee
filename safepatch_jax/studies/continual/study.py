"""Continual post-safety-alignment: harm categories arrive one after another, each patches the model
before.

A chain lives in a workdir: its patch log, a folder for each link, the measurements, and a report.
docs/continual.md has it all.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from safepatch_jax.data.records import load_records
from safepatch_jax.mesh import Sharder
from safepatch_jax.outcome import outcome_settings
from safepatch_jax.patch_file.file import PatchFile
from safepatch_jax.patch_file.growth import sizes
from safepatch_jax.patch_file.log import (
    LINKS,
    PATCH,
    PatchLog,
    data_text,
    folder_hash,
    label,
    patch_facts,
    patch_hash,
)
from safepatch_jax.patch_file.log_lines import LOG, START, START_DIR
from safepatch_jax.patch_file.pruning import keep_models
from safepatch_jax.patch_file.removal import is_begun
from safepatch_jax.reporting.charts import CYCLE
from safepatch_jax.run import environment
from safepatch_jax.run.agreement import SAME_FILES, agree_on_run
from safepatch_jax.run.context import Context
from safepatch_jax.run.job import SETTINGS
from safepatch_jax.run.pins import pinned
from safepatch_jax.run.place import Place
from safepatch_jax.run.stages import versions
from safepatch_jax.runtime import files, mirror, processes
from safepatch_jax.runtime.addresses import name_of
from safepatch_jax.runtime.console import say, some
from safepatch_jax.runtime.paths import resolve
from safepatch_jax.runtime.programs import keep_programs
from safepatch_jax.runtime.workdir import Workdir
from safepatch_jax.settings import Settings
from safepatch_jax.studies.continual import report
from safepatch_jax.studies.continual.beside import METHODS_DIR, OtherChain
from safepatch_jax.studies.continual.gating import GATES, ChainGate, chosen
from safepatch_jax.studies.continual.links import Link, seeds_of
from safepatch_jax.studies.continual.measures import COMMON, Measures, Model
from safepatch_jax.studies.continual.methods import CHAINED, Task, safepatching
from safepatch_jax.studies.continual.resume import check_resumable
from safepatch_jax.studies.continual.start import check_settings, make_start
from safepatch_jax.studies.gate.checks import OURS, THEIRS
from safepatch_jax.studies.gate.rules import Rules, read_rules

_APART = ("stages", START_DIR.format("*"))  # what is published as whole folders
MEASURES, GROWTH = "measures", "patches"  # folders; the second within the first
EVERYTHING, OWN = MEASURED = ("all", "own")
_OF_REFUSED = ("name", "parent", "model", "data", "gate")  # of a link's line
_NAMES = (
    LOG,
    LINKS,
    METHODS_DIR,
    GATES,
    MEASURES,
    START_DIR.format("*"),
    environment.FILE,
    *report.FILES,
)


def run(
    settings: Settings,
    workdir: str | pathlib.Path,
    links: Sequence[Link],
    methods: Sequence[str] = ("safepatching",),
    command: Sequence[str] = (),
    gate: str = "",
    keep: int = 1,
    measure: str = EVERYTHING,
) -> pathlib.Path:
    """Bring a chain up to date: make the links that it lacks, measure all models, write the report;
    return the report's path.

    Args:
      settings: of the chain.
      workdir: of one chain.
      links: see `links.parse_links`.
      methods: see `methods.parse_methods`.
      command: with which the run was started; it is noted.
      gate: a file of rules by which links are accepted, see `gate.rules.read_rules`; '' for none.
      keep: the models of so many links, the last, stay as folders; 0: of all.
      measure: 'all': every model on every category; 'own': each on its link's and the next link's,
        the starting model and the head on all.

    Raises:
      ValueError: settings, data or model are wrong, or not the same in all processes; the workdir
        is of another chain, or has other links than `links` begin with.
    """
    check_settings(settings)
    settings = pinned(settings, resolve(workdir) / LOG)
    rules = read_rules(gate) if gate else None
    folder = Workdir(workdir, "a chain", LOG, _NAMES, apart=_APART)
    flags = {
        "--links": [dataclasses.astuple(link) for link in links],
        "--methods": list(methods),
        "--workdir": name_of(folder.path),
        "--gate": rules.hash if rules else "",
        "--keep_models": keep,
        "--measure_on": measure,
    }
    agree_on_run(settings, Place.parse(settings.model.source), flags, dict)
    with folder.claimed():
        chain = Chain(settings, folder.path, links, command, rules, keep, measure)
        processes.on_first(environment.write, folder.path, command, chain.sharder)
        return chain.run(methods)


class Chain:
    """A chain that is being made.

    Args:
      settings, workdir, links, command, keep, measure: see `run`.
      rules: by which links are accepted; None for all.

    Attributes:
      log: the patch log.
      measures: what its models are measured on.

    Raises:
      ValueError: the log is damaged, of another chain, or has other links than `links` begin with;
        data that cannot be used.
    """

    def __init__(
        self,
        settings: Settings,
        workdir: pathlib.Path,
        links: Sequence[Link],
        command: Sequence[str] = (),
        rules: Rules | None = None,
        keep: int = 1,
        measure: str = EVERYTHING,
    ):
        self.settings, self.workdir, self.links = settings, workdir, tuple(links)
        self._command, self._keep, self._everything = command, keep, measure == EVERYTHING
        # All links see the same records, also if a file is changed meanwhile.
        self._read = functools.cache(load_records)
        self._context = Context(settings.override({"align.enabled": False}), self._read)
        keep_programs(self._context.cache_dir)
        self._settings, self._contexts = {}, {}
        log = PatchLog(workdir) if processes.on_first((workdir / LOG).is_file) else None
        self._seeds = seeds_of(log, settings.run.seed, self.links)
        for link in self.links:
            self._settings[link.name] = link.settings(settings, self._seeds[link.name])
            self._contexts[link.name] = Context(self._settings[link.name], self._read)
        self._check_data()
        if rules is not None:
            chosen(rules, self._contexts)  # refused before a model is made
        if log is not None:
            self.log = log
            hashes = {name: self._data_hash(name) for name in self._contexts}
            check_resumable(self.log, settings, self.links, hashes)
        else:
            self.log = PatchLog.begin(workdir, make_start(settings, self._context, workdir))
        self._companions = files.text_hash(self.log.start["companions"])
        self.measures = Measures(
            self._context,
            self._contexts,
            workdir / MEASURES,
            self.log.model(START),
            self._companions,
        )
        self._gate = None
        if rules is not None:
            self._gate = ChainGate(rules, self.measures, workdir / GATES)

    @property
    def sharder(self) -> Sharder:
        """The mesh of what is measured."""
        return self._context.sharder

    def run(self, methods: Sequence[str]) -> pathlib.Path:
        """Make and measure all links and the other methods' models, and write the report."""
        self._say_plan()
        self._prune()
        self._measure(START)
        if self._everything:
            self._measure(self.log.head)  # as the run may have been killed before
        for link in self.links[len(self._standing()) :]:
            if self._extend(link) and self._everything:
                self._measure(self.log.head)
            self._prune(self.log.live[-self._keep - 1 :][:1])
            gc.collect()  # parts of the link's run refer to one another: they go now, not later
        processes.on_first(_delete_leftovers, self.log)
        rows, before = [], START
        for number in (START, *self.log.live):
            rows.append(self._row(number))
            self._prune([before])  # not the last one: from it the next, if need be, is built
            before = number
        by_method = {"safepatching": rows}
        for method in methods:
            if method != "safepatching":
                by_method[method] = [rows[0], *self._beside(method)]
        content = self._content(by_method)
        processes.on_first(report.write, content, self.workdir)
        for line in report.summary(content):
            say(line)
        return self.workdir / report.FILES[0]

    def _standing(self) -> list[dict[str, Any]]:
        """Return what was decided of links: all but refusals at the end by other rules than those
        that are given now."""
        decided = self.log.decided
        while decided and self._gate and decided[-1]["entry"] == "refused":
            if decided[-1]["gate"]["rules"] == self._gate.rules.hash:
                break
            decided.pop()
        return decided

    def _extend(self, link: Link) -> bool:
        """Make the next link, and add it to the log unless the gate refuses it; return whether it
        was added."""
        log, parent = self.log, self.log.head
        number = max(log.links, default=START) + 1
        name = label(number, link.name)
        processes.on_first(_delete_leftovers, log, name)
        say(f"Link {name}: on {log.label(parent)}, {data_text(self._data(link))}")
        out = self.workdir / LINKS / name
        folder = safepatching(self._task(link, log.model(parent), out, out))
        entry = processes.on_first(self._entry, link, number, parent, folder, out / PATCH)
        if self._gate is None:
            log.append("link", entry)
            return True
        entry["gate"] = self._judge(name, entry, folder)
        if entry["gate"]["accepted"]:
            log.append("link", entry)
            return True
        log.append("refused", {key: entry[key] for key in _OF_REFUSED})
        say(
            f"Link {name}: refused by the gate ({entry['gate']['verdict']}); the head stays "
            f"{log.label(parent)}. Report: {self.workdir / GATES / name / 'gate.md'}"
        )
        processes.on_first(_delete_leftovers, log)
        if not processes.first():
            mirror.forget(out)
        return False

    def _judge(self, name: str, entry: dict[str, Any], folder: pathlib.Path) -> dict[str, Any]:
        """Return what the gate says of a link that was made."""
        log, number = self.log, entry["parent"]["link"]
        if self._gate.against_start:
            number = START
        names = {OURS: name, THEIRS: log.label(number)}
        say(f"Link {name}: the gate, against {names[THEIRS]}")
        against = Model(log.hash(number), lambda: log.model(number))
        return self._gate.judge(Model(entry["model"], lambda: folder), against, names)

    def _entry(
        self, link: Link, number: int, parent: int, folder: pathlib.Path, path: pathlib.Path
    ) -> dict[str, Any]:
        mirror.bring_listed(path.parent)
        patch, model, before = PatchFile(path), folder_hash(folder), self.log.hash(parent)
        if (patch_hash(patch, "before"), patch_hash(patch, "after")) != (before, model):
            raise ValueError(
                f"{path} does not lead from {self.log.label(parent)} to {folder}: one of the "
                "folders was changed meanwhile. Nothing was logged. Delete "
                f"{self.workdir / LINKS / label(number, link.name)}; the same command makes the "
                "link again."
            )
        settings = self._settings[link.name].to_dict()
        groups = ("derive", "score", "patch", "export")
        return {
            "number": number,
            "name": link.name,
            "parent": {"link": parent, "model": before},
            "model": model,
            "patch": patch_facts(patch),
            "data": {
                **self._data(link),
                "hash": self._data_hash(link.name),
                "records": self.measures.records(link.name),
            },
            "seed": settings["run"]["seed"],
            "settings": {group: settings[group] for group in groups},
            "versions": versions(),
        }

    def _task(self, link: Link, parent: pathlib.Path, work: pathlib.Path, out: pathlib.Path):
        source = f"hf:{name_of(parent)}"
        settings = self._settings[link.name].override({"model.source": source})
        return Task(settings, link.name, work, out, self.measures, self._read, self._command)

    def _data(self, link: Link) -> dict[str, str]:
        return link.data(self.settings)

    def _prune(self, among: Sequence[int] | None = None) -> None:
        """Delete models that are not kept, see `keep_models`."""
        for number in processes.on_first(keep_models, self.log, self._keep, among):
            if not processes.first():
                mirror.forget(self.log.folder(number))

    def _parts(self, number: int) -> tuple[str, ...]:
        """Return what a model is measured on."""
        live, names = self.log.live, self.measures.names
        if not (self._everything or number in (START, self.log.head)):
            place = live.index(number)  # a link's report has its own two models
            names = [self.log.links[n]["name"] for n in live[place : place + 2]]
        return (*names, *COMMON)

    def _measure(self, number: int) -> Model:
        model = Model(self.log.hash(number), lambda: self.log.model(number))
        self.measures.measure(model, self._parts(number))
        return model

    def _row(self, number: int) -> dict[str, Any]:
        measures = self.measures.found(self._measure(number), (*self.measures.names, *COMMON))
        return report.row(self.log.label(number), self.log.hash(number), measures)

    def _beside(self, method: str) -> list[dict[str, Any]]:
        """Make and measure the chain of another method."""
        labels = [self.log.label(number) for number in self.log.live]
        parts = map(self._parts, self.log.live)
        links = list(zip(labels, self._accepted(), parts))
        start = {"start": self.log.start["model"], "companions": self._companions}
        chain = OtherChain(
            CHAINED[method],
            self.settings,
            links,
            self.workdir / METHODS_DIR / method,
            self.measures,
            start,
            lambda: self.log.model(START),
            self._task,
            self._seeds,
        )
        return chain.rows()

    def _accepted(self) -> list[Link]:
        """Return the links that lead to the head."""
        by_name = {link.name: link for link in self.links}
        return [by_name[self.log.links[number]["name"]] for number in self.log.live]

    def _content(self, rows: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
        log, stages, accepted = self.log, [], self._accepted()
        # Those that the models have seen come first: the n-th model has seen the first n.
        others = [link for link in self.links if link not in accepted]
        for link in (*accepted, *others):
            records = self.measures.records(link.name)
            stages.append({"name": link.name, **self._data(link), "records": records})
        colours = {}
        for i, method in enumerate(rows):
            colours[method] = CYCLE[i % len(CYCLE)]
        return report.gather(
            settings=outcome_settings(self.settings),
            start=log.start,
            stages=stages,
            links=[log.links[number] for number in log.live],
            reverted=sorted(log.links.keys() - log.rewritten.keys() - set(log.live)),
            rows=rows,
            labels={method: CHAINED[method].label for method in rows},
            colours=colours,
            refused=[entry for entry in log.decided if entry["entry"] == "refused"],
            patches=processes.on_first(sizes, log, self.workdir / MEASURES / GROWTH),
        )

    def _data_hash(self, name: str) -> str:
        """Return the hash of a link's harmful records, with the template where that is a file."""
        hashes = self._contexts[name].data_hashes
        if "template" in hashes:
            return files.text_hash([hashes["harmful"], hashes["template"]])
        return hashes["harmful"]

    def _check_data(self) -> None:
        """Read the data of all links before anything is trained.

        Raises:
          ValueError: data that cannot be used, of all links; or processes with different data.
        """
        problems = []
        for name, context in self._contexts.items():
            try:
                for split in ("train", self.settings.evaluate.split):
                    context.split("harmful", split)
            except ValueError as error:
                problems.append(f"--links, {name}: {error}")
        if problems:
            raise ValueError(some(problems, " "))
        if processes.several():
            hashes = {}
            for name, context in self._contexts.items():
                hashes[f"records of {name}"] = context.data_hashes["harmful"]
            for role, digest in self._context.data_hashes.items():
                hashes[f"records of data.{role}"] = digest
            processes.agree(hashes, SAME_FILES)

    def _say_plan(self) -> None:
        standing = self._standing()
        say(f"Chain:   {self.workdir}, head {self.log.label(self.log.head)}")
        for i, link in enumerate(self.links):
            state = "to be made"
            if i < len(standing):
                number = standing[i].get("number")
                state = f"link {number}" if number else "refused by the gate"
            records = self.measures.records(link.name)
            say(f"         {link.name}: {data_text(self._data(link))}, {records} records, {state}")


def _delete_leftovers(log: PatchLog, keep: str = "") -> None:
    """Delete link folders that an interrupted run began and that no longer belong to the chain:
    they hold derived models."""
    known = {log.label(number) for number in log.links}
    for name in mirror.folders(log.workdir / LINKS):
        path = log.workdir / LINKS / name
        if name in known or path.is_symlink() or not re.match("[0-9]{2,}-", name):
            continue
        if name == keep and not is_begun(path):
            continue
        # In a bucket the mark may be gone already: what was begun there is deleted to the end.
        if (path / SETTINGS).is_file() or is_begun(path) or mirror.has_any(path / "stages"):
            files.refuse_link(path, log.workdir)
            say(f"{name}: not a link of the chain; deleted")
            for part in (path / "stages", path):  # derived models first
                mirror.delete(part)
                files.delete(part)
