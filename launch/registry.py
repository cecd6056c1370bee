"""Keep patches in a registry, a folder or a bucket: who made them, on what, how they were measured.

  python -m launch.registry add --registry=REG --patch=FILE --name=NAME [--card=FILE] \\
      [--evaluation=FILE,FILE2] [--parent=NAME@HASH] [--sign=KEYFILE]
  python -m launch.registry list --registry=REG
  python -m launch.registry show NAME@HASH --registry=REG
  # All files, manifests and signatures; with --trust all must be signed by that key.
  python -m launch.registry verify --registry=REG [--trust=PUBKEY]
  # The patch file, with manifest, card and evaluations, into a new folder.
  python -m launch.registry pull NAME@HASH --registry=REG --out=NEW_DIR [--trust=PUBKEY]
  # In place without --out.
  python -m launch.registry apply NAME@HASH --registry=REG --model=DIR [--out=NEW_DIR] \\
      [--trust=PUBKEY]
  # Do two patches meet, and does their order matter? Without --registry A and B are patch files.
  python -m launch.registry conflicts A B --registry=REG [--model=DIR]
  # A patch is taken out; those that were made on it are written anew without it.
  python -m launch.registry remove NAME@HASH --registry=REG [--model=DIR] [--overlap=later] \\
      [--sign=KEYFILE]

A patch is named NAME@HASH, by its name and the SHA-256 of its file, of which 4 digits or more that
no other one begins with are enough; NAME alone where one patch has it. A registry is
REG/index.json and REG/patches/HASH/; REG may be gs://BUCKET/FOLDER or s3://BUCKET/FOLDER. Several
may write to it at once. A command that was killed is finished when it is given again.

A patch that goes onto what another one leaves has that one as its parent: together they are a line.
apply brings a model to the end of a line from any model on it. remove takes a patch out of the
middle: exactly, where later patches do not change what it changed; else it is refused, and
--overlap says what to do. --model is then any model of the line.

--sign takes an ed25519 private key (openssl genpkey -algorithm ed25519 -out key.pem), --trust the
public one (openssl pkey -in key.pem -pubout); both need pip install 'safepatch-jax[sign]'.
add --sign also signs a patch that is there without a signature. remove needs --sign where later
patches are signed: what that key has signed it signs again, the others lose their signatures.
docs/registry.md has what is promised. Exit code 0: done; 2: a mistake, with one line that names it.
"""

from types import ModuleType
from typing import Any

from absl import flags

from launch import kinds, main
from safepatch_jax.runtime import addresses, paths
from safepatch_jax.runtime.console import say

_REGISTRY = kinds.path("registry", None, "Folder or address of the registry; add makes it.")
_PATCH = kinds.path("patch", None, "The patch file; add.")
_NAME = flags.DEFINE_string("name", None, "Name of the patch; versions may share one; add.")
_PARENT = flags.DEFINE_string(
    "parent",
    None,
    "NAME@HASH of the patch that it goes onto, where several leave the model it is for; add.",
)
_CARD = kinds.path("card", None, "What the patch is, a Markdown file; add.")
_EVALUATION = kinds.several(
    "evaluation",
    None,
    "What it was measured to do: report.json of a run, gate.json, with commas between; add.",
)
_SIGN = kinds.path("sign", None, "File of an ed25519 private key; add, remove.")
_TRUST = kinds.path(
    "trust",
    None,
    "An ed25519 public key, its file or 64 hex digits: what it has not signed is refused; verify, "
    "pull, apply.",
)
_MODEL = kinds.path(
    "model", None, "A model folder or org/name[@revision]; apply, conflicts, remove."
)
_OUT = kinds.path("out", None, "A new folder; pull, apply.")
_OVERLAP = flags.DEFINE_enum(
    "overlap",
    None,
    ["refuse", "later", "change"],
    "What becomes of entries that the patch and later ones have changed. refuse, the default: "
    "nothing is removed; later: they keep the later patch's value; change: they are changed by as "
    "much as the later patch has changed them, rounded; remove.",
)


def _commands() -> ModuleType:
    """Return the module that reads registries; --help does not need it."""
    from safepatch_jax.registry import commands

    return commands


def _store(registry: str) -> Any:
    from safepatch_jax.registry.store import Store

    return Store(registry)


def _folder(model: str | None) -> str | None:
    from safepatch_jax.io import hub

    return None if model is None else hub.folder_of(model)


def _key(sign: str | None) -> Any:
    from safepatch_jax.registry import signing

    return None if sign is None else signing.private_key(sign)


def _trusted(trust: str | None) -> str:
    from safepatch_jax.registry import signing

    return "" if trust is None else signing.public_key(trust)


def _say(lines: list[str]) -> None:
    for line in lines:
        say(line)


def _add(
    registry: str,
    patch: str,
    name: str,
    parent: str | None,
    card: str | None,
    evaluation: list[str] | None,
    sign: str | None,
) -> None:
    from safepatch_jax.registry.changes import add

    key = _key(sign)
    label = add(_store(registry), patch, name, parent or "", card or "", evaluation or (), key)
    say(f"{label} is in {registry}.")


def _list(registry: str) -> None:
    _say(_commands().listed(_store(registry)))


def _show(reference: str, registry: str) -> None:
    _say(_commands().show(_store(registry), reference))


def _verify(registry: str, trust: str | None) -> None:
    _say(_commands().verify(_store(registry), trust=_trusted(trust)))


def _pull(reference: str, registry: str, out: str, trust: str | None) -> None:
    _say(_commands().pull(_store(registry), reference, paths.local(out), _trusted(trust)))


def _apply(reference: str, registry: str, model: str, out: str | None, trust: str | None) -> None:
    from safepatch_jax.io import hub

    if out is None and (addresses.is_address(model) or hub.named(model)):
        raise ValueError(
            f"'{model}' is no folder here, and is not changed in place: give a new folder with "
            "--out."
        )
    place = None if out is None else paths.local(out)
    store, trusted = _store(registry), _trusted(trust)
    _say(_commands().apply(store, reference, _folder(model), place, trusted))


def _conflicts(first: str, second: str, registry: str | None, model: str | None) -> None:
    store = None if registry is None else _store(registry)
    _say(_commands().compare(store, first, second, _folder(model)))


def _remove(
    reference: str, registry: str, model: str | None, overlap: str | None, sign: str | None
) -> None:
    from safepatch_jax.registry.changes import remove

    key = _key(sign)
    _say(remove(_store(registry), reference, _folder(model), overlap or "refuse", key))


# How many patches and which flags a command takes; a trailing ? marks one that may be left out.
_COMMANDS = {
    "add": (_add, 0, "registry patch name parent? card? evaluation? sign?"),
    "list": (_list, 0, "registry"),
    "show": (_show, 1, "registry"),
    "verify": (_verify, 0, "registry trust?"),
    "pull": (_pull, 1, "registry out trust?"),
    "apply": (_apply, 1, "registry model out? trust?"),
    "conflicts": (_conflicts, 2, "registry? model?"),
    "remove": (_remove, 1, "registry model? overlap? sign?"),
}
_FLAGS = {
    "registry": _REGISTRY,
    "patch": _PATCH,
    "name": _NAME,
    "parent": _PARENT,
    "card": _CARD,
    "evaluation": _EVALUATION,
    "sign": _SIGN,
    "trust": _TRUST,
    "model": _MODEL,
    "out": _OUT,
    "overlap": _OVERLAP,
}


def run(arguments: list[str]) -> None:
    words = ("patch", "patches")
    command, patches = main.command_of("registry", arguments, _COMMANDS, words)
    call, _, takes = _COMMANDS[command]
    call(*patches, *main.command_values(command, takes, _FLAGS))


if __name__ == "__main__":
    main.run(run, positional=True)
