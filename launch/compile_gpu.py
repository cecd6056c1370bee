"""Compile a run's programs for GPUs without the GPUs: does it fit a card, and JAX's share of it,
what does it exchange, what limits a step?

  python -m launch.compile_gpu --config=configs/llama2_7b_one_h100.py --topology=h100:1 \\
      --mesh=data:1
  python -m launch.compile_gpu --config=configs/llama3_70b_v5p_2x2x2.py --topology=h200:4 \\
      --mesh=fsdp:4
  python -m launch.compile_gpu --config=configs/llama2_7b_chat.py --topology=a100-80:8 --suggest

Needs no GPU and no model: the compiler, XLA's for CUDA, comes with `pip install -e '.[gpu-aot]'`
(1.5 GB). Cards: h100, h200, a100-40, a100-80, l4, one to eight of a host. Flags and figures are
those of launch.compile_tpu; memory is held against 92 % of the card, and a line says whether the
75 % that JAX takes of itself are enough, or what XLA_CLIENT_MEM_FRACTION must be. Without the
plugin CPU devices stand for the cards, and the first line says so: arrays are then the GPU's;
temporaries, kernels and collectives are not. A 7B model, block by block, takes about a minute on 2
cores.

The compiler runs nothing: results and speed are not examined, kernels are not tuned as on a GPU,
and what cuDNN takes beside its arguments is not counted. Exit code: 0 if everything fits, 3 if not;
2 for a mistake.
"""

from absl import flags

from launch import compile_tpu, main

flags.adopt_module_key_flags(compile_tpu)


def run() -> None:
    compile_tpu.run()


if __name__ == "__main__":
    main.run(run)
