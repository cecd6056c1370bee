"""SafePatching on LLaMA-3-8B-Instruct (paper backbone); LLaMA-3.1-8B-Instruct works with the same
file.

  python -m launch.safepatch --config=configs/llama3_8b_instruct.py \\
      --workdir=runs/llama3_8b_instruct

Model: meta-llama/Meta-Llama-3-8B-Instruct of the Hugging Face Hub (gated: accept its licence, then
hf auth login), or --model.source=DIR. Data: AdvBench, XSTest and Alpaca, fetched with their
checksums, or from --data.manual_dir=FILES; --data=ROLE:SOURCE names others. Add --dry_run to see
the plan first.

Hardware: v5e 4x4, v6e 2x4 or v5p 2x2x1 (compiled for, docs/tpu.md; not run yet), or 4 x H100 by
arithmetic. Memory: 8.03e9 parameters; full fine-tuning holds 16 bytes for each (float32 weights,
gradients, two moments), 128 GB over all devices, plus activations. Scratch disk: 44 bytes for each,
353 GB, or 20, 161 GB, with --run.checkpoint_minutes=0.
Time: about an hour, most of it reading and writing checkpoints. An estimate from bytes and FLOPs:
not measured yet.
"""

from configs.common import paper_config

CONFIG = paper_config("meta-llama/Meta-Llama-3-8B-Instruct", "llama3_8b")
