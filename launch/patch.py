"""Make a patch file, inspect it, apply it to a model folder and revert it.

  # The patch that turns DIR into DIR2.
  python -m launch.patch create --base=DIR --model=DIR2 --patch=FILE
  python -m launch.patch inspect --patch=FILE
  # Is it the backbone, the patched model, something between, or another model?
  python -m launch.patch verify --patch=FILE --model=DIR
  # In place without --out.
  python -m launch.patch apply --patch=FILE --model=DIR [--out=NEW_DIR]
  python -m launch.patch revert --patch=FILE --model=DIR [--out=NEW_DIR]
  python -m launch.patch scale --patch=FILE --model=DIR --factor=0.5 --out=NEW_FILE
  python -m launch.patch combine --patches=FILE,FILE2 --model=DIR --out=NEW_FILE
  # As inference servers take it (disk-delta or sparse-safetensors), and back; docs/hot_patch.md.
  python -m launch.patch convert --patch=FILE --to=FORMAT --model=DIR --out=NEW [--reverse]
  python -m launch.patch convert --patch=UPDATE --from=FORMAT --model=DIR --out=NEW_FILE

A patch file has the positions and bits in which a patched model differs from its backbone, and the
SHA-256 of every tensor before and after. Applying is exact, reverting restores the backbone's bits,
and another backbone is refused with the names of the tensors that differ. Neither needs JAX; memory
holds a few megabytes, whatever the model's size.

In place, weight files are written beside the old ones and renamed, so there must be room for the
largest of them. Killed at any moment, the folder has every tensor as before or as after: the same
command again finishes, the other one of apply and revert undoes; until then unfinished_patch.json
is there, and every other command refuses the folder. certificate.json is removed from a folder that
is changed in place; README.md stays as it is.

docs/patch_file.md has the format. Exit code 0: done; 2: a mistake, with one line that names it.
verify also ends with 2 for a folder that is neither the backbone nor the patched model.
"""

from collections import Counter
from types import ModuleType
from typing import Any

from absl import flags

from launch import kinds, main
from safepatch_jax.runtime import addresses, paths
from safepatch_jax.runtime.console import say, some

_PATCH = kinds.path("patch", None, "The patch file.")
_PATCHES = kinds.several(
    "patches", None, "Patch files of one backbone, separated by commas; combine."
)
_MODEL = kinds.path(
    "model",
    None,
    "Model folder in Hugging Face format, or org/name[@revision]; with create the patched one.",
)
_BASE = kinds.path("base", None, "The backbone's folder, or org/name[@revision]; create.")
_OUT = kinds.path("out", None, "A new folder (apply, revert) or a new patch file (scale, combine).")
_TO = flags.DEFINE_string("to", None, "disk-delta or sparse-safetensors; convert.")
_FROM = flags.DEFINE_string("from", None, "The format that --patch is in; convert.")
_REVERSE = flags.DEFINE_boolean(
    "reverse", None, "The way back, from the patched model to the backbone; convert --to."
)
_FACTOR = flags.DEFINE_float(
    "factor", None, "By what the change of each entry is multiplied; scale."
)


# What reads files is imported by the commands: --help does not need it.
def _hub() -> ModuleType:
    """Return the module that finds models."""
    from safepatch_jax.io import hub

    return hub


def _create(base: str, model: str, patch: str) -> None:
    from safepatch_jax.patch_file.create import create

    folder = _hub().folder_of(base)
    origin = _hub().origin_of(folder)
    about = {"source": origin} if origin else None
    _say_written(create(folder, _hub().folder_of(model), paths.local(patch), about))


def _inspect(patch: str) -> None:
    from safepatch_jax.patch_file.file import inspect

    for line in inspect(patch):
        say(line)


def _verify(patch: str, model: str) -> None:
    from safepatch_jax.patch_file.apply import verify

    states = verify(patch, _hub().folder_of(model))
    count = Counter(states.values())
    text = (
        f"{count['before']} tensors as in the backbone, {count['after']} as patched, "
        f"{count['same']} that the patch leaves alone"
    )
    if count["neither"]:
        strangers = some(sorted(name for name, state in states.items() if state == "neither"), ", ")
        raise ValueError(
            f"{model} is another model: {text}, {count['neither']} neither: {strangers}."
        )
    if count["before"] and count["after"]:
        raise ValueError(f"{model} is between the two: {text}. apply finishes, revert undoes.")
    state = "backbone" if count["before"] else "patched model"
    say(f"{model} is the {state}: {text}.")


def _move(verb: str):
    def run(patch: str, model: str, out: str | None) -> None:
        from safepatch_jax.patch_file import apply

        if out is None and addresses.is_address(model):
            raise ValueError(
                f"'{model}' lies in a bucket, where a file is not changed in place: give a new "
                "folder with --out."
            )
        if out is None and _hub().named(model):
            raise ValueError(
                f"'{model}' is no folder here, and a model of the Hugging Face Hub is not changed "
                "in place: give a new folder with --out."
            )
        place = None if out is None else paths.local(out)
        outcome = getattr(apply, verb)(patch, _hub().folder_of(model), place)
        text = f"{outcome.folder}: {len(outcome.moved)} tensors changed"
        if outcome.already:
            text += f", {len(outcome.already)} were so already"
        if outcome.removed:
            text += f"; removed {', '.join(outcome.removed)}, which was about other bits"
        say(text)

    return run


def _scale(patch: str, model: str, factor: float, out: str) -> None:
    from safepatch_jax.patch_file.arithmetic import scale

    _say_written(scale(patch, _hub().folder_of(model), factor, paths.local(out)))


def _combine(patches: list[str], model: str, out: str) -> None:
    from safepatch_jax.patch_file.arithmetic import combine

    _say_written(combine(patches, _hub().folder_of(model), paths.local(out)))


def _convert(
    patch: str, model: str, to: str | None, origin: str | None, reverse: bool | None, out: str
) -> None:
    from safepatch_jax.patch_file import convert

    if (to is None) == (origin is None) or (reverse and not to):
        raise ValueError("convert takes one of --to and --from, and --reverse with --to alone.")
    folder, place = _hub().folder_of(model), paths.local(out)
    if to is not None:
        say(convert.write_format(patch, to, folder, place, bool(reverse)))
    else:
        _say_written(convert.read_format(patch, origin, folder, place))


def _say_written(patch: Any) -> None:
    size = patch.path.stat().st_size
    say(
        f"{patch.path}: {patch.entries():,} entries in {len(patch.changed())} tensors, {size:,} "
        f"bytes, {size / patch.entries():.2f} an entry"
    )


# Which flags a command takes; a trailing ? marks one that may be left out.
_COMMANDS = {
    "create": (_create, "base model patch"),
    "inspect": (_inspect, "patch"),
    "verify": (_verify, "patch model"),
    "apply": (_move("apply"), "patch model out?"),
    "revert": (_move("revert"), "patch model out?"),
    "scale": (_scale, "patch model factor out"),
    "combine": (_combine, "patches model out"),
    "convert": (_convert, "patch model to? from? reverse? out"),
}
_FLAGS = {
    "patch": _PATCH,
    "patches": _PATCHES,
    "model": _MODEL,
    "base": _BASE,
    "out": _OUT,
    "factor": _FACTOR,
    "to": _TO,
    "from": _FROM,
    "reverse": _REVERSE,
}


def run(arguments: list[str]) -> None:
    if len(arguments) != 1 or arguments[0] not in _COMMANDS:
        problem = f"got {' '.join(arguments)}" if arguments else "none was given"
        raise ValueError(
            f"one command is needed, {problem}. There are {', '.join(_COMMANDS)}; see python -m "
            "launch.patch --help."
        )
    call, takes = _COMMANDS[arguments[0]]
    call(*main.command_values(arguments[0], takes, _FLAGS))


if __name__ == "__main__":
    main.run(run, positional=True)
