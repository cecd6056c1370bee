"""safepatch: the launchers as one command.

  safepatch run --config=demo --workdir=runs/demo
  safepatch patch apply --patch=FILE --model=DIR
  safepatch evaluate --help        # the manual of a sub-command
  safepatch completion bash        # a script that completes sub-commands and flags

Each sub-command is also a program of its own: `safepatch run` is `python -m launch.safepatch`.
"""

from __future__ import annotations

import importlib
import runpy
import signal
import sys
from typing import NoReturn

from launch import end_at_once, show
from safepatch_jax import __version__
from safepatch_jax.option import nearest

# Name, module of `launch`, and what it does.
_ROWS = (
    ("run", "safepatch", "derive, score, merge, export, evaluate: a whole run"),
    ("evaluate", "evaluate", "harm, over-refusal, utility of a model, beside another"),
    ("gate", "gate", "may a patched model go out? non-inferiority, for a CI"),
    ("patch", "patch", "make, inspect, apply, revert, combine patch files"),
    ("registry", "registry", "keep patches: add, sign, pull, apply, compare, remove"),
    ("sweep", "sweep", "try patch settings without training again"),
    ("durability", "durability", "what is left of a patch after quantisation, casts, tuning"),
    ("margins", "margins", "how near a model is to refusing, without answers"),
    ("slopes", "slopes", "the plane of alpha and beta"),
    ("compare", "compare", "SafePatching beside its rivals and ablations"),
    ("continual", "continual", "patch again as harm categories arrive"),
    ("merge", "merge", "merge folders or patch files on a small host"),
    ("convert", "convert", "Hugging Face, GGUF and orbax formats, with a certificate"),
    ("inspect", "inspect", "a model's parameter table"),
    ("align", "align", "teach refusals by a short supervised run"),
    ("push", "push", "a model, or a patch alone, to the Hugging Face Hub"),
    ("fit", "compile_tpu", "does a run fit on a TPU slice, or a card?"),
    ("compile-gpu", "compile_gpu", "does a run fit on GPUs, by their compiler?"),
    ("lm-eval", "lm_eval", "adapter to lm-evaluation-harness"),
)
MODULES = {name: f"launch.{module}" for name, module, _ in _ROWS}
_MISTAKE = 2  # exit code
_SCRIPTS = {
    # bash takes = for a word of its own: what follows it is a file.
    "bash": """_safepatch() {
  local word=${COMP_WORDS[COMP_CWORD]}
  [[ $word == = ]] && word=
  COMPREPLY=()
  if [[ ${COMP_WORDS[COMP_CWORD]} != = && ${COMP_WORDS[COMP_CWORD-1]} != = ]]; then
    COMPREPLY=($(safepatch --complete "${COMP_WORDS[@]:1:COMP_CWORD}"))
  fi
  [[ ${COMPREPLY-} == *= ]] && compopt -o nospace
  if [[ ${#COMPREPLY[@]} == 0 ]]; then COMPREPLY=($(compgen -f -- "$word")); fi
}
complete -F _safepatch safepatch
""",
    "zsh": """#compdef safepatch
_safepatch() {
  local -a matches
  matches=(${(f)"$(safepatch --complete "${(@)words[2,CURRENT]}")"})
  if (( ${#matches} )); then compadd -S '' -- $matches; else _files; fi
}
compdef _safepatch safepatch
""",
    "fish": """function __safepatch
  safepatch --complete (commandline -opc)[2..-1] (commandline -ct)
end
complete -c safepatch -a '(__safepatch)'
""",
}


def overview() -> str:
    """Return what `safepatch --help` prints."""
    width = max(len(name) for name, _, _ in _ROWS)
    lines = [f"  {name:{width}}  {does}" for name, _, does in _ROWS]
    return "\n".join([__doc__.strip(), "", "Sub-commands, each with --help:", *lines])


def matches(words: list[str]) -> list[str]:
    """Return what may stand in place of the last of some words after `safepatch`."""
    word = words[-1] if words else ""
    if len(words) <= 1:
        names = (*MODULES, "completion", "--help", "--version")
    elif words[0] in MODULES and word.startswith("-"):
        names = _flags_of(MODULES[words[0]])
    else:
        names = ()
    return [name for name in names if name.startswith(word)]


def _flags_of(module: str) -> list[str]:
    """Return a launcher's flags as they are begun, --name or --name= ."""
    from absl import flags

    importlib.import_module(module)
    names = ["--help", "--help_all"]
    for flag in flags.FLAGS.get_key_flags_for_module(module):
        names.append(f"--{flag.name}" if flag.boolean else f"--{flag.name}=")
    return sorted(names)


def main() -> None:
    """Run the sub-command that the first argument names."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_at_once)
    name, rest = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("--help", [])
    if name in MODULES:
        sys.argv = [f"safepatch {name}", *rest]
        runpy.run_module(MODULES[name], run_name="__main__", alter_sys=False)
    elif name in ("--help", "-h", "-help", "help"):
        show(overview())
    elif name == "--version":
        show(__version__)
    elif name == "--complete":
        show("\n".join(matches(rest)))
    elif name == "completion" and rest and rest[0] in _SCRIPTS:
        show(_SCRIPTS[rest[0]])
    elif name == "completion":
        _refuse(f"completion needs one of {', '.join(_SCRIPTS)}.")
    else:
        _refuse(f"there is no sub-command '{name}'{nearest(name, MODULES)}. See safepatch --help.")


def _refuse(problem: str) -> NoReturn:
    print(f"error: {problem}", file=sys.stderr)
    sys.exit(_MISTAKE)


if __name__ == "__main__":
    main()
