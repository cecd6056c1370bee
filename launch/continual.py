"""Patch a model again and again, as harm categories arrive: a chain of links with a log of their
patches.

  python -m launch.continual run --config=configs/demo.py --workdir=runs/chain \\
      --links='privacy;harassment'
  # Weeks later: one more link, and gradient ascent to compare with.
  python -m launch.continual run --config=configs/demo.py --workdir=runs/chain \\
      --links='privacy;harassment;fraud=fraud.csv' --methods=safepatching,ga
  # A link that would make the model worse than rules allow is refused.
  python -m launch.continual run --config=configs/demo.py --workdir=runs/gated \\
      --links='privacy;harassment' --gate=configs/gate.toml
  python -m launch.continual log --workdir=runs/chain
  # A line of the log and its patch file.
  python -m launch.continual show N --workdir=runs/chain
  # The difference of two models, from patch files alone.
  python -m launch.continual diff N M --workdir=runs/chain
  python -m launch.continual replay --workdir=runs/chain --to=N [--from=M] --model=DIR --out=NEW_DIR
  python -m launch.continual revert --workdir=runs/chain --last=K
  # Take out link N alone; the links after it stay.
  python -m launch.continual remove N --workdir=runs/chain [--overlap=later]
  python -m launch.continual verify --workdir=runs/chain

Each link is a whole run of launch.safepatch that starts from the model of the link before; its
folder is WORKDIR/links/NN-NAME, with its own report. --links lists all links of the chain in
order, separated by ';':
  NAME             the records of data.harmful whose category is NAME
  NAME=cat:A+B     those of category A or B; also for a category whose name has signs other than
                   letters, digits, '_', '.' and '-'
  NAME=SOURCE      another data set, given as for --data.harmful
Links that are in the log are not made again; those that --links adds at the end are. To change
one, revert it first. With --align.enabled the starting model is aligned once, on all of
data.harmful, and written to WORKDIR/start-HASH.

After each link harm is measured on every category of --links, also on those of later links, and
over-refusal and utility, always on the same records; the starting model is row 0.
WORKDIR/continual.md, .json and .png have the forgetting matrix. Models of other methods (--methods)
are made beside the chain, measured and deleted.

The model of the last link stays as a folder, those before it as patch files alone, from which they
are built again where one is needed; --keep_models=K keeps those of the last K links, 0 all. A new
entry of --links is measured on earlier models too; --measure_on=own spares that, for long chains.

With --gate=FILE (rules as of launch.gate) each link is first compared with the model before it on
these records; one that is refused leaves the chain as it was, and the next entry goes on from
there. Without --gate all are added.

Model 0 is the starting model. revert moves the head back and deletes nothing; the next run
continues from there with new numbers. remove takes a link out of the middle: the links after it are
written anew, under new numbers, for the models without it. Where they change entries that it
changed, it is refused; --overlap says what to do with these. replay builds the model of link N from
that of link M (0 by default), forwards or backwards, bit for bit, and compares the result with the
log. Settings (--config, --patch.beta=2, ...) belong to run only. A command that was killed is
finished when it is given again. docs/continual.md has the format. Exit code 0: done; 2: a mistake,
with one line that names it.
"""

from types import ModuleType
from typing import Any

from absl import flags

from launch import distributed, kinds, main
from launch import flags as settings_flags
from safepatch_jax.runtime import addresses
from safepatch_jax.runtime.console import say

_WORKDIR = kinds.path("workdir", None, "Folder of the chain; run makes it.", required=True)
_LINKS = flags.DEFINE_string(
    "links", None, "All links of the chain: NAME;NAME=cat:A+B;NAME=SOURCE; run."
)
flags.DEFINE_alias("stages", "links")  # its name before
_METHODS = flags.DEFINE_string(
    "methods",
    None,
    "What is run: safepatching (always), and methods of launch.compare that change the weights "
    "(ga, npo, ties, ...), separated by commas; run.",
)
_GATE = kinds.path(
    "gate", None, "A file of rules: a link that they refuse is not added; docs/gate.md; run."
)
_KEEP = flags.DEFINE_integer(
    "keep_models",
    None,
    "The models of so many links, the last, stay as folders, 1 if left out; 0: of all; run.",
    lower_bound=0,
)
_MEASURE = flags.DEFINE_enum(
    "measure_on",
    None,
    ["all", "own"],
    "On which categories models are measured: all of --links (if left out); or own: each on its "
    "link's and the next link's, the starting model and the head on all; run.",
)
_TO = flags.DEFINE_integer("to", None, "Number of the link whose model is built; replay.")
_FROM = flags.DEFINE_integer(
    "from", None, "Number of the link whose model is given, 0 if left out; replay."
)
_MODEL = kinds.path("model", None, "The model that is given: a folder or org/name; replay.")
_OUT = kinds.path("out", None, "A new folder; replay.")
_LAST = flags.DEFINE_integer("last", None, "How many links are taken off; revert.")
_OVERLAP = flags.DEFINE_enum(
    "overlap",
    None,
    ["refuse", "later", "change"],
    "What becomes of entries that the link and later ones have changed. refuse, the default: "
    "nothing is removed; later: they keep the later link's value; change: they are changed by as "
    "much as the later link has changed them, rounded; remove.",
)
flags.adopt_module_key_flags(settings_flags)
flags.adopt_module_key_flags(distributed)


def _run(
    links: str, methods: str | None, gate: str | None, keep: int | None, measure: str | None
) -> None:
    distributed.join()
    # Imported here: the other commands do not need JAX.
    from safepatch_jax.studies.continual import study as continual
    from safepatch_jax.studies.continual.links import parse_links
    from safepatch_jax.studies.continual.methods import parse_methods

    report = continual.run(
        settings_flags.read_settings(),
        _WORKDIR.value,
        parse_links(links),
        parse_methods(methods or ""),
        main.words(),
        gate or "",
        1 if keep is None else keep,
        measure or "all",
    )
    log = _log()
    say(f"Report: {report}")
    say(f"Head:   {log.label(log.head)}, {log.folder(log.head)}")


def _lines(name: str):
    def run(*numbers: int) -> None:
        describe = getattr(_commands(), name)
        with addresses.copies_apart():  # a run of this machine may be at work with its own
            for line in describe(_log(), *numbers):
                say(line)

    return run


def _replay(to: int, start: int | None, model: str, out: str) -> None:
    from safepatch_jax.io import hub
    from safepatch_jax.patch_file.log_lines import START

    with addresses.copies_apart():
        folder = hub.folder_of(model)
        for line in _commands().replay(_log(), to, start or START, folder, out):
            say(line)
    say(f"{out} is the model of link {to}, as the log has it.")


def _revert(last: int) -> None:
    log = _log()
    folder = _commands().revert(log, last)
    say(f"The head is {log.label(log.head)}: {folder}")


def _remove(number: int, overlap: str | None) -> None:
    from safepatch_jax.patch_file.removal import remove

    log = _log()
    folder = remove(log, number, overlap or "refuse")
    say(f"The head is {log.label(log.head)}: {folder}")


def _log() -> Any:
    from safepatch_jax.patch_file.log import PatchLog

    return PatchLog(_WORKDIR.value)


def _commands() -> ModuleType:
    """Return the module of the commands that read a chain; --help does not need it."""
    from safepatch_jax.patch_file import commands

    return commands


# How many numbers and which flags a command takes; a trailing ? marks one that may be left out.
_COMMANDS = {
    "run": (_run, 0, "links methods? gate? keep_models? measure_on?"),
    "log": (_lines("history"), 0, ""),
    "show": (_lines("show"), 1, ""),
    "diff": (_lines("differences"), 2, ""),
    "replay": (_replay, 0, "to from? model out"),
    "revert": (_revert, 0, "last"),
    "remove": (_remove, 1, "overlap?"),
    "verify": (_lines("verify"), 0, ""),
}
_FLAGS = {
    "links": _LINKS,
    "methods": _METHODS,
    "gate": _GATE,
    "keep_models": _KEEP,
    "measure_on": _MEASURE,
    "to": _TO,
    "from": _FROM,
    "model": _MODEL,
    "out": _OUT,
    "last": _LAST,
    "overlap": _OVERLAP,
}


def run(arguments: list[str]) -> None:
    words = ("number", "numbers")
    command, rest = main.command_of("continual", arguments, _COMMANDS, words, str.isdecimal)
    call, _, takes = _COMMANDS[command]
    stray = []
    if command != "run":
        # Flags of settings and processes would have no effect.
        for module in (settings_flags, distributed):
            keys = flags.FLAGS.get_key_flags_for_module(module)
            stray += [flag.name for flag in keys if flag.present]
    call(*map(int, rest), *main.command_values(command, takes, _FLAGS, stray))


if __name__ == "__main__":
    main.run(run, positional=True)
