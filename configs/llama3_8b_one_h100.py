"""SafePatching on LLaMA-3-8B-Instruct with one 80 GB GPU: block by block.

  python -m launch.safepatch --config=configs/llama3_8b_one_h100.py --workdir=runs/llama3_8b

Model: meta-llama/Meta-Llama-3-8B-Instruct of the Hugging Face Hub (gated: accept its licence, then
hf auth login), or --model.source=DIR. Data: AdvBench, XSTest and Alpaca, fetched with their
checksums, or from --data.manual_dir=FILES; --data=ROLE:SOURCE names others. Add --dry_run to see
the plan first. Only the patch scope is trained, with Adafactor, and one block's gradient exists at
a time.

Hardware: one H100 or A100 with 80 GB (docs/gpu.md; not run yet). Memory: of 8.03e9 parameters the
6.98e9 of the patch scope are float32 (28 GB), the others bfloat16; what each program takes:
docs/gpu.md. Disk: 55.8 GB of scratch (derived models and scores, in bfloat16), with the result 72.4
GB; no checkpoint is written but at SIGTERM (28 GB, in a stage where there is room for it).
Time: not measured yet.
"""

from configs.common import LAYERWISE, paper_config

CONFIG = paper_config("meta-llama/Meta-Llama-3-8B-Instruct", "llama3_8b", **LAYERWISE)
