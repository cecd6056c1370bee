"""SafePatching on LLaMA-2-13B-Chat with one H200: block by block.

  python -m launch.safepatch --config=configs/llama2_13b_one_h200.py --workdir=runs/llama2_13b

Model: meta-llama/Llama-2-13b-chat-hf of the Hugging Face Hub (gated: accept its licence, then hf
auth login), or --model.source=DIR. Data: AdvBench, XSTest and Alpaca, fetched with their checksums,
or from --data.manual_dir=FILES; --data=ROLE:SOURCE names others. Add --dry_run to see the plan
first. Only the patch scope is trained, with Adafactor, and one block's gradient exists at a time.

Hardware: one H200 (docs/gpu.md; not run yet). Memory: of 13.02e9 parameters the 12.69e9 of the
patch scope are float32 (51 GB), the others float16; what each program takes: docs/gpu.md. Disk:
101.5 GB of scratch (derived models and scores, in bfloat16), with the result 128.4 GB; no
checkpoint is written but at SIGTERM (51 GB, in a stage where there is room for it).
Time: not measured yet.
"""

from configs.common import LAYERWISE, paper_config

CONFIG = paper_config("meta-llama/Llama-2-13b-chat-hf", "llama2_13b", **LAYERWISE)
CONFIG["derive"] |= {"se_learning_rate": 3e-6}
