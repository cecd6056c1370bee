"""Print a model's parameter table: shapes, logical axes, Hugging Face names, stored dtypes, and
what a patch may change.

  python -m launch.inspect --model=DIR
  python -m launch.inspect --model=DIR --scope=all_linear

DIR is a folder in Hugging Face format; config.json alone is enough. Nothing is loaded: the command
takes a second, also for a 70B model; of a model of the Hugging Face Hub (org/name) no weights are
fetched.
"""

from absl import flags

from launch import kinds, main
from safepatch_jax.runtime.console import say
from safepatch_jax.settings import declared_options

_MODEL = kinds.model(
    "model",
    None,
    "Model folder (hf:DIR or DIR), org/name[@revision] of the Hugging Face Hub, or a checkpoint of "
    "launch.convert (orbax:DIR).",
    required=True,
)
_SCOPE = flags.DEFINE_enum(
    "scope",
    "block_linear",
    list(declared_options()["patch.scope"].metadata["choices"]),
    "Which parameters count as patchable.",
)


def run() -> None:
    from safepatch_jax.run.convert import inspect_model  # here: --help does not need JAX

    for line in inspect_model(_MODEL.value, _SCOPE.value):
        say(line)


if __name__ == "__main__":
    main.run(run)
