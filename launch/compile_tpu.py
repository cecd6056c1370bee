"""Compile a run's programs for TPU chips without the chips: does it fit, what does it exchange,
what limits a step?

  python -m launch.compile_tpu --config=configs/llama2_7b_chat.py --topology=v5e:4x4 \\
      --mesh=data:1,fsdp:4,tensor:4
  python -m launch.compile_tpu --config=configs/llama3_70b_instruct.py --topology=v5p:4x4x4 \\
      --programs=train,patch
  python -m launch.compile_tpu --config=configs/llama2_7b_chat.py --topology=v5e:4x4 --suggest
  python -m launch.compile_tpu --config=configs/llama2_7b_chat.py --topology=v5e:4x4 \\
      --num_slices=2 --mesh=data:2,fsdp:-1

Needs no TPU and no model: the compiler comes with `pip install -e '.[tpu-aot]'`, the
architecture from the folder of --model.source or from --model.architecture, which the configs set.
Train step, scoring step, patch operation and decoding are compiled with the settings of the run;
every setting is a flag as in launch.safepatch. For each: memory on a device against what the chip
has, FLOPs, collectives with the bytes they move, and the roofline's least time with what limits it.
If a program does not fit, the nearest setting that does is searched and printed as flags. A 7B
model takes 2 to 5 minutes on 2 cores; --suggest, which tries meshes and rematerialisation, 5 to 15.

GPUs: launch.compile_gpu.

The compiler proves that the programs partition, compile and fit. It runs nothing: results and speed
are not examined. Exit code: 0 if everything fits, 3 if not; 2 for a mistake.
"""

import sys

from absl import flags

from launch import flags as settings_flags
from launch import kinds, main
from safepatch_jax.planning import PROGRAMS

_TOPOLOGY = flags.DEFINE_string(
    "topology",
    None,
    "Chips: v4:2x2x2, v5e:4x4, v5p:2x2x2, v6e:2x4 ...; h100:1, a100-80:4 ...",
    required=True,
)
_NUM_SLICES = flags.DEFINE_integer(
    "num_slices", 1, "So many of that topology, joined by the data centre network."
)
_PROGRAMS = flags.DEFINE_list("programs", list(PROGRAMS), "Which programs to compile.")
_SUGGEST = flags.DEFINE_bool(
    "suggest", False, "Look for the mesh and model.remat with the shortest train step."
)
_REMEDY = flags.DEFINE_bool(
    "remedy", True, "Where the settings do not fit, look for the nearest that do."
)
_JSON = kinds.local("json", None, "Also write the figures to this file.")
flags.adopt_module_key_flags(settings_flags)


def run() -> None:
    from safepatch_jax.planning.plan import compile_run  # here: --help does not need JAX

    fits = compile_run(
        settings_flags.read_settings(),
        _TOPOLOGY.value,
        slices=_NUM_SLICES.value,
        kinds=_PROGRAMS.value,
        suggest=_SUGGEST.value,
        remedy=_REMEDY.value,
        json_path=_JSON.value,
    )
    sys.exit(0 if fits else 3)


if __name__ == "__main__":
    main.run(run)
