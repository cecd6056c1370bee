"""Continual post-safety-alignment: harm categories arrive one after another, each patches the model
before.

A chain lives in a workdir: its patch log, a folder for each link, the measurements, and a report.
docs/continual.md has it all.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import pathlib
import shlex
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from safepatch_jax.data.records import DATA_ROLES, load_records
from safepatch_jax.io.folder import Checkpoint
from safepatch_jax.io.safetensors_file import INDEX, SINGLE
from safepatch_jax.mesh import Sharder
from safepatch_jax.models.config import read_hf_config
from safepatch_jax.models.table import param_table
from safepatch_jax.patch_file.commands import sizes
from safepatch_jax.patch_file.file import BITS, PatchFile
from safepatch_jax.patch_file.log import (
    FORMAT,
    LINKS,
    LOG,
    NAME,
    PATCH,
    START,
    START_DIR,
    PatchLog,
    companion_hashes,
    data_text,
    folder_hash,
    label,
    patch_hash,
)
from safepatch_jax.run import environment
from safepatch_jax.run.context import Context
from safepatch_jax.run.convert import Place, convert, source_facts
from safepatch_jax.run.job import PLACE, align_model
from safepatch_jax.run.stages import FINISHED, Runner, Stage, versions
from safepatch_jax.runtime import files, processes
from safepatch_jax.runtime.console import say, some
from safepatch_jax.settings import Settings
from safepatch_jax.studies.continual import report
from safepatch_jax.studies.continual.measures import COMMON, Measures, Model
from safepatch_jax.studies.continual.methods import CHAINED, COLOURS, Task, beside, safepatching

METHODS_DIR, MEASURES = "methods", "measures"
# What may differ between two runs of a chain: where and how they are done, and how models are
# measured.
_FREE = (*PLACE, "evaluate.", "data.eval_limit")
_SAME_FILES = "Give every host the same model and data files, best from one file system."


@dataclasses.dataclass(frozen=True)
class Link:
    """An entry of --stages: a name and the harmful data; an empty `harmful` stands for the run's
    data.harmful."""

    name: str
    harmful: str
    category: str

    def settings(self, settings: Settings, place: int) -> Settings:
        """Return the chain's settings with this link's harmful data and a seed of its own.

        With one seed random retention would draw the same entries in every link, and the draws are
        to be independent.
        """
        return settings.override(
            {
                "data.harmful": self.harmful or settings.data.harmful,
                "data.category": self.category,
                "run.seed": settings.run.seed + place,
                "align.enabled": False,
            }
        )


def parse_stages(text: str) -> tuple[Link, ...]:
    """Read --stages: NAME (a category of data.harmful), NAME=cat:A+B (several), NAME=SOURCE (a data
    set), with ';' between.

    Raises:
      ValueError: nothing given, not of this form, or a name twice.
    """
    links = []
    for entry in filter(None, (part.strip() for part in text.split(";"))):
        name, equals, data = (part.strip() for part in entry.partition("="))
        if not NAME.fullmatch(name) or bool(equals) != bool(data):
            raise ValueError(
                f"--stages: '{entry}' is not NAME, NAME=cat:A+B or NAME=SOURCE with a name of "
                "letters, digits, '_', "
                "'.' and '-'. A category of another name is given as NAME=cat:CATEGORY."
            )
        category = data.removeprefix("cat:") if data.startswith("cat:") else "" if data else name
        links.append(Link(name, "" if category else data, category))
    names = [link.name for link in links]
    if not links:
        raise ValueError(
            "--stages is empty; give for instance "
            "--stages='fraud;hate=cat:hate_speech+slurs;malware=malware.csv'."
        )
    if twice := sorted({name for name in names if names.count(name) > 1}) + sorted(
        set(names) & set(COMMON)
    ):
        raise ValueError(
            f"--stages: the name {', '.join(twice)} stands there twice or is taken "
            f"({', '.join(COMMON)} are). Give "
            "each stage a name of its own: NAME=cat:CATEGORY."
        )
    return tuple(links)


def parse_methods(text: str) -> tuple[str, ...]:
    """Read --methods, names between commas; SafePatching, which makes the chain, is always the
    first.

    Raises:
      ValueError: an unknown method.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in names if name not in CHAINED]:
        raise ValueError(
            f"--methods: there is no {', '.join(unknown)}. There are {', '.join(CHAINED)}."
        )
    return tuple(dict.fromkeys(("safepatching", *names)))


def run(
    settings: Settings,
    workdir: str | pathlib.Path,
    stages: Sequence[Link],
    methods: Sequence[str] = ("safepatching",),
    command: Sequence[str] = (),
) -> pathlib.Path:
    """Bring a chain up to date: make the links that it lacks, measure all models, write the report;
    return the report's path.

    Args:
      stages, methods: see `parse_stages` and `parse_methods`.
      command: with which the run was started; it is noted.

    Raises:
      ValueError: settings, data or model are wrong, or not the same in all processes; the workdir
        is of another chain, or has other links than `stages` begin with.
    """
    workdir = pathlib.Path(workdir).expanduser().absolute()
    _check_settings(settings)
    _agree(
        settings,
        {
            "--stages": [dataclasses.astuple(link) for link in stages],
            "--methods": list(methods),
            "--workdir": str(workdir),
        },
    )
    processes.on_first(lambda: _refuse_strangers(workdir))
    processes.shared(workdir)
    with processes.claimed(workdir):
        chain = Chain(settings, workdir, stages, command)
        processes.on_first(lambda: environment.write(workdir, command, chain.sharder))
        return chain.run(methods)


class Chain:
    """A chain that is being made.

    Raises:
      ValueError: the log is damaged, of another chain, or has other links than `stages` begin with;
        data that cannot be used.
    """

    def __init__(
        self,
        settings: Settings,
        workdir: pathlib.Path,
        stages: Sequence[Link],
        command: Sequence[str] = (),
    ):
        self.settings, self.workdir, self.stages, self._command = (
            settings,
            workdir,
            tuple(stages),
            command,
        )
        self._read = functools.cache(
            load_records
        )  # all links see the same records, also if a file is changed meanwhile
        self._settings = {
            link.name: link.settings(settings, place) for place, link in enumerate(self.stages)
        }
        self._contexts = {name: Context(own, self._read) for name, own in self._settings.items()}
        self._context = Context(settings.override({"align.enabled": False}), self._read)
        self._check_data()
        self.log = PatchLog(workdir) if processes.on_first((workdir / LOG).is_file) else None
        if self.log:
            self._compare()
        else:
            self.log = PatchLog.begin(workdir, self._make_start())
        self._companions = files.text_hash(self.log.start["companions"])
        self.measures = Measures(
            self._context,
            self._contexts,
            workdir / MEASURES,
            self.log.model(START),
            self._companions,
        )

    @property
    def sharder(self) -> Sharder:
        """The mesh of what is measured."""
        return self._context.sharder

    def run(self, methods: Sequence[str]) -> pathlib.Path:
        self._say_plan()
        self._measure(START)
        for link in self.stages[len(self.log.live) :]:
            self._extend(link)
            self._measure(self.log.head)
        rows = {
            "safepatching": [self._row(START)] + [self._row(number) for number in self.log.live]
        }
        for method in (name for name in methods if name != "safepatching"):
            rows[method] = [rows["safepatching"][0], *self._beside(method)]
        processes.on_first(lambda: report.write(self._content(rows), self.workdir))
        return self.workdir / report.FILES[0]

    # -- what a chain is made of
    # --------------------------------------------------------------------------------------

    def _make_start(self) -> dict[str, Any]:
        """Bring the starting model into place; return what the log says of it."""
        settings, place = self.settings, Place.parse(self.settings.model.source)
        name = START_DIR.format(files.text_hash([_told(settings), self._context.data_hashes])[:8])
        copy, own = self.workdir / name, place.kind == "hf" and not settings.align.enabled
        folder = place.path.absolute() if own else copy
        if not own and not processes.on_first(copy.is_dir):
            say(
                "The starting model: "
                + ("aligned" if settings.align.enabled else "converted")
                + f" into {copy}"
            )
            if settings.align.enabled:
                align_model(settings, copy)
            else:
                convert(
                    f"{place.kind}:{place.path}",
                    f"hf:{copy}",
                    mesh=settings.mesh.shape,
                    certify="hashes",
                )
        read_hf_config(folder)
        processes.on_first(lambda: _refuse_unpatchable(folder))
        return {
            "format": FORMAT,
            "source": settings.model.source,
            "aligned": settings.align.enabled,
            "folder": str(folder) if own else name,
            "model": processes.on_first(lambda: folder_hash(folder)),
            "companions": processes.on_first(lambda: companion_hashes(folder)),
            "settings": _told(settings),
            "versions": versions(),
        }

    def _extend(self, link: Link) -> None:
        """Make the next link and add it to the log."""
        log, parent = self.log, self.log.head
        number = max(log.links, default=START) + 1
        name = label(number, link.name)
        processes.on_first(lambda: _delete_leftovers(log, name))
        say(f"Link {name}: on {log.label(parent)}, {data_text(self._data(link))}")
        out = self.workdir / LINKS / name
        folder = safepatching(self._task(link, log.model(parent), out, out))
        log.append(
            "link",
            processes.on_first(lambda: self._entry(link, number, parent, folder, out / PATCH)),
        )

    def _entry(
        self, link: Link, number: int, parent: int, folder: pathlib.Path, path: pathlib.Path
    ) -> dict[str, Any]:
        patch, model, before = PatchFile(path), folder_hash(folder), self.log.hash(parent)
        if (patch_hash(patch, "before"), patch_hash(patch, "after")) != (before, model):
            raise ValueError(
                f"{path} does not lead from {self.log.label(parent)} to {folder}: one of the "
                "folders was changed "
                "meanwhile. Nothing was logged. Delete "
                f"{self.workdir / LINKS / label(number, link.name)}; the same "
                "command makes the link again."
            )
        settings = self._settings[link.name].to_dict()
        return {
            "number": number,
            "name": link.name,
            "parent": {"link": parent, "model": before},
            "model": model,
            "patch": {
                "sha256": files.file_sha256(path),
                "bytes": path.stat().st_size,
                "entries": patch.entries(),
            },
            "data": self._data(link)
            | {
                "hash": self.measures.data_hash(link.name),
                "records": self.measures.records(link.name),
            },
            "seed": settings["run"]["seed"],
            "settings": {
                group: settings[group] for group in ("derive", "score", "patch", "export")
            },
            "versions": versions(),
        }

    def _task(
        self, link: Link, parent: pathlib.Path, work: pathlib.Path, out: pathlib.Path
    ) -> Task:
        settings = self._settings[link.name].override({"model.source": f"hf:{parent}"})
        return Task(settings, link.name, work, out, self.measures, self._read, self._command)

    def _data(self, link: Link) -> dict[str, str]:
        return {"harmful": link.harmful or self.settings.data.harmful, "category": link.category}

    # -- what is compared
    # ---------------------------------------------------------------------------------------------

    def _measure(self, number: int) -> dict[str, Any]:
        model = Model(self.log.hash(number), lambda: self.log.model(number))
        return self.measures.measure(model, (*self.measures.names, *COMMON))

    def _row(self, number: int) -> dict[str, Any]:
        return report.row(self.log.label(number), self.log.hash(number), self._measure(number))

    def _beside(self, method: str) -> list[dict[str, Any]]:
        """Make and measure the chain of another method; its models are deleted after success."""
        links = list(zip((self.log.label(number) for number in self.log.live), self.stages))
        s, made = self.settings, CHAINED[method]
        tuned = made.group == "training"  # of the two patches these take at most the SE patch
        apart = (
            "model.source",
            "data.eval_limit",
            *(f"data.{role}" for role in DATA_ROLES),
            *PLACE,
            *(["derive.osm_"] if tuned else []),
        )
        groups = (
            ("derive.", "model.", "data.")
            if tuned
            else ("derive.", "model.", "data.", "score.", "patch.")
        )
        told = {
            k: v for k, v in s.flat().items() if k.startswith(groups) and not k.startswith(apart)
        } | dict(made.settings)
        seed = lambda link: self._settings[link.name].run.seed

        def make(before: str | None, name: str, link: Link, out: pathlib.Path) -> dict[str, Any]:
            parent = runner.need(before) / "model" if before else self.log.model(START)
            folder = beside(made, self._task(link, parent, runner.aside(name), out))
            return {"model": processes.on_first(lambda: folder_hash(folder))}

        names: list[str | None] = [None, *(name for name, _ in links)]
        runner = Runner(
            [
                Stage(
                    name,
                    (before,) if before else (),
                    told | {"seed": seed(link), "method": method},
                    {"data": self.measures.data_hash(link.name)}
                    | (
                        {}
                        if before
                        else {"start": self.log.start["model"], "companions": self._companions}
                    ),
                    functools.partial(make, before, name, link),
                    scratch=True,
                )
                for before, (name, link) in zip(names, links)
            ],
            self.workdir / METHODS_DIR / method,
            self._context.cache_dir,
        )
        try:
            rows = [self._row_beside(method, runner, name) for name, _ in links]
        except BaseException:
            if left := runner.scratch_left():
                say(
                    f"The comparison did not finish. Models of {made.label} lie in "
                    f"{', '.join(map(str, left))}: the "
                    "same command goes on from there; else delete them, they are broken models."
                )
            raise
        if not s.run.keep_scratch:
            processes.on_first(runner.delete_scratch)
            say(f"The models of {made.label} are deleted (keep with --run.keep_scratch).")
        return rows

    def _row_beside(self, method: str, runner: Runner, name: str) -> dict[str, Any]:
        if runner.status(name) not in FINISHED:
            say(f"{CHAINED[method].label} {name}")
            runner.need(name)
        digest = runner.result(name)["model"]
        model = Model(digest, lambda: runner.need(name) / "model")
        return report.row(
            name, digest, self.measures.measure(model, (*self.measures.names, *COMMON))
        )

    def _content(self, rows: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
        log = self.log
        return report.gather(
            settings=_told(self.settings),
            start=log.start,
            stages=[
                {"name": s.name, **self._data(s), "records": self.measures.records(s.name)}
                for s in self.stages
            ],
            links=[log.links[number] for number in log.live],
            reverted=[n for n in log.links if n not in log.live],
            rows=rows,
            labels={method: CHAINED[method].label for method in rows},
            colours={method: COLOURS[i % len(COLOURS)] for i, method in enumerate(rows)},
            patches=sizes([log.patch(number) for number in log.live]),
        )

    # -- what is refused
    # ----------------------------------------------------------------------------------------------

    def _check_data(self) -> None:
        """Read the data of all links before anything is trained.

        Raises:
          ValueError: data that cannot be used, of all links; or processes with different data.
        """
        problems = []
        for link in self.stages:
            context = self._contexts[link.name]
            try:
                for split in ("train", self.settings.evaluate.split):
                    context.split("harmful", split)
            except ValueError as error:
                problems.append(f"--stages, {link.name}: {error}")
        if problems:
            raise ValueError(some(problems, " "))
        if processes.several():
            hashes = {
                f"records of {name}": context.data_hashes["harmful"]
                for name, context in self._contexts.items()
            } | {
                f"records of data.{role}": digest
                for role, digest in self._context.data_hashes.items()
            }
            processes.agree(hashes, _SAME_FILES)

    def _compare(self) -> None:
        """Raise ValueError unless settings and stages go on with the chain of the log."""
        old, new = (
            {k: v for k, v in told.items() if not k.startswith(_FREE)}
            for told in (self.log.start["settings"], _told(self.settings))
        )
        default = Settings().flat()
        if differences := [
            f"{k}: {old.get(k, default[k])!r} -> {v!r}"
            for k, v in new.items()
            if old.get(k, default[k]) != v
        ]:
            raise ValueError(
                f"The chain in {self.workdir} was made with other settings: "
                f"{'; '.join(differences)}. Give the same "
                "ones, or begin another chain in another --workdir."
            )
        live = [self.log.links[number] for number in self.log.live]
        for i, entry in enumerate(live):
            fix = (
                "A link that was made stays; take it off first: python -m launch.continual revert "
                f"--workdir={shlex.quote(str(self.workdir))} --last={len(live) - i}."
            )
            if i >= len(self.stages):
                raise ValueError(
                    f"--stages has {len(self.stages)} entries, and the chain in {self.workdir} "
                    f"has {len(live)} "
                    f"links: {', '.join(e['name'] for e in live)}. Give all of them, new ones at "
                    f"the end. {fix}"
                )
            link = self.stages[i]
            given = {
                "name": link.name,
                **self._data(link),
                "hash": self._contexts[link.name].data_hashes["harmful"],
            }
            logged = {
                "name": entry["name"],
                **{key: entry["data"][key] for key in ("harmful", "category", "hash")},
            }
            if changed := [
                f"{key} {logged[key]!r} -> {given[key]!r}"
                for key in given
                if given[key] != logged[key]
            ]:
                raise ValueError(
                    f"--stages: entry {i + 1} is not that of link "
                    f"{self.log.label(entry['number'])} of this chain: "
                    f"{', '.join(changed)}. {fix}"
                )

    def _say_plan(self) -> None:
        made = len(self.log.live)
        say(f"Chain:   {self.workdir}, head {self.log.label(self.log.head)}")
        for i, link in enumerate(self.stages):
            say(
                f"         {link.name}: {data_text(self._data(link))}, "
                f"{self.measures.records(link.name)} records, "
                + (f"link {self.log.live[i]}" if i < made else "to be made")
            )


def _check_settings(settings: Settings) -> None:
    """Raise ValueError for settings with which no chain can be made."""
    if not settings.model.source:
        raise ValueError(
            "No model given. Set --model.source to a Hugging Face folder, a .gguf file, or "
            "'smollm2'."
        )
    if settings.export.dtype != "keep":
        raise ValueError(
            f"export.dtype is {settings.export.dtype}, and a chain is kept as patch files, which "
            "hold differences "
            "of bits. Set --export.dtype=keep; where updates are lost in bfloat16, also "
            "--export.rounding="
            "stochastic, or convert the model first: python -m launch.convert --source=hf:DIR "
            "--target=hf:DIR2 "
            "--dtype=float32."
        )
    if settings.data.category:
        raise ValueError(
            f"data.category is {settings.data.category!r}, and --stages gives each link its own. "
            "Leave it out."
        )


def _agree(settings: Settings, given: Mapping[str, Any]) -> None:
    """Refuse processes that would not do the same work; see `Chain._check_data` for the data."""
    if not processes.several():
        return
    cache = str(pathlib.Path(settings.run.cache_dir).expanduser().absolute())
    processes.agree(
        settings.flat() | {"run.cache_dir": cache} | given,
        "Start every process with the same command, in the same folder.",
    )
    processes.agree_on_devices()
    processes.agree(
        {f"version of {name}": version for name, version in versions().items()},
        "Install the same packages on every host.",
    )
    processes.agree(source_facts(Place.parse(settings.model.source)), _SAME_FILES)


def _refuse_strangers(workdir: pathlib.Path) -> None:
    """Raise ValueError if a folder without a log holds what no chain has put there."""
    if not workdir.is_dir() or (workdir / LOG).is_file():
        return
    ours = (
        LINKS,
        METHODS_DIR,
        MEASURES,
        START_DIR.format("*"),
        files.LOCK,
        environment.FILE,
        "*.partial",
    )
    if strange := sorted(
        p.name for p in workdir.iterdir() if not any(fnmatch.fnmatch(p.name, name) for name in ours)
    ):
        raise ValueError(
            f"{workdir} has no {LOG} and holds files that are not of a chain "
            f"({some(strange, ', ')}). Use a new or "
            "empty --workdir."
        )


def _delete_leftovers(log: PatchLog, keep: str) -> None:
    """Delete link folders that an interrupted run began and that no longer belong to the chain:
    they hold derived models."""
    known = {log.label(number) for number in log.links} | {keep}
    for path in sorted((log.workdir / LINKS).glob("[0-9][0-9]*-*")):
        if path.is_dir() and not path.is_symlink() and path.name not in known:
            say(f"{path.name}: begun, and no longer asked for; deleted")
            shutil.rmtree(path)


def _refuse_unpatchable(folder: pathlib.Path) -> None:
    """Raise ValueError unless the starting model is stored as links are: safetensors, of each
    tensor one, in known dtypes."""
    checkpoint = Checkpoint(folder)
    names = set(param_table(read_hf_config(folder)).hf_names())
    problems = (
        [] if checkpoint.layout in (SINGLE, INDEX) else [f"its weights are {checkpoint.layout}"]
    )
    problems += [
        f"{name} is a copy or a buffer" for name in checkpoint.tensors if name not in names
    ]
    problems += [
        f"{name} is {x.dtype}" for name, x in checkpoint.tensors.items() if x.dtype not in BITS
    ]
    if problems:
        raise ValueError(
            f"{folder} cannot begin a chain: {some(problems)}. Convert it first and give the "
            "result as "
            f"--model.source: python -m launch.convert --source=hf:{folder} --target=hf:DIR."
        )


def _told(settings: Settings) -> dict[str, Any]:
    return {k: v for k, v in settings.flat().items() if not k.startswith(PLACE)}
