"""Start EleutherAI's lm-evaluation-harness with the model type `safepatch_jax`; all arguments are
the harness's own, shown by `python -m launch.lm_eval run --help` once it is installed.

  pip install 'lm_eval[math]'    # or, from this project's folder: pip install -e '.[lm-eval]'
  # The paper's utility list: MMLU, HellaSwag, ARC, WinoGrande, BBH, GSM8K and MATH.
  python -m launch.lm_eval --model safepatch_jax \\
      --model_args pretrained=DIR,compute_dtype=bfloat16,batch_size=16 \\
      --tasks mmlu,hellaswag,ai2_arc,winogrande,bbh,gsm8k,minerva_math --output_path runs/utility
  python -m launch.lm_eval --model safepatch_jax --model_args pretrained=DIR --tasks mmlu \\
      --num_fewshot 5 --apply_chat_template
  python -m launch.lm_eval --model safepatch_jax --tasks gsm8k \\
      --model_args '{"pretrained": "DIR", "mesh": "data:1,fsdp:8,tensor:1"}'
  python -m launch.lm_eval ls tasks

DIR is a folder in Hugging Face format, org/name[@revision] of the Hugging Face Hub, or a checkpoint
of launch.convert. Other model arguments: compute_dtype (float32, the default and the right one on a
CPU, or bfloat16), batch_size (also --batch_size; the harness's default is 1, which is slow), mesh
(it has commas, so it is given in JSON), template_kwargs, thinking (as_is or skip) and
think_end_token. --num_fewshot counts for all tasks, and BBH and MATH have fewer examples than 5:
leave it out where they are among them. --apply_chat_template, --gen_kwargs, --use_cache and
--output_path work as for other models; --device is ignored, since JAX_PLATFORMS and the mesh choose
devices. One process; several hosts are not supported.

The harness knows a model type once its module was imported, which is all that this program does.
Versions that know --plugins (after 0.4.13) do not need it:

  lm_eval run --plugins safepatch_jax.evaluation.lm_eval_model --model safepatch_jax ...

The harness downloads its tasks' data itself. Offline set HF_DATASETS_OFFLINE=1 if they were
downloaded before, or give your own tasks with --include_path.
"""

import importlib
import signal
import sys

from launch import INTERRUPTED, manual, show
from safepatch_jax.runtime.text import printable


def run() -> None:
    if sys.argv[1:2] and sys.argv[1] in manual.HELP:  # after a sub-command it is the harness's own
        show(__doc__.strip())
        return
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
