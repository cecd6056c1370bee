"""The paper's comparison: LLaMA-2-7B-Chat, all methods, three seeds, the paper's data and kind of
judge.

  python -m launch.compare --config=configs/compare_llama2_7b.py --methods=all \\
      --workdir=runs/compare_llama2_7b --judge=classifier:judges/action-ro

Model: meta-llama/Llama-2-7b-chat-hf of the Hugging Face Hub (gated: accept its licence, then hf
auth login), or --model.source=DIR. Data: AdvBench, XSTest and Alpaca to train on, and what suite
'paper' measures, all fetched with their checksums, or from --data.manual_dir=FILES. docs/compare.md
tells how the judge comes into its folder.

Where the paper is known to say something else than our defaults, it is followed: the loss is the
sum over an answer's tokens, SNIP weighs by the derived model's weights, all weights are trained,
and D_h is all of AdvBench's training split but near-duplicates. Clipping at norm 1 stays, which it
is not known to have. Not known are its rates, steps, p, a, b,
alpha, beta and template: those of configs/common.py stand, nothing was searched for. GA + Mismatch
takes about the thousand steps of its source, of 4 rows of each of its three parts.

Hardware: 4 x H100 or other cards of 80 GB, by arithmetic. Memory: 6.74e9 parameters; full
fine-tuning holds 16 bytes for each (float32 weights, gradients, two moments), 108 GB over all
devices, plus activations and, for GA + Mismatch, a second copy of the backbone. Disk: 420 GB, for
derived models and scores of all seeds stay until the end; no checkpoint is written but at SIGTERM.
Time: not measured; nothing of this was run.
"""

from configs.common import paper_config

CONFIG = paper_config(
    "meta-llama/Llama-2-7b-chat-hf",
    "llama2_7b",
    derive={"loss": "sum"},
    patch={"importance": "weight"},
    run={"checkpoint_minutes": 0.0},
)
COMPARE = {
    "suite": "paper",
    "seeds": (0, 1, 2),
    "judge": "classifier:LibrAI/longformer-action-ro",
    "settings": {"ga_mismatch": {"derive.se_steps": 1000, "derive.batch_size": 4}},
}
