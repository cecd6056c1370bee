"""A first half hour on a GPU: speeds against their floors, bits, and memory against the plan.

  python -m benchmarks.gpu --out=DIR --minutes=25              # jax[cuda13]; torch is optional
  python -m benchmarks.gpu --out=DIR --parts=decode,decode_hf
  python -m benchmarks.gpu --out=DIR --shapes=tiny             # on a CPU, about two minutes

Needs no network and no model: weights are random and made on the device, as wide as LLaMA-2-7B, in
as many blocks as fit. Each part is a process of its own with a share of the minutes; one that takes
longer is ended, what it had measured stays, and the next one begins. DIR/summary.md is written
again after each part, DIR/parts/NAME.json after each figure. The same command goes on where an
earlier one stopped: parts that are done are not run again. DIR needs 12 GB for a while.

Ends with 1 if a part failed or was cut.
"""

from __future__ import annotations

import pathlib
import sys

from absl import app, flags

from benchmarks.gpu import child, driver
from benchmarks.gpu.parts import PARTS, SIZES

_OUT = flags.DEFINE_string("out", None, "Folder of the results.", required=True)
_MINUTES = flags.DEFINE_float("minutes", 25, "For all parts together.", lower_bound=0.01)
_PARTS = flags.DEFINE_list("parts", [], f"Which of {', '.join(PARTS)}; by default all.")
_SHAPES = flags.DEFINE_enum("shapes", "auto", ["auto", *SIZES], "auto: tiny on a CPU, else full.")
_LIMITS = flags.DEFINE_list(
    "limits", [], "Seconds of parts in place of their share, as in score:300,decode:200."
)
_PART = flags.DEFINE_string("part", "", "Used by the benchmark itself.")
_PLATFORM = flags.DEFINE_string("platform", "", "Used by the benchmark itself.")
_LIMIT = flags.DEFINE_float("limit", 0, "Used by the benchmark itself.")


def limits() -> dict[str, float]:
    """Return --limits as a dictionary."""
    result = {}
    for entry in _LIMITS.value:
        name, _, seconds = entry.partition(":")
        try:
            result[name] = float(seconds)
        except ValueError as error:
            raise app.UsageError(f"--limits: '{entry}' is not NAME:SECONDS.") from error
    return result


def main(argv: list[str]) -> None:
    del argv
    out = pathlib.Path(_OUT.value).expanduser().absolute()
    if _PART.value:
        child.run(_PART.value, out, _SHAPES.value, _PLATFORM.value, _LIMIT.value)
        return
    try:
        complete = driver.run(out, _MINUTES.value, _PARTS.value, _SHAPES.value, limits())
    except ValueError as error:
        sys.exit(f"error: {error}")
    sys.exit(0 if complete else 1)


if __name__ == "__main__":
    app.run(main)
