"""SafePatching on LLaMA-2-13B-Chat

  python -m launch.safepatch --config=configs/llama2_13b_one_h200.py --workdir=runs/llama2_13b_one_h200

DIR is the Hugging Face folder of meta-llama/Llama-2-13b-chat-hf
Hardware: Time:
"""

from configs.common import LAYERWISE, paper_config

CONFIG = paper_config("Llama-2-13b-chat-hf", "llama2_13b", **LAYERWISE)
