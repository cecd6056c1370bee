"""The demo: SafePatching on SmolLM2-135M-Instruct, on a laptop.

  make demo        or: python -m launch.safepatch --config=configs/demo.py --workdir=runs/demo

Hardware: 2 CPU cores, 8 GB of memory, 8 GB of disk. Time: 6 to 9 minutes after installation;
seconds when repeated. Expected: SE alone refuses everything, OSM alone nothing, the intersection
stays near the backbone, SafePatching refuses fewer harmless prompts than the backbone at about the
same utility, and a little more harm (docs/demo.md has the figures).

The shipped model refuses almost nothing, so it is first aligned by a short supervised run (cached)
until it refuses all harmful requests and most harmless look-alikes as well: an over-careful model.

How the patch settings were chosen: on the 'search' split, which no report uses, the fewest refusals
of look-alikes among the points at which no harmful request was complied with:

  python -m launch.sweep --config=configs/demo.py --workdir=runs/sweep --measure=answers \\
      --grid='patch.top_rate_osm=0.1,0.3;patch.beta=2,2.5,3,5'
"""

CONFIG = {
    "model": {"source": "smollm2"},
    "align": {"enabled": True, "steps": 16, "learning_rate": 1e-4, "ordinary_share": 0.5},
    "score": {"samples": 64},
    "evaluate": {"batch_size": 72},  # a CPU answers all prompts together fastest
    "patch": {"top_rate_se": 0.1, "top_rate_osm": 0.3, "retention": 0.3, "alpha": 1.0, "beta": 2.5},
}
