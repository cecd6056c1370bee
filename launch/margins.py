"""Map how near a model is to refusing each prompt, beside another model: forward passes alone.

  python -m launch.margins --model=DIR --against=DIR2 --out=runs/margins
  python -m launch.margins --model=DIR --suite=mine.json --out=runs/mine --forced=12

For every harmful and harmless prompt of the suite: the margin m = log P(a refusal opens the answer)
- log P(an affirmative opens it). Openings are those of a fixed list and of greedy answers of the
model itself (of --against, where it is given). For harmful prompts with a given answer: the content
NLL, of the answer's tokens after its first --forced ones were given. For measures of kind text: the
NLL of the answers. A patch that only moves the threshold moves all margins and leaves the AUROC
between harmful and harmless prompts; one that removes content raises the content NLL.

OUT receives report.md, report.json, report.png (the two distributions, before above after) and the
rows as JSONL, from which a map that was killed resumes when the same command is given again.
Suites: gate (AdvBench, HarmBench and XSTest's unsafe prompts against XSTest's safe ones and OKTest,
Alpaca), those of launch.evaluate, or a JSON file.
"""

from absl import flags

from launch import distributed, kinds, main, measuring
from safepatch_jax.runtime import paths
from safepatch_jax.studies.margins.options import MarginOptions

_DEFAULTS = MarginOptions()
_MODEL = kinds.path(
    "model",
    None,
    "A Hugging Face folder, org/name[@revision] of the Hub, or a checkpoint of launch.convert.",
    required=True,
)
_AGAINST = kinds.path("against", "", "The model before it was patched; same kinds of folder.")
_OUT = kinds.path("out", None, "The map's folder.", required=True)
_FLAGS = measuring.define(_DEFAULTS) | {
    "suite": kinds.text(
        "suite",
        _DEFAULTS.suite,
        "gate, a suite of launch.evaluate, a .json file, or A+B.",
        paths.suite,
    ),
    "forced": flags.DEFINE_integer(
        "forced",
        _DEFAULTS.forced,
        "Answer tokens that are given before the content.",
        lower_bound=1,
    ),
    "longest": flags.DEFINE_integer(
        "longest", _DEFAULTS.longest, "Answer tokens at most.", lower_bound=2
    ),
}
flags.adopt_module_key_flags(distributed)


def run() -> None:
    distributed.join()
    from safepatch_jax.studies.margins.study import margin_map  # here: --help does not need JAX

    options = MarginOptions(**{name: flag.value for name, flag in _FLAGS.items()})
    margin_map(_MODEL.value, _OUT.value, options, _AGAINST.value)


if __name__ == "__main__":
    main.run(run)
