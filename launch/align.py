"""Align a chat model by a short supervised run on refusals and ordinary answers; write a Hugging
Face folder.

  python -m launch.align --model.source=smollm2 --out=models/smollm2-aligned
  python -m launch.align --model.source=DIR --out=DIR2 --align.steps=60 \\
      --data=harmful:pairs.csv,ordinary:alpaca.json

The result is the starting model of SafePatching: it refuses harmful requests, and some harmless
ones too. A harmful file may have a column 'refusal'; without it stock refusals are used.
"""

from absl import flags

from launch import distributed, kinds, main
from launch import flags as settings_flags
from safepatch_jax.runtime.console import say

_OUT = kinds.path("out", None, "New folder for the aligned model.", required=True)
flags.adopt_module_key_flags(settings_flags)
flags.adopt_module_key_flags(distributed)


def run() -> None:
    distributed.join()
    from safepatch_jax.run.job import align_model  # here: --help does not need it

    align_model(settings_flags.read_settings(), _OUT.value)
    say(f"Aligned model: {_OUT.value}")


if __name__ == "__main__":
    main.run(run)
