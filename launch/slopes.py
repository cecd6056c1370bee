"""Predict the plane of alpha and beta from four models, and check some points of it.

  python -m launch.slopes --config=configs/demo.py --workdir=runs/sweep --alpha=2 --beta=4

The patched weights are linear in alpha and beta. Margins, content NLL and perplexity (see
launch.margins) are measured at the backbone, at a step along alpha, along beta and along both, and
are taken as bilinear: so a sweep of the plane costs four times the forward passes of one model.
Up to --checks points (the least excess on both axes, the least harm without more over-refusal, the
reverse, the best AUROC) are measured with true models, beside what was predicted. Merging methods
that elect signs, or lack alpha, have no such plane and are refused.

Settings are given by --config and flags, as for launch.safepatch; --patch.alpha and --patch.beta do
not count. The workdir is one of launch.sweep, whose derived models and scores are shared
(jailbroken or broken models; the last lines say how to delete them). It receives slopes.md,
slopes.json, slopes.png, and what was measured, so that the command resumes when it was killed.
"""

from absl import flags

from launch import distributed, kinds, main
from launch import flags as settings_flags
from safepatch_jax.runtime.console import say
from safepatch_jax.studies.sweep.slope_options import SlopeOptions

_DEFAULTS = SlopeOptions()
_WORKDIR = kinds.path(
    "workdir", None, "Folder of this sweep; made if it is not there.", required=True
)
_FLAGS = {
    "alpha": flags.DEFINE_float("alpha", _DEFAULTS.alpha, "The largest weight of the SE patch."),
    "beta": flags.DEFINE_float("beta", _DEFAULTS.beta, "The largest weight of the OSM patch."),
    "step": flags.DEFINE_float(
        "step", _DEFAULTS.step, "Of the finite differences, as a share of --alpha and --beta."
    ),
    "checks": flags.DEFINE_integer(
        "checks", _DEFAULTS.checks, "Points that are measured with true models, 4 at most."
    ),
}
flags.adopt_module_key_flags(settings_flags)
flags.adopt_module_key_flags(distributed)


def run() -> None:
    distributed.join()
    from safepatch_jax.studies.sweep.slopes import slopes  # here: --help does not need JAX

    options = SlopeOptions(**{name: flag.value for name, flag in _FLAGS.items()})
    settings = settings_flags.read_settings()
    say(f"Report: {slopes(settings, _WORKDIR.value, options, main.words())}")


if __name__ == "__main__":
    main.run(run)
