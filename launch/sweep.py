"""Try patch settings on the search split, which no report uses; training and scores are done once
and reused.

  # All 9 combinations.
  python -m launch.sweep --config=configs/demo.py --workdir=runs/sweep \\
      --grid='patch.beta=1,2,3;patch.top_rate_osm=0.03,0.1,0.3'
  # One setting at a time.
  python -m launch.sweep --config=configs/demo.py --workdir=runs/sweep \\
      --around='patch.beta=1,2,3;patch.retention=0.1,0.3,1;patch.alpha=0,1'
  python -m launch.sweep --config=configs/demo.py --workdir=runs/sweep --dry_run \\
      --grid='patch.beta=2,3;run.seed=0,1,2' --grid='patch.merge=ties;patch.density=0.1,0.2'

--grid and --around may be given several times and together: the union of their points is tried,
each once. They take every patch.OPTION but patch.scope, and run.seed: there it is the seed of
random retention (and of stochastic rounding) only, while training and scores keep the run's
--run.seed. --around tries the config's own point, and those in which one setting has another of its
values. Every other setting is given by --config and flags, as for launch.safepatch.

A point is measured by margins (see launch.margins): the expected share of refusals on up to
--evaluate.margin_limit harmful and harmless prompts, AUROC between them, content NLL, perplexity,
all by forward passes. Only the models of the front, and the recommended one, write answers.
--measure=answers lets every point write and be judged instead.

Each point prints a line, with the remaining time, and is a row of WORKDIR/sweep.jsonl (patch
settings, seed, keys of what it was computed from, measures, seconds). A sweep that was killed
resumes when the same command is given again. At the end, over all rows of the same model, data,
training and scores:

  sweep.md                the recommended settings and why, the Pareto front, the spread over seeds,
                          the effect of each setting
  sweep.json              the same, for programs
  sweep.png               harm, over-refusal and perplexity of every choice
  sweep_sensitivity.png   the effect of each setting

Recommended is the least over-refusal among the choices with no more harm than the backbone and at
most 1.05 times its perplexity; if there is none, the report says so and names the least bad.
docs/sweep.md has the rule and how to read the pictures. The workdir keeps the derived models
(jailbroken or broken models), and the last lines say how to delete them. They also hold the command
of a run in the same workdir, which makes the recommended model and its report without training
again, and deletes the derived models at its end.
"""

import sys

from absl import flags

from launch import distributed, kinds, main, manual, profiling
from launch import flags as settings_flags
from safepatch_jax.runtime.console import say
from safepatch_jax.studies.sweep.points import MARGINS, MEASURES, design

_WORKDIR = kinds.path(
    "workdir", None, "Folder of this sweep; made if it is not there.", required=True
)
_GRID = flags.DEFINE_multi_string(
    "grid", [], "patch.OPTION=VALUE,VALUE;run.seed=VALUE,...: all combinations"
)
_AROUND = flags.DEFINE_multi_string(
    "around", [], "patch.OPTION=VALUE,VALUE;...: one setting at a time, the others as in the config"
)
_MEASURE = flags.DEFINE_enum(
    "measure",
    MARGINS,
    list(MEASURES),
    "margins: forward passes, and answers of the front alone; answers: every point answers.",
)
_DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "List the points, and which have a row already, and stop."
)
flags.adopt_module_key_flags(settings_flags)
flags.adopt_module_key_flags(distributed)
flags.adopt_module_key_flags(profiling)


# What a run has not, or has otherwise; the derived models are of no use once it is done.
_NOT_OF_RUNS = {holder.name for holder in (_GRID, _AROUND, _MEASURE, _DRY_RUN)}
_NOT_OF_RUNS |= {"profile", "run.keep_scratch"}


def _run_command() -> list[str]:
    """Return the words of a run with this sweep's workdir and settings."""
    words = ["python", "-m", "launch.safepatch"]
    if sys.argv[0].startswith(main.SUBCOMMAND):
        words = ["safepatch", "run"]
    for flag in manual.key_flags():
        if flag.present and flag.name not in _NOT_OF_RUNS:
            words.append(flag.serialize())
    return words


def run() -> None:
    if _DRY_RUN.value:
        from safepatch_jax.studies.sweep.plan import plan  # here: --help does not need it

        settings = settings_flags.read_settings()
        for line in plan(
            settings,
            _WORKDIR.value,
            design(settings, _GRID.value, _AROUND.value),
            _MEASURE.value,
        ):
            say(line)
        return
    distributed.join()
    from safepatch_jax.studies.sweep.study import sweep  # here: a plan does not need JAX

    settings = settings_flags.read_settings()
    points = design(settings, _GRID.value, _AROUND.value)
    with profiling.traced():
        report = sweep(
            settings, _WORKDIR.value, points, main.words(), _MEASURE.value, _run_command()
        )
    say(f"Report: {report}")


if __name__ == "__main__":
    main.run(run)
