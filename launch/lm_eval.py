"""Start EleutherAI's lm-evaluation-harness with the model type `safepatch_jax`; all arguments are
the harness's own.

  pip install lm_eval
  python -m launch.lm_eval --model safepatch_jax --model_args pretrained=DIR,batch_size=16 \\
      --tasks mmlu,gsm8k --num_fewshot 5
  python -m launch.lm_eval --model safepatch_jax \\
      --model_args '{"pretrained": "DIR", "mesh": "data:1,fsdp:8,tensor:1"}' ...
  python -m launch.lm_eval ls tasks

DIR is a folder in Hugging Face format, org/name[@revision] of the Hugging Face Hub, or a checkpoint
of launch.convert. A mesh has commas, so it
is given in JSON. Other model arguments: compute_dtype (float32 or bfloat16) and batch_size (also
--batch_size; the harness's default is 1, which is slow). --apply_chat_template, --gen_kwargs,
--use_cache and --output_path work as for other models; --device is ignored, since JAX_PLATFORMS and
the mesh choose devices. One process; several hosts are not supported.

The harness knows a model type once its module was imported, which is all that this program does.
Versions that know --plugins (after 0.4.13) do not need it:

  lm_eval run --plugins safepatch_jax.evaluation.lm_eval_model --model safepatch_jax ...

The harness downloads its tasks' data itself. Offline set HF_DATASETS_OFFLINE=1 if they were
downloaded before, or give your own tasks with --include_path.
"""

import importlib
import signal
import sys

from launch import INTERRUPTED
from safepatch_jax.runtime.text import printable


def run() -> None:
    try:
        # Before the harness: it registers the model type, and says what to install without one.
        importlib.import_module("safepatch_jax.evaluation.lm_eval_model")
        from lm_eval.__main__ import cli_evaluate

        signal.signal(signal.SIGINT, signal.default_int_handler)
        cli_evaluate()
    except KeyboardInterrupt:
        print("error: interrupted by Ctrl-C.", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except (ImportError, ValueError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    run()
