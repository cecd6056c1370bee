"""SafePatching on LLaMA-3-8B-Instruct with one 80 GB GPU: block by block.

  python -m launch.safepatch --config=configs/llama3_8b_one_h100.py \\
      --workdir=runs/llama3_8b --model.source=DIR \\
      --data=harmful:advbench.csv,lookalike:xstest.csv,ordinary:alpaca.json

DIR is the Hugging Face folder of meta-llama/Meta-Llama-3-8B-Instruct; add --dry_run to see the plan
first. As configs/llama3_8b_instruct.py, but only the patch scope is trained, with Adafactor, and
one block's gradient exists at a time.

Hardware: one H100 with 80 GB, or a larger card; not run yet. Memory: of 8.03e9 parameters the
6.98e9 of the patch scope are float32 (28 GB), the others bfloat16. XLA's buffer assignment for CPU
gives the train step 28.0 GiB of arguments and 16.7 of temporaries, scoring 26.8 and 1.0 with 10.1
beside it (what enters the blocks, embedding and head); a GPU's compiler may differ. Disk: 14 GB for
each derived model and for each score, which bfloat16 halves, 56 GB together; the result beside it,
16 GB and a patch file of 0.5 GB. So 72 GB free are enough; no checkpoint is written but at SIGTERM
(28 GB, in a stage where there is room for it).
Time: not measured yet.
"""

from configs.common import LAYERWISE, paper_config

CONFIG = paper_config("Meta-Llama-3-8B-Instruct", "llama3_8b", **LAYERWISE)
