"""May a patched model go out? Non-inferiority in harm, over-refusal and utility beside the model
that it is to replace, on the same prompts, until the answer is clear.

  python -m launch.gate --candidate=DIR --against=DIR2 --suite=quick
  python -m launch.gate --candidate=DIR --against=DIR2 --suite=mine.json --rules=mine.toml \\
      --out=gate
  # On answers that were given earlier: output folders of launch.evaluate.
  python -m launch.gate --candidate=runs/new --against=runs/old --suite=quick
  python -m launch.gate --candidate=runs/both --against=runs/both --suite=quick

Prompts are asked in a fixed shuffled order, in growing batches. After each batch every check of
the rules (configs/gate.toml without --rules) is looked at; it passes when the rise is shown to be
below its margin, and fails when it is shown to be above. The error rates hold however often one
looks. --against takes a model or stored answers; the same evaluation given twice compares its two
models. docs/gate.md has the method and the keys of the rules.

OUT (runs/gate-HASH without --out) receives gate.md, gate.json and gate.xml (JUnit), which name the
prompts whose outcome flipped, and the answers. A gate that was killed resumes when the same command
is given again. Exit code 0: pass; 3: fail; 4: not enough evidence (it says about how many prompts
more are needed); 2: a mistake, with one line that names it.
"""

from absl import flags

from launch import distributed, kinds, main, measuring, profiling
from safepatch_jax.runtime import paths
from safepatch_jax.studies.evaluate.options import EvaluationOptions

_DEFAULTS = EvaluationOptions()
_CANDIDATE = kinds.path(
    "candidate",
    None,
    "The patched model: a Hugging Face folder, org/name[@revision] of the Hub, a checkpoint of "
    "launch.convert; or the output folder of launch.evaluate.",
    required=True,
)
_AGAINST = kinds.path(
    "against", None, "The model that it is to replace; same kinds of folder.", required=True
)
_RULES = kinds.path(
    "rules", "", "A .toml or .json file of rules; default: configs/gate.toml. docs/gate.md."
)
_OUT = kinds.path("out", "", "The gate's folder; default: one in runs/, named after the inputs.")
_FLAGS = (
    measuring.define(_DEFAULTS)
    | measuring.generation()
    | {
        "suite": kinds.text(
            "suite",
            _DEFAULTS.suite,
            "As of launch.evaluate: a name, a .json file, or A+B.",
            paths.suite,
        ),
        "judge": kinds.text(
            "judge", _DEFAULTS.judge, "Whose verdicts count, as of launch.evaluate.", paths.judge
        ),
    }
)
flags.adopt_module_key_flags(distributed)
flags.adopt_module_key_flags(profiling)


def run() -> int:
    distributed.join()
    options = EvaluationOptions(**{name: flag.value for name, flag in _FLAGS.items()})
    # Imported here: --help and mistakes in flags do not need JAX.
    from safepatch_jax.studies.gate.study import gate

    with profiling.traced():
        content = gate(_CANDIDATE.value, _AGAINST.value, options, _RULES.value, _OUT.value)
    return content["exit_code"]


if __name__ == "__main__":
    main.run(run)
