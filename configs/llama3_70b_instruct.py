"""SafePatching on LLaMA-3-70B-Instruct; LLaMA-3.1-70B-Instruct works with the same file.

  python -m launch.safepatch --config=configs/llama3_70b_instruct.py \\
      --workdir=runs/llama3_70b_instruct

Model: meta-llama/Meta-Llama-3-70B-Instruct of the Hugging Face Hub (gated: accept its licence, then
hf auth login), or --model.source=DIR. Data: AdvBench, XSTest and Alpaca, fetched with their
checksums, or from --data.manual_dir=FILES; --data=ROLE:SOURCE names others. Add --dry_run to see
the plan first.

Hardware: v5p 4x4x4 or v4 4x4x4 (compiled for, docs/tpu.md; not run yet), or 32 x H100 by
arithmetic. Memory: 70.55e9 parameters; full fine-tuning holds 16 bytes for each (float32 weights,
gradients, two moments), 1129 GB over all devices, plus activations. Scratch disk: 44 bytes for
each, 3104 GB, or 20, 1411 GB, with --run.checkpoint_minutes=0. What a slice needs and has:
python -m launch.compile_tpu --config=configs/llama3_70b_instruct.py --topology=v5p:4x4x4
Time: several hours, most of it reading and writing checkpoints. An estimate from bytes and FLOPs:
not measured yet.
"""

from configs.common import paper_config

CONFIG = paper_config(
    "meta-llama/Meta-Llama-3-70B-Instruct",
    "llama3_70b",
    derive={"se_learning_rate": 1e-6, "osm_learning_rate": 3e-6},
)
