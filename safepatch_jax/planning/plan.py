"""The plan of a run and its needs: on the devices that are present, or on absent TPU chips."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from safepatch_jax.io import hub
from safepatch_jax.models.config import DecoderConfig, read_hf_config
from safepatch_jax.models.kernels import compiling_for
from safepatch_jax.planning import report
from safepatch_jax.planning.chips import Target, topology
from safepatch_jax.planning.fitting import fitted
from safepatch_jax.planning.programs import PROGRAMS, architecture
from safepatch_jax.planning.search import Planner
from safepatch_jax.run.context import Context
from safepatch_jax.run.job import Job
from safepatch_jax.run.notes import model_notes
from safepatch_jax.run.place import Place
from safepatch_jax.runtime import files
from safepatch_jax.runtime.console import say
from safepatch_jax.settings import Settings


def dry_run(settings: Settings, workdir: str | pathlib.Path) -> None:
    """Print the plan of a run and what its programs need on these devices; nothing is run, and
    nothing is written but the compile cache.

    For an absent model its model.architecture is used; data and stages are then not examined.

    Raises:
      ValueError: bad settings, model, data or mesh.
    """
    source, stand_in = settings.model.source, settings.model.architecture
    absent = bool(stand_in) and source != "smollm2" and not _is_at_hand(source)
    settings = fitted(settings, workdir, pin=not absent)
    if absent:
        say(f"The model '{source}' is not at hand; its programs are those of {stand_in}.")
        config, sharder = architecture(settings), Context(settings).sharder
        for line in model_notes(settings, config):
            say(line)
    else:
        job = Job(settings, workdir, update=True)
        for line in job.plan(statuses=False):
            say(line)
        sharder = job.state.context.sharder
        if job.state.source.kind == "hf" or job.runner.status("import") == "done":
            config = read_hf_config(job.state.imported)
        elif stand_in:
            config = architecture(settings)
        else:
            say(
                "What its programs need is known once the model is imported (by the run, or by "
                "launch.convert), or with --model.architecture=FILE."
            )
            return
    for line in report.figures(settings, config, sharder):
        say(line)


def _is_at_hand(source: str) -> bool:
    """Return whether a model is on this machine; nothing is fetched."""
    if hub.named(source.removeprefix("hf:")):
        return hub.at_hand(source)
    return Place.parse(source).path.exists()


def compile_run(
    settings: Settings,
    text: str,
    *,
    slices: int = 1,
    kinds: Sequence[str] = PROGRAMS,
    suggest: bool = False,
    remedy: bool = True,
    json_path: str | pathlib.Path | None = None,
) -> bool:
    """Compile the programs of a run for a TPU topology or GPUs; print what each needs, and whether
    they fit.

    Args:
      settings: of the run.
      text: the topology, see `topology`.
      slices: number of such topologies.
      kinds: which programs, of PROGRAMS.
      suggest: search the mesh and remat with the shortest train step, instead of those of the
        settings.
      remedy: where the settings do not fit, search the nearest that do.
      json_path: where to write the same figures as JSON.

    Returns:
      whether the programs fit (with `suggest`, whether settings were found with which they do).

    Raises:
      ValueError: no compiler, unknown topology or architecture, or a mesh that does not go with
        them.
    """
    if json_path is not None and not pathlib.Path(json_path).absolute().parent.is_dir():
        raise ValueError(f"--json: the folder of '{json_path}' is not there. Make it first.")
    config, target = architecture(settings), topology(text, slices)
    with compiling_for(target.capability):
        return _compile(settings, config, target, kinds, suggest, remedy, json_path)


def _compile(
    settings: Settings,
    config: DecoderConfig,
    target: Target,
    kinds: Sequence[str],
    suggest: bool,
    remedy: bool,
    json_path: str | pathlib.Path | None,
) -> bool:
    planner, fit, compiled, figures = Planner(config, target, kinds), None, [], ()
    if suggest:
        compiled, fit = planner.suggest(settings)
    if fit is not None:
        settings, figures = settings.override(fit.changes), fit.figures
    sharder = target.sharder(settings.mesh.shape)
    for line in report.heading(target, settings, config, sharder):
        say(line)
    if suggest:
        lines = report.suggestion_lines(compiled, fit)
    else:
        figures = planner.all(settings)
        lines = [*report.table(figures), report.verdict(figures)]
    for line in [*lines, *report.pool_lines(figures, target)]:
        say(line)
    if remedy and not suggest and not all(f.fits for f in figures):
        fit = planner.remedy(settings)
        for line in report.remedy_lines(fit, settings, config, target, sharder):
            say(line)
    if json_path is not None:
        content = report.to_json(target, sharder, settings, config, figures, fit, compiled)
        files.write_json(pathlib.Path(json_path), content)
    return bool(figures) and all(f.fits for f in figures)
