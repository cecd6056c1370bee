"""SafePatching on a model of your own, from about 1B parameters on: settings to begin with.

  python -m launch.safepatch --config=configs/large.py --model.source=DIR --workdir=runs/mine

Model: a folder, org/name of the Hugging Face Hub, or what else --model.source takes. Data:
AdvBench, XSTest and Alpaca, fetched with their checksums, or from --data.manual_dir=FILES;
--data=ROLE:SOURCE names others. Add --dry_run to see the plan first.

What it sets, for the defaults are those of the demo's 135M: bfloat16 arithmetic, blocks that are
computed again in the backward pass, stochastic rounding (bfloat16 would lose most of a patch
otherwise), rates for 7B, batches of 16, longer prompts and answers, top sets of 3 %. From 13B on
take --derive.se_learning_rate=3e-6; for 70B 1e-6, and --derive.osm_learning_rate=3e-6. As in the
configs of the paper's backbones these are places to start a search from.

Hardware: 16 bytes for each parameter over all devices, plus activations. Scratch disk: 44 bytes for
each, or 20 with --run.checkpoint_minutes=0. --dry_run says what that is here, and
--derive.memory=auto takes what fits instead.
Time: not measured.
"""

from configs.common import paper_config

CONFIG = paper_config()
