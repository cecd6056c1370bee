"""Print a model's parameter table: shapes, logical axes, Hugging Face names, stored dtypes, and
what a patch may change. Or show the arrays of a run's stage, and compare them with another run's.

  python -m launch.inspect --model=DIR
  python -m launch.inspect --model=DIR --scope=all_linear
  python -m launch.inspect --workdir=RUN --stage=score_se
  python -m launch.inspect --workdir=RUN --stage=score_se --tensor=model.layers.0.mlp.up_proj.weight
  python -m launch.inspect --workdir=RUN --other=RUN2 --stage=score_se

DIR is a folder in Hugging Face format; config.json alone is enough. Nothing is loaded: the command
takes a second, also for a 70B model; of a model of the Hugging Face Hub (org/name) no weights are
fetched.

--stage reads derive_se, derive_osm (derived models, or with --derive.store=bfloat16 their deltas),
score_se, score_osm (sums of gradient magnitudes), patch, export, align (models) and patch_file
(which entries the patch changes, and how), and prints a SHA-256 for each tensor in the order of the
parameter table. With --other the two runs are compared bit for bit: the first tensor that differs
is described, and the exit code is 1; 0 where all are equal. Derived models and scores are there if
the run was given --run.keep_scratch, or did not end. It reads one parameter of each run at a time
and uses no accelerator.
"""

import os
import sys

from absl import flags

from launch import kinds, main
from safepatch_jax.runtime.console import say
from safepatch_jax.settings import declared_options

_DIFFERENT = 1  # exit code
_MODEL = kinds.model(
    "model",
    None,
    "Model folder (hf:DIR or DIR), org/name[@revision] of the Hugging Face Hub, or a checkpoint of "
    "launch.convert (orbax:DIR). With --workdir the run's backbone, where its workdir cannot tell.",
)
_SCOPE = flags.DEFINE_enum(
    "scope",
    "block_linear",
    list(declared_options()["patch.scope"].metadata["choices"]),
    "Which parameters count as patchable.",
)
_WORKDIR = kinds.path("workdir", None, "A run, finished or not, one of whose stages is shown.")
_STAGE = flags.DEFINE_string("stage", None, "Name of the stage, such as score_se.")
_TENSOR = flags.DEFINE_string(
    "tensor",
    "",
    "Name of a tensor (model.layers.0.mlp.up_proj.weight), or of a parameter of the table, all of "
    "whose layers are shown (layers/mlp/up); all tensors by default.",
)
_OTHER = kinds.path("other", "", "A second run, with which the stage is compared.")


def run() -> None:
    if _WORKDIR.value or _STAGE.value:
        _show_stage()
        return
    if _MODEL.value is None:
        raise ValueError("--model is needed, or --workdir and --stage. See --help.")
    if _OTHER.value or _TENSOR.value:
        raise ValueError("--other and --tensor go with --workdir and --stage. See --help.")
    from safepatch_jax.run.convert import inspect_model  # here: --help does not need JAX

    for line in inspect_model(_MODEL.value, _SCOPE.value):
        say(line)


def _show_stage() -> None:
    """Show or compare a stage; the exit code tells of differences."""
    if not (_WORKDIR.value and _STAGE.value):
        raise ValueError("--workdir and --stage go together. See --help.")
    # Before JAX is imported: a run may hold the accelerator.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from safepatch_jax.run.inspect_stage import inspect_stage

    model = _MODEL.value or ""
    equal = inspect_stage(
        _WORKDIR.value, _STAGE.value, tensor=_TENSOR.value, other=_OTHER.value, model=model
    )
    if not equal:
        sys.exit(_DIFFERENT)


if __name__ == "__main__":
    main.run(run)
