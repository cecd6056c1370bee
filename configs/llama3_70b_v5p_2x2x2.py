"""SafePatching on LLaMA-3-70B-Instruct on eight v5p chips: block by block.

  python -m launch.safepatch --config=configs/llama3_70b_v5p_2x2x2.py --workdir=runs/llama3_70b

or on four H200, of which a run needs more than the 75 % that JAX takes of itself:

  XLA_CLIENT_MEM_FRACTION=0.80 python -m launch.safepatch \\
      --config=configs/llama3_70b_v5p_2x2x2.py --mesh=fsdp:4 --workdir=runs/llama3_70b

Model: meta-llama/Meta-Llama-3-70B-Instruct of the Hugging Face Hub (gated: accept its licence, then
hf auth login), or --model.source=DIR. Data: AdvBench, XSTest and Alpaca, fetched with their
checksums, or from --data.manual_dir=FILES; --data=ROLE:SOURCE names others. Add --dry_run to see
the plan first. Only the patch scope is trained, with Adafactor, and one block's gradient exists at
a time.

Hardware: v5p 2x2x2 (docs/fit.md), or 4 x H200 (docs/gpu.md): compiled for, not run yet. Memory: of
70.55e9 parameters the 68.45e9 of the patch scope are float32 (274 GB), the others bfloat16; what
each program takes: the same pages. Disk: 547.6 GB of scratch (derived models and scores, in
bfloat16), with the result 693.6 GB; no checkpoint is written but at SIGTERM (274 GB, in a stage
where there is room for it).
Time: not measured yet.
"""

from configs.common import LAYERWISE, paper_config

CONFIG = paper_config("meta-llama/Meta-Llama-3-70B-Instruct", "llama3_70b", **LAYERWISE)
CONFIG["derive"] |= {"se_learning_rate": 1e-6, "osm_learning_rate": 3e-6}
