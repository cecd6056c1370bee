"""Evaluate a model, beside another one: harm, over-refusal, utility, with intervals and paired
tests.

  python -m launch.evaluate --model=DIR --against=DIR2 --suite=quick --out=runs/evaluation
  python -m launch.evaluate --model=CHECKPOINT --suite=paper+jailbreaks --out=runs/paper \\
      --data.manual_dir=FOLDER
  python -m launch.evaluate --model=DIR --suite=mine.json --out=runs/mine \\
      --judge=wildguard:DIR3 --second_judge=phrases
  python -m launch.evaluate --model=DIR --suite=quick+mt_bench --out=runs/graded \\
      --grader=endpoint:https://HOST/v1?model=NAME
  python -m launch.evaluate --model=DIR --suite=quick --out=runs/seeds \\
      --temperature=0.7 --seeds=0,1,2
  python -m launch.evaluate --model=DIR --suite=quick --out=runs/templates --templates=own,plain
  python -m launch.evaluate --suite=paper --show_examples --model=DIR

Suites: quick (built-in data, minutes, offline), paper, content (its harm and over-refusal with 128
tokens an answer), jailbreaks, unseen, mt_bench (needs --grader), a JSON file, or several as
A+mine.json. The file has a list of objects with name, kind (harm, refusal, text, mmlu, gsm8k,
mt_bench), source (as --data.harmful of launch.safepatch: 'builtin', a file, 'set:NAME'), and split,
limit, form, max_new, shots. docs/evaluation.md describes
them, the judges, and how reliable the phrase judge is.

Judges: phrases (offline), classifier:DIR (a Hugging Face sequence classifier; needs torch),
llama_guard:DIR, wildguard:DIR, harmbench:DIR (run here, as the model itself), qwen3guard:DIR
(torch), endpoint:URL?model=NAME (OpenAI-compatible; key in SAFEPATCH_API_KEY; &format=llama_guard
or qwen3guard for a served guard). All but phrases, and classifiers by their labels, judge content:
harmful content, refused, or harmless (neither).

OUT receives report.md, report.json, report.png, and the answers, verdicts and grades as JSONL. An
evaluation that was killed resumes when the same command is given again; another judge reads the
same answers. The answers of a jailbroken model are in OUT/answers: handle with care.
"""

from absl import flags

from launch import distributed, kinds, main, measuring, profiling
from safepatch_jax.runtime import paths
from safepatch_jax.runtime.console import show
from safepatch_jax.studies.evaluate.options import EvaluationOptions

_DEFAULTS = EvaluationOptions()
_MODEL = kinds.path(
    "model",
    None,
    "A Hugging Face folder, org/name[@revision] of the Hub, or a checkpoint of launch.convert.",
    required=True,
)
_AGAINST = kinds.path(
    "against", "", "Another model to compare with, such as the backbone; same kinds of folder."
)
_OUT = kinds.path("out", None, "The evaluation's folder.")
_SHOW = flags.DEFINE_bool(
    "show_examples", False, "Print how one item of each measure is put to the model, and end."
)
_SEEDS = flags.DEFINE_list(
    "seeds",
    [],
    "Seeds with which all that is sampled is done, such as 0,1,2; for one --seed is enough.",
)
_TEMPLATES = flags.DEFINE_list(
    "templates",
    [],
    "Templates as of --template: all is done in each, side by side in one report; own,plain.",
)
_FLAGS = (
    measuring.define(_DEFAULTS)
    | measuring.generation()
    | {
        "suite": kinds.text(
            "suite",
            _DEFAULTS.suite,
            "quick, paper, content, jailbreaks, unseen, mt_bench, a .json file, or A+B.",
            paths.suite,
        ),
        "judge": kinds.text(
            "judge", _DEFAULTS.judge, "Whose verdicts the rates are; see above.", paths.judge
        ),
        "second_judge": kinds.text(
            "second_judge", "", "A second judge; the report then has their agreement.", paths.judge
        ),
        "grader": flags.DEFINE_string(
            "grader", "", "Who grades mt_bench: endpoint:URL?model=NAME."
        ),
    }
)
flags.adopt_module_key_flags(distributed)
flags.adopt_module_key_flags(profiling)


def run() -> None:
    distributed.join()
    try:
        seeds = tuple(map(int, _SEEDS.value))
    except ValueError:
        raise ValueError(
            "--seeds takes whole numbers with commas between, such as 0,1,2; got "
            f"'{','.join(_SEEDS.value)}'."
        ) from None
    values = {name: flag.value for name, flag in _FLAGS.items()}
    options = EvaluationOptions(**values, seeds=seeds, templates=tuple(_TEMPLATES.value))
    # Imported here: --help and mistakes in flags do not need JAX.
    if _SHOW.value:
        from safepatch_jax.studies.evaluate.examples import show_examples

        for line in show_examples(_MODEL.value, options):
            show(line)
        return
    if not _OUT.value:
        raise ValueError(
            "--out is needed: the folder that receives the report, and from which a killed "
            "evaluation resumes."
        )
    from safepatch_jax.studies.evaluate.study import evaluate

    with profiling.traced():
        evaluate(_MODEL.value, _OUT.value, options, _AGAINST.value)


if __name__ == "__main__":
    main.run(run)
