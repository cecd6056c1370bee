"""Compare SafePatching with its rivals on one backbone, the same data and the same judge.

  python -m launch.compare --config=configs/compare_demo.py --methods=all --workdir=runs/compare
  python -m launch.compare --config=configs/compare_demo.py --methods=ga,npo,merging \\
      --workdir=runs/compare
  python -m launch.compare --config=configs/compare_real.py --methods=all --workdir=runs/real \\
      --data.manual_dir=FILES
  python -m launch.compare --config=configs/compare_llama2_7b.py --methods=all \\
      --workdir=runs/compare_llama2_7b --judge=classifier:judges/action-ro   # see docs/compare.md

Methods, by name or group ('all' for all of them); backbone and safepatching are always included:
  training   ga (= the SE patch alone), ga_mismatch, npo, simnpo
  merging    average, task_arithmetic, ties, dare, dare_ties, resta, on the same two patches
  decoding   self_cd, rose, safe_decoding
  ablation   osm (the OSM patch alone), no_retention, intersection, union, random, magnitude,
             batched
Each seed derives and scores the two patches once, for all methods.

A method uses its source's formula and weights, and the run's settings for the rest: SafePatching
those of --patch.*, training methods the steps, rate and ceiling of --derive.se_*. The config file
may have COMPARE = {"suite": ..., "seeds": (0, 1, 2), "settings": {"ties": {"patch.density": 0.1}}}:
the five flags below override it, and settings of one method override --derive.* and --patch.*.
docs/compare.md defines each method and shows how to add one.

Suites are those of launch.evaluate, with at least one measure of harm and one of over-refusal, and
no prompt of the training data. A decoding method is measured on harm, over-refusal and MT-Bench.
WORKDIR receives compare.md, compare.json and compare.png, answers and verdicts. A comparison that
was killed resumes when the same command is given again. Methods and seeds may be run one after
another; the report has every method that was measured with each of the seeds. Models are deleted at
the end (--run.keep_scratch keeps them).
"""

from absl import flags

from launch import distributed, kinds, main
from launch import flags as settings_flags
from launch import options as config_flags
from safepatch_jax.runtime import paths

_WORKDIR = kinds.local("workdir", None, "Folder of the comparison.", required=True)
_OPTIONS = {
    "methods": flags.DEFINE_string(
        "methods", None, "Names or groups between commas, or 'all'; see above. ['all']"
    ),
    "suite": kinds.text(
        "suite",
        None,
        "What is measured: a suite of launch.evaluate, or a .json file. ['quick']",
        paths.suite,
    ),
    "seeds": flags.DEFINE_string(
        "seeds", None, "Seeds of training, scores and retention, such as 0,1,2. ['0']"
    ),
    "judge": kinds.text(
        "judge",
        None,
        "Whose verdicts the rates are, as in launch.evaluate. ['phrases']",
        paths.judge,
    ),
    "grader": flags.DEFINE_string("grader", None, "Who grades mt_bench: endpoint:URL?model=NAME."),
}
flags.adopt_module_key_flags(settings_flags)
flags.adopt_module_key_flags(distributed)


def run() -> None:
    distributed.join()
    # Imported here: --help does not need JAX.
    from safepatch_jax.studies.compare.options import ComparisonOptions
    from safepatch_jax.studies.compare.study import compare

    options = ComparisonOptions()
    if config_flags.CONFIG.value:
        options = ComparisonOptions.load(config_flags.CONFIG.value)
    values = {name: flag.value for name, flag in _OPTIONS.items() if flag.value is not None}
    settings = settings_flags.read_settings()
    compare(settings, _WORKDIR.value, options.replaced(values), main.words())


if __name__ == "__main__":
    main.run(run)
