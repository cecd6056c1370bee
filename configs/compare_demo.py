"""The comparison at the demo's size: every method on SmolLM2-135M-Instruct, on a laptop.

  python -m launch.compare --config=configs/compare_demo.py --methods=all --workdir=runs/compare

Hardware: 2 CPU cores, 8 GB of memory, 8 GB of disk. Time: 31 minutes for all methods and one seed;
methods may be run one after another. Backbone, data and SafePatching's settings are the
demo's (configs/demo.py). docs/compare.md tells what each method is, docs/results/compare_demo.md
what came out; docs/results/compare_real.md has AdvBench, XSTest and OKTest.
"""

import pathlib
import runpy

CONFIG = runpy.run_path(str(pathlib.Path(__file__).with_name("demo.py")))["CONFIG"]
COMPARE = {"suite": "quick", "seeds": (0,)}
