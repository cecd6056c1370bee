"""SafePatching on LLaMA-3-70B-Instruct

  python -m launch.safepatch --config=configs/llama3_70b_v5p_2x2x1.py --workdir=runs/llama3_70b_v5p_2x2x1

DIR is the Hugging Face folder of meta-llama/Meta-Llama-3-70B-Instruct
Hardware: Time:
"""

from configs.common import LAYERWISE, paper_config

CONFIG = paper_config("Meta-Llama-3-70B-Instruct", "llama3_70b", **LAYERWISE)
