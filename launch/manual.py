"""What --help prints: a launcher's manual, the flags that most need first, the others by group."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterable

from absl import flags

HELP, HELP_ALL = ("--help", "-h", "-help"), ("--help_all", "-help_all")
_WIDTH = 100
_FEW = 24  # with no more flags than that, all are shown
_HOSTS = "launch.distributed"
_FIRST = ("model.source",)  # of the settings, what every run needs
_GROUPS = {
    "": "This command",
    "hosts": "Several hosts",
    "align": "align: a short supervised run before patching",
    "data": "data: what is read, and how it is put to the model",
    "derive": "derive: training of the two patches",
    "evaluate": "evaluate: what the report measures",
    "finetune": "finetune: benign fine-tuning",
    "export": "export: the result's files",
    "mesh": "mesh: devices",
    "model": "model: the backbone, and how it is run",
    "patch": "patch: which entries are kept, and how they are merged",
    "run": "run: seed, folders, checkpoints",
    "score": "score: importance of the patches' entries",
}


def asked_for(argv: list[str]) -> str | None:
    """Return 'help' or 'help_all' where the arguments ask for it."""
    for argument in argv[1:]:
        if argument == "--":
            return None
        if argument in HELP_ALL:
            return "help_all"
        if argument in HELP:
            return "help"
    return None


def text(doc: str, everything: bool) -> str:
    """Return the manual of the launcher that runs.

    Args:
      doc: its docstring.
      everything: all flags; else those that most need, and how many the other groups have.
    """
    groups = by_group(key_flags())
    everything = everything or sum(map(len, groups.values())) <= _FEW
    first = groups.pop("", [])
    parts = [doc.strip(), _section("", first)]
    for name in sorted(groups, key=lambda name: (name != "hosts", name)):
        if everything:
            parts.append(_section(name, groups[name]))
    if not everything:
        lines = [f"  {_title(name)} ({len(groups[name])} flags)" for name in sorted(groups)]
        parts.append("\n".join(["More settings, shown by --help_all:", *lines]))
    return "\n\n".join(parts)


def key_flags() -> list[flags.Flag]:
    """Return the flags of the launcher that runs, and of the modules that it adopts."""
    return flags.FLAGS.get_key_flags_for_module(sys.argv[0])


def by_group(listed: Iterable[flags.Flag]) -> dict[str, list[flags.Flag]]:
    """Return flags by group, '' for those that most need."""
    hosts = {flag.name for flag in flags.FLAGS.flags_by_module_dict().get(_HOSTS, ())}
    groups: dict[str, list[flags.Flag]] = {}
    for flag in listed:
        group, dot, _ = flag.name.partition(".")
        if flag.name in hosts:
            group = "hosts"
        elif not dot or flag.name in _FIRST:
            group = ""
        groups.setdefault(group, []).append(flag)
    return groups


def _title(group: str) -> str:
    return _GROUPS.get(group, group)


def _section(group: str, listed: list[flags.Flag]) -> str:
    return "\n".join([f"{_title(group)}:", *map(_entry, listed)])


def _entry(flag: flags.Flag) -> str:
    head = f"  --{flag.name}"
    if flag.boolean:
        head = f"  --[no]{flag.name}"
    elif isinstance(flag.parser, flags.EnumParser):
        head += f"={'|'.join(flag.parser.enum_values)}"
    words = flag.help.strip()
    if isinstance(flag.parser, flags.EnumParser):  # absl repeats the choices there
        words = words.partition(">: ")[2] or words
    if flag.default not in (None, "", [], False):
        words += f" [{flag.default_as_str.strip(chr(39))}]"
    words = words.removesuffix(" ['']")
    return "\n".join([head, *textwrap.wrap(words, _WIDTH - 6, **_INDENT)])


_INDENT = {"initial_indent": " " * 6, "subsequent_indent": " " * 6}
