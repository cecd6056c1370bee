"""SafePatching on LLaMA-3-8B-Instruct

  python -m launch.safepatch --config=configs/llama3_8b_v5e_2x2.py --workdir=runs/llama3_8b_v5e_2x2

DIR is the Hugging Face folder of meta-llama/Meta-Llama-3-8B-Instruct
Hardware: Time:
"""

from configs.common import LAYERWISE, paper_config

CONFIG = paper_config("Meta-Llama-3-8B-Instruct", "llama3_8b", **LAYERWISE)
