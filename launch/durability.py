"""Does a patch outlive what is done to models afterwards? Base and patched model are quantised,
cast, tuned further on ordinary answers, and measured again.

  python -m launch.durability --base=DIR --model=DIR2 --workdir=runs/durable
  python -m launch.durability --base=DIR --patch=FILE --workdir=runs/durable \\
      --data=harmful:advbench.csv,lookalike:xstest.csv,ordinary:alpaca.json
  python -m launch.durability --base=DIR --model=DIR2 --workdir=runs/durable --measure=both \\
      --treatments=int8,int4-g128-asym,finetune --finetune.steps=100

--base is the model before it was patched, the yardstick: what is left is the difference of the two
models, both treated alike. The patched model is --model, or --patch on the base, in memory; with
both, the patch file is checked against the two folders.

Treatments: int8 (a scale for each output channel), int4-g32 and int4-g128 (4 bits, a scale for 32
or 128 weights; any other number as well; int8-g128), round to nearest and symmetric, -asym behind
them for asymmetric; bf16, fp16 (casts of every tensor); finetune (benign fine-tuning on ordinary
answers with the train step of the patches). Quantisation takes the matrices of --patch.scope;
embeddings, norms and biases are kept.

--measure=margins (default): expected harm and over-refusal, margins, content NLL and NLL of
ordinary answers, by forward passes (see launch.margins); answers: greedy answers judged by phrases,
and the NLL; both.

WORKDIR receives durability.md, durability.json and durability.png: of each measure what is left of
the patch's effect, with intervals, and what is left of its entries. Treated models live in memory
alone, unless --keep is given. A study that was killed resumes when the same command is given again;
more treatments measure what is new. Settings are given by --config and flags, as for
launch.safepatch: data.*, evaluate.*, mesh.* and model.* count, and of derive.* how a step is taken
(train, backward, optimizer, accumulate, loss, clip_norm).
"""

from absl import flags

from launch import distributed, kinds, main, profiling
from launch import flags as settings_flags
from safepatch_jax.studies.durability.options import MEASURES, DurabilityOptions

_DEFAULTS = DurabilityOptions()
_BASE = kinds.model(
    "base",
    None,
    "The model before it was patched: as --model.source, whose place it takes.",
    required=True,
)
_MODEL = kinds.path(
    "model", "", "The patched model: a Hugging Face folder, or org/name[@revision] of the Hub."
)
_PATCH = kinds.path("patch", "", "The patch file that makes it of the base.")
_WORKDIR = kinds.local(
    "workdir", None, "Folder of this study; made if it is not there.", required=True
)
_FLAGS = {
    "measure": flags.DEFINE_enum(
        "measure", _DEFAULTS.measure, list(MEASURES), "What is measured; see above."
    ),
    "treatments": flags.DEFINE_list(
        "treatments", list(_DEFAULTS.treatments), "With commas between; see above."
    ),
    "keep": flags.DEFINE_bool(
        "keep", _DEFAULTS.keep, "Write the treated models into the workdir, as folders."
    ),
    "steps": flags.DEFINE_integer(
        "finetune.steps", _DEFAULTS.steps, "Steps of the benign fine-tuning."
    ),
    "learning_rate": flags.DEFINE_float(
        "finetune.learning_rate", _DEFAULTS.learning_rate, "Its learning rate."
    ),
    "batch_size": flags.DEFINE_integer(
        "finetune.batch_size", _DEFAULTS.batch_size, "Answers a step."
    ),
    "weight_decay": flags.DEFINE_float(
        "finetune.weight_decay", _DEFAULTS.weight_decay, "Decoupled weight decay."
    ),
    "seed": flags.DEFINE_integer(
        "finetune.seed", _DEFAULTS.seed, "Of the order of its batches, the same for both models."
    ),
}
flags.adopt_module_key_flags(settings_flags)
flags.adopt_module_key_flags(distributed)
flags.adopt_module_key_flags(profiling)


def run() -> None:
    distributed.join()
    values = {name: flag.value for name, flag in _FLAGS.items()}
    options = DurabilityOptions(**values | {"treatments": tuple(values["treatments"])})
    settings = settings_flags.read_settings().override({"model.source": _BASE.value}, "--base")
    from safepatch_jax.studies.durability.study import durability  # here: --help needs no JAX

    with profiling.traced():
        durability(settings, _WORKDIR.value, _MODEL.value, _PATCH.value, options, main.words())


if __name__ == "__main__":
    main.run(run)
