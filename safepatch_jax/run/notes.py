"""What is said of a run's settings before it begins: slow batches, and settings that suit a small
model where this one is large, each with the fix."""

from __future__ import annotations

from safepatch_jax.data.records import DATA_ROLES
from safepatch_jax.mesh import Sharder
from safepatch_jax.models.config import DecoderConfig, read_hf_config
from safepatch_jax.models.table import param_table
from safepatch_jax.run.state import Run
from safepatch_jax.runtime.console import say
from safepatch_jax.settings import Settings

LARGE = 1_000_000_000  # parameters from which on the built-in data are too few
_PUBLIC = {"harmful": "set:advbench", "lookalike": "set:xstest", "ordinary": "set:alpaca"}


def batch_notes(settings: Settings, sharder: Sharder) -> list[str]:
    """Return a line for each batch that the mesh does not divide."""
    lines, ways = [], sharder.batch_ways
    for name in ("align.batch_size", "derive.batch_size"):
        rows = settings.flat()[name]
        if rows % ways:
            lines.append(
                f"Note:    {name} = {rows} does not divide by data*fsdp = {ways}, so each "
                f"device computes the whole batch; a multiple of {ways} is faster."
            )
    return lines


def model_notes(settings: Settings, config: DecoderConfig) -> list[str]:
    """Return a line for each setting that goes badly with a model of this architecture."""
    lines, size = [], param_table(config).size
    small = [role for role in DATA_ROLES if getattr(settings.data, role) == "builtin"]
    if small and size >= LARGE:
        given = ",".join(f"{role}:{_PUBLIC[role]}" for role in small)
        lines.append(
            f"Warning: {', '.join(f'data.{role}' for role in small)}: 'builtin' is a small set for "
            f"a demo, and the model has {size / 1e9:.1f} billion parameters. Give --data={given} "
            "(docs/data.md), or files of your own."
        )
    stored = config.dtype if settings.export.dtype == "keep" else settings.export.dtype
    if stored == "bfloat16" and settings.export.rounding == "nearest":
        lines.append(
            "Warning: the result is stored as bfloat16, rounded to nearest: most entries of a "
            "patch are below half a step of their weight and would be lost. Give "
            "--export.rounding=stochastic, or --export.dtype=float32."
        )
    return lines


def tell(run: Run) -> None:
    """Say what `model_notes` has of a run's model, which is imported first if it is of another
    format. Raises ValueError if it cannot be."""
    if run.source.kind != "hf":
        run.runner.need("import")
    for line in model_notes(run.settings, read_hf_config(run.imported)):
        say(line)
