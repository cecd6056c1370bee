"""SafePatching on Gemma-1.1-7B-it (paper backbone).

  python -m launch.safepatch --config=configs/gemma_1_1_7b_it.py --workdir=runs/gemma_1_1_7b_it

Model: google/gemma-1.1-7b-it of the Hugging Face Hub (gated: accept its licence, then hf auth
login), or --model.source=DIR. Data: AdvBench, XSTest and Alpaca, fetched with their checksums, or
from --data.manual_dir=FILES; --data=ROLE:SOURCE names others. Add --dry_run to see the plan first.

Hardware: v5e 4x4, v6e 2x4 or v5p 2x2x1 (compiled for, docs/tpu.md; not run yet), or 4 x H100 by
arithmetic. Memory: 8.54e9 parameters; full fine-tuning holds 16 bytes for each (float32 weights,
gradients, two moments), 137 GB over all devices, plus activations. Scratch disk: 44 bytes for each,
376 GB, or 20, 171 GB, with --run.checkpoint_minutes=0.
Time: about an hour, most of it reading and writing checkpoints. An estimate from bytes and FLOPs:
not measured yet. The vocabulary of 256,000 makes logits the largest activation, hence the smaller
batches.
"""

from configs.common import paper_config

CONFIG = paper_config(
    "google/gemma-1.1-7b-it", "gemma_1_1_7b", derive={"batch_size": 8}, evaluate={"batch_size": 16}
)
