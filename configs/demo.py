"""The demo: SafePatching on SmolLM2-135M-Instruct, on a laptop.

  make demo        or: python -m launch.safepatch --config=configs/demo.py --workdir=runs/demo

The shipped model refuses almost nothing, so it is first aligned by a short supervised run (cached).
"""

CONFIG = {
    "model": {"source": "smollm2"},
    "align": {"enabled": True, "steps": 9, "learning_rate": 5e-5, "ordinary_share": 0.75},
}
