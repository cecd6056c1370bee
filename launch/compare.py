"""Compare SafePatching with its rivals on one backbone, the same data and the same judge.

  python -m launch.compare --config=configs/compare_demo.py --methods=all --workdir=runs/compare
  python -m launch.compare --config=configs/compare_demo.py --methods=ga,npo,merging --workdir=runs/compare
  python -m launch.compare --config=configs/compare_real.py --methods=all --workdir=runs/real --data.manual_dir=FILES

Methods: backbone and safepatching (always), and
  training   ga (= the SE patch alone), ga_mismatch, npo, simnpo
  merging    average, task_arithmetic, ties, dare, dare_ties, resta, on the same two patches
  decoding   self_cd, rose, safe_decoding
  ablation   osm (the OSM patch alone), no_retention, intersection, union, random, magnitude,
  batched
by name or group; 'all' for all of them. Each seed derives and scores the two patches once, for all
methods.

A method takes its source's formula and weights, and the run's settings for the rest: SafePatching
those of --patch.*, training methods the steps, rate and ceiling of --derive.se_*. The config file
may hold COMPARE = {"suite": ..., "seeds": (0, 1, 2), "settings": {"ties": {"patch.density": 0.1}}}:
the five flags below count more than it, and settings of one method more than --derive.* and
--patch.*. docs/compare.md tells how each is defined, and how to add one.

Suites are those of launch.evaluate, with a measure of harm and one of over-refusal at least, and no
prompt that is trained on. A decoding method is measured on harm, over-refusal and MT-Bench. WORKDIR
receives compare.md, compare.json and compare.png, answers and verdicts. Killed, it goes on where it
stopped when the same command is given again; methods and seeds may be asked for one after another,
and the report has all methods that are there with each of the seeds. Models are deleted when all is
done (--run.keep_scratch keeps them).
"""

import sys

from absl import flags

from launch import distributed, main
from launch import flags as settings_flags
from launch import options as config_flags

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the comparison.", required=True)
_GIVEN = {
    "methods": flags.DEFINE_string(
        "methods", None, "Names or groups between commas, or 'all'; see above. ['all']"
    ),
    "suite": flags.DEFINE_string(
        "suite", None, "What is measured: a suite of launch.evaluate, or a .json file. ['quick']"
    ),
    "seeds": flags.DEFINE_string(
        "seeds", None, "Seeds of training, scores and retention, such as 0,1,2. ['0']"
    ),
    "judge": flags.DEFINE_string(
        "judge", None, "Whose verdicts the rates are, as in launch.evaluate. ['phrases']"
    ),
    "grader": flags.DEFINE_string("grader", None, "Who grades mt_bench: endpoint:URL?model=NAME."),
}
flags.adopt_module_key_flags(settings_flags)
flags.adopt_module_key_flags(distributed)


def run() -> None:
    distributed.join()
    # Imported here: --help does without JAX.
    from safepatch_jax.studies.compare.options import ComparisonOptions
    from safepatch_jax.studies.compare.study import compare

    options = ComparisonOptions()
    if config_flags.CONFIG.value:
        options = ComparisonOptions.load(config_flags.CONFIG.value)
    given = {name: flag.value for name, flag in _GIVEN.items() if flag.value is not None}
    settings = settings_flags.read_settings()
    compare(settings, _WORKDIR.value, options.replaced(given), sys.argv)


if __name__ == "__main__":
    main.run(run)
