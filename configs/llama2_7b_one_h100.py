"""SafePatching on LLaMA-2-7B-Chat

  python -m launch.safepatch --config=configs/llama2_7b_one_h100.py --workdir=runs/llama2_7b_one_h100

DIR is the Hugging Face folder of meta-llama/Llama-2-7b-chat-hf
Hardware: Time:
"""

from configs.common import LAYERWISE, paper_config

CONFIG = paper_config("Llama-2-7b-chat-hf", "llama2_7b", **LAYERWISE)
