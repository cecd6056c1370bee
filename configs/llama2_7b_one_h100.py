"""SafePatching on LLaMA-2-7B-Chat with one 80 GB GPU: block by block.

  python -m launch.safepatch --config=configs/llama2_7b_one_h100.py --workdir=runs/llama2_7b

Model: meta-llama/Llama-2-7b-chat-hf of the Hugging Face Hub (gated: accept its licence, then hf
auth login), or --model.source=DIR. Data: AdvBench, XSTest and Alpaca, fetched with their checksums,
or from --data.manual_dir=FILES; --data=ROLE:SOURCE names others. Add --dry_run to see the plan
first. Only the patch scope is trained, with Adafactor, and one block's gradient exists at a time.

Hardware: one H100 or A100 with 80 GB (docs/gpu.md; not run yet). Memory: of 6.74e9 parameters the
6.48e9 of the patch scope are float32 (26 GB), the others float16; what each program takes:
docs/gpu.md. Disk: 51.8 GB of scratch (derived models and scores, in bfloat16), with the result 65.8
GB; no checkpoint is written but at SIGTERM (26 GB, in a stage where there is room for it).
Time: not measured yet.
"""

from configs.common import LAYERWISE, paper_config

CONFIG = paper_config("meta-llama/Llama-2-7b-chat-hf", "llama2_7b", **LAYERWISE)
