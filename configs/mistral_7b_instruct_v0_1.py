"""SafePatching on Mistral-7B-Instruct-v0.1 (paper backbone); v0.2 and v0.3 work with the same file.

  python -m launch.safepatch --config=configs/mistral_7b_instruct_v0_1.py \\
      --workdir=runs/mistral_7b_instruct_v0_1

Model: mistralai/Mistral-7B-Instruct-v0.1 of the Hugging Face Hub (gated: accept its licence, then
hf auth login), or --model.source=DIR. Data: AdvBench, XSTest and Alpaca, fetched with their
checksums, or from --data.manual_dir=FILES; --data=ROLE:SOURCE names others. Add --dry_run to see
the plan first.

Hardware: v5e 4x4, v6e 2x4 or v5p 2x2x1 (compiled for, docs/tpu.md; not run yet), or 4 x H100 by
arithmetic. Memory: 7.24e9 parameters; full fine-tuning holds 16 bytes for each (float32 weights,
gradients, two moments), 116 GB over all devices, plus activations. Scratch disk: 44 bytes for each,
319 GB, or 20, 145 GB, with --run.checkpoint_minutes=0.
Time: about an hour, most of it reading and writing checkpoints. An estimate from bytes and FLOPs:
not measured yet. The sliding window of v0.1 (4096) is longer than any sequence here.
"""

from configs.common import paper_config

CONFIG = paper_config("mistralai/Mistral-7B-Instruct-v0.1", "mistral_7b_v0_1")
