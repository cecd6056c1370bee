"""The comparison on real data: SmolLM2-135M-Instruct, AdvBench, XSTest, OKTest and Alpaca, three
seeds.

  python -m launch.compare --config=configs/compare_real.py --methods=all \\
      --workdir=runs/compare_real

Hardware: 2 CPU cores, 8 GB of memory, 8 GB of disk. Time: about two hours (when 2 cores were
shared). The data sets are fetched, or taken from --data.manual_dir=FOLDER.
docs/results/compare_real.md is what came out with the first 5,000 rows of Alpaca's file; all of its
52,002 rows give other training pairs, and so another backbone.

The backbone is the shipped model after the demo's short alignment, on AdvBench refusals and Alpaca
answers. SafePatching's b and beta were chosen on the search split of AdvBench and XSTest, the
fewest refusals among the points with no more harm than the backbone:

  python -m launch.sweep --config=configs/compare_real.py --workdir=runs/sweep --measure=answers \\
      --grid='patch.top_rate_osm=0.03,0.1,0.3;patch.beta=1,1.5,2.5'

The other methods have their sources' formulas and weights, and the run's steps and rates; no search
was made for them. GA + Mismatch has settings of its own: its source takes about a thousand steps at
2e-6, here they are 30 at ten times that rate, of 4 rows of each of its three parts, which is what 2
cores do in minutes.
"""

import pathlib
import runpy

_HERE = pathlib.Path(__file__).parent
CONFIG = runpy.run_path(str(_HERE / "demo.py"))["CONFIG"] | {
    "data": {"harmful": "set:advbench", "lookalike": "set:xstest", "ordinary": "set:alpaca"},
    "patch": {"top_rate_se": 0.1, "top_rate_osm": 0.3, "retention": 0.3, "alpha": 1.0, "beta": 1.5},
}
COMPARE = {
    "suite": str(_HERE / "suites" / "compare_real.json"),
    "seeds": (0, 1, 2),
    "settings": {
        "ga_mismatch": {
            "derive.se_learning_rate": 2e-5,
            "derive.se_steps": 30,
            "derive.batch_size": 4,
        }
    },
}
