"""The table of a run's stages: what each does and reads, and the settings its outputs depend on."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from safepatch_jax.data.prompt_format import AS_IS
from safepatch_jax.data.rendering import DATE
from safepatch_jax.data.windows import ALL
from safepatch_jax.outcome import outcome_settings
from safepatch_jax.patching import PATCH_ROLES
from safepatch_jax.run.inputs import score_window
from safepatch_jax.run.stages import Stage, version_of
from safepatch_jax.run.state import Run, source_hashes
from safepatch_jax.runtime import processes
from safepatch_jax.settings import Settings

# Models compared in the report, in its order.
VARIANTS = ("shipped", "backbone", "se", "osm", "intersection", "safepatching")
Result = Mapping[str, Any]
Evaluate = Callable[[Run, str, pathlib.Path], Result]


def _step(name: str, *args: Any) -> Result:
    """Run a step of `run.steps`, which needs JAX: where all stages are done nothing imports it."""
    from safepatch_jax.run import steps

    return getattr(steps, name)(*args)


evaluate_variant: Evaluate = functools.partial(_step, "evaluate")


def variants(settings: Settings) -> tuple[str, ...]:
    """Return the models of the report; without an alignment the shipped one is the backbone."""
    return VARIANTS if settings.align.enabled else VARIANTS[1:]


def stage_table(run: Run, evaluate: Evaluate = evaluate_variant) -> list[Stage]:
    """Return the stages of a run, each with all that its outputs depend on.

    Args:
      run: its settings, data and source.
      evaluate: measures a model of the report.
    """
    stages = [*_backbone(run), *_patches(run), *_model(run), *_evaluations(run, evaluate)]
    reads = ("evaluate_backbone", "evaluate_safepatching", "certify_export")
    results = tuple(stage.name for stage in stages if stage.name not in reads)
    write = functools.partial(_step, "write_report", run, variants(run.settings))
    report = Stage("report", write, reads, outcome_settings(run.settings), results=results)
    return [*stages, report]


def _base(settings: Settings) -> str:
    """Return the stage that the backbone comes from."""
    return "align" if settings.align.enabled else "import"


def _parts(settings: Settings) -> tuple[str, ...]:
    """Return the stages that a patch is made from."""
    return (_base(settings), "derive_se", "derive_osm", "score_se", "score_osm")


def _backbone(run: Run) -> list[Stage]:
    """Return the stages, shared with other runs, that make and examine the backbone."""
    s, data = run.settings, run.inputs.data_hashes
    hashes = functools.partial(processes.on_first, source_hashes, run.source)
    certify = functools.partial(_step, "certify_import", run)
    stages = [
        Stage("import", functools.partial(_step, "import_model", run), sources=hashes, shared=True),
        Stage("certify_import", certify, ("import",), *_certificate(s), shared=True),
    ]
    if s.align.enabled:
        settings = dataclasses.asdict(s.align) | _training_settings(s) | _format_key(run)
        settings["clip_norm"] = s.derive.clip_norm
        sources = {role: data[role] for role in ("harmful", "ordinary")}
        align = functools.partial(_step, "align", run)
        stages.append(Stage("align", align, ("import",), settings, sources, shared=True))
    return stages


def _patches(run: Run) -> list[Stage]:
    """Return the stages of the derived models and their scores."""
    s, harmful = run.settings, {"harmful": run.inputs.data_hashes["harmful"]}
    stages = []
    for role in PATCH_ROLES:
        derive = functools.partial(_step, "derive", run, role)
        settings = _derive_settings(s, role) | _format_key(run)
        stage = Stage(f"derive_{role}", derive, (_base(s),), settings, harmful, scratch=True)
        stages.append(stage)
    for role in PATCH_ROLES:
        score = functools.partial(_step, "score", run, role)
        reads = (f"derive_{role}",)
        settings = _score_settings(s, role) | _format_key(run)
        stage = Stage(f"score_{role}", score, reads, settings, harmful, scratch=True)
        stages.append(stage)
    return stages


def _model(run: Run) -> list[Stage]:
    """Return the stages that make, write and examine the patched model."""
    s = run.settings
    patch = functools.partial(_step, "patch", run)
    export = functools.partial(_step, "export", run)
    base = _base(s)
    stages = [
        Stage("patch", patch, _parts(s), _patch_settings(s), scratch=True),
        Stage("export", export, (base, "patch"), dataclasses.asdict(s.export), leaves=True),
    ]
    reads = (base, "export")
    if s.export.dtype == "keep":  # a patch file holds differences of bits
        write = functools.partial(_step, "write_patch_file", run)
        stages.append(Stage("patch_file", write, reads, results=("patch",), leaves=True))
    certify = functools.partial(_step, "certify_export", run)
    stages.append(Stage("certify_export", certify, reads, *_certificate(s), results=("patch",)))
    return stages


def _evaluations(run: Run, evaluate: Evaluate) -> list[Stage]:
    s, base = run.settings, _base(run.settings)
    reads = {
        "shipped": ("import",),
        "backbone": (base,),
        "se": (base, "derive_se"),
        "osm": (base, "derive_osm"),
        "intersection": _parts(s),
        "safepatching": (base, "export"),
    }
    stages = []
    for variant in variants(s):
        settings = evaluate_settings(s) | _format_key(run)
        if variant == "intersection":
            settings["patch"] = _patch_settings(s)
        stages.append(
            Stage(
                f"evaluate_{variant}",
                functools.partial(evaluate, run, variant),
                reads[variant],
                settings,
                run.inputs.data_hashes,
                scratch=variant in ("se", "osm", "intersection"),
            )
        )
    return stages


def _certificate(s: Settings) -> tuple[dict[str, Any], dict[str, str]]:
    """Return (settings, sources) of a certificate, in which torch is the witness."""
    return {"certify": s.run.certify}, {
        name: version_of(name) for name in ("torch", "transformers")
    }


def _format_key(run: Run) -> dict[str, str]:
    """Return what is not the default of how prompts are written, a template's content with it."""
    return run.inputs.prompt_format.key()


def _prompt_settings(s: Settings) -> dict[str, Any]:
    """Return the settings on which rendered prompts depend, if they are not the defaults."""
    return {} if s.data.date == DATE else {"date": s.data.date}


def _training_settings(s: Settings) -> dict[str, Any]:
    """Return the settings on which every stage that takes gradients depends."""
    return _prompt_settings(s) | {
        "compute_dtype": s.model.compute_dtype,
        "attention": s.model.attention,
        "loss": s.derive.loss,
        # Its updates were once bounded over all layers together: what that made is something else.
        "optimizer": {"adafactor": "adafactor, by layer"}.get(
            s.derive.optimizer, s.derive.optimizer
        ),
        "seed": s.run.seed,
        "max_prompt_tokens": s.data.max_prompt_tokens,
        "max_answer_tokens": s.data.max_answer_tokens,
        "train_limit": s.data.train_limit,
        "length_buckets": s.data.length_buckets,
    }


def _derive_settings(s: Settings, role: str) -> dict[str, Any]:
    result = _training_settings(s)
    for option, value in outcome_settings(s).items():
        group, _, name = option.partition(".")
        if group != "derive":
            continue
        both = ("batch_size", "weight_decay", "clip_norm", "store")
        if name in both or name.startswith(f"{role}_"):
            result[name] = value
        if name == "train":  # what is trained then depends on the scope
            result |= {name: s.patch.scope, "backward": s.derive.backward}
    return result


def _score_settings(s: Settings, role: str) -> dict[str, Any]:
    result = _training_settings(s)
    if score_window(s, role) != ALL:
        result["tokens"] = score_window(s, role)
    result |= {"samples": s.score.samples, "scope": s.patch.scope, "mode": s.score.mode}
    if s.score.mode == "batched":
        result["batch_size"] = s.score.batch_size
    if s.score.store != "float32":
        result["store"] = s.score.store
    return result


def _patch_settings(s: Settings) -> dict[str, Any]:
    return dataclasses.asdict(s.patch) | {
        "dtype": s.export.dtype,
        "rounding": s.export.rounding,
        "seed": s.run.seed,
    }


def evaluate_settings(s: Settings) -> dict[str, Any]:
    """Return the settings on which the measures of a model depend."""
    evaluate = dataclasses.asdict(s.evaluate)
    del evaluate["margin_limit"]  # no stage measures by margins
    if evaluate["thinking"] == AS_IS:
        del evaluate["thinking"]  # stages from before it was an option are done
    if not evaluate["think_tokens"]:
        del evaluate["think_tokens"]  # likewise
    return (
        evaluate
        | _prompt_settings(s)
        | {
            "max_prompt_tokens": s.data.max_prompt_tokens,
            "max_answer_tokens": s.data.max_answer_tokens,
            "eval_limit": s.data.eval_limit,
            "compute_dtype": s.model.compute_dtype,
        }
    )
