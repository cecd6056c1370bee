"""SafePatching on LLaMA-2-7B-Chat (paper backbone).

  python -m launch.safepatch --config=configs/llama2_7b_chat.py --workdir=runs/llama2_7b_chat

Model: meta-llama/Llama-2-7b-chat-hf of the Hugging Face Hub (gated: accept its licence, then hf
auth login), or --model.source=DIR. Data: AdvBench, XSTest and Alpaca, fetched with their checksums,
or from --data.manual_dir=FILES; --data=ROLE:SOURCE names others. Add --dry_run to see the plan
first.

Hardware: v5e 4x4, v6e 2x4 or v5p 2x2x1 (docs/tpu.md), or 4 x H100 (docs/gpu.md): compiled for, not
run yet. Memory: 6.74e9 parameters; full fine-tuning holds 16 bytes for each (float32 weights,
gradients, two moments), 108 GB over all devices, plus activations. Scratch disk: 44 bytes for each,
296 GB, or 20, 135 GB, with --run.checkpoint_minutes=0.
Time: about an hour, most of it reading and writing checkpoints. An estimate from bytes and FLOPs:
not measured yet.
"""

from configs.common import paper_config

CONFIG = paper_config("meta-llama/Llama-2-7b-chat-hf", "llama2_7b")
