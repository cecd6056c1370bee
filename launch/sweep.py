"""Try patch settings on the search split, which no report uses; training and scores are done once and reused.

  python -m launch.sweep --config=configs/demo.py --workdir=runs/sweep \\
      --grid='patch.beta=1,2,3;patch.top_rate_osm=0.03,0.1,0.3'

Each point prints one line and is kept in WORKDIR/sweep.jsonl; a sweep that was killed goes on where it stopped. The
workdir keeps the derived models (jailbroken or broken models): delete it when you are done.
"""

from absl import flags

from launch import distributed, main
from launch import flags as settings_flags
from safepatch_jax.console import say
from safepatch_jax.pipeline import sweep

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of this sweep; made if it is not there.", required=True)
_GRID = flags.DEFINE_string("grid", None, "patch.OPTION=VALUE,VALUE;patch.OPTION=...", required=True)
flags.adopt_module_key_flags(settings_flags)
flags.adopt_module_key_flags(distributed)


def run() -> None:
    distributed.join()
    grid = sweep.parse_grid(_GRID.value)
    for row in sweep.sweep(settings_flags.read_settings(), _WORKDIR.value, grid):
        point = ", ".join(f"{name.split('.')[1]} {row['patch'][name.split('.')[1]]}" for name in grid)
        say(f"{point}: {sweep.describe(row['measures'])}")


if __name__ == "__main__":
    main.run(run)
