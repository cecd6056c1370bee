"""Patch a chat model: derive the safety (SE) and over-safety (OSM) patches, merge them, export,
evaluate, report.

  python -m launch.safepatch --config=configs/demo.py --workdir=runs/demo
  python -m launch.safepatch --config=configs/demo.py --workdir=runs/demo --dry_run
  python -m launch.safepatch --config=configs/demo.py --workdir=runs/real \\
      --data=harmful:advbench.csv,lookalike:xstest.csv --patch.retention=0.2
  # On all hosts of a TPU pod slice; BUILD.md has other clusters.
  launch/tpu_pod.sh POD ZONE launch.safepatch ...

The workdir receives report.md, report.json, report.png, patch.png, manifest.json, settings.json,
environment.json, metrics.jsonl and tensorboard/ (training, step by step), stages/export/model (a
Hugging Face folder that transformers loads as it is) and stages/patch_file/patch.safetensors (its
difference from the backbone, see launch.patch; not if --export.dtype names another dtype). A run
that was killed resumes when the same command is given again; stages whose inputs are unchanged are
not run again. Derived models are deleted after success (--run.keep_scratch keeps them: they are
jailbroken or broken models, handle with care).
"""

from absl import flags

from launch import distributed, kinds, main, profiling
from launch import flags as settings_flags
from safepatch_jax.runtime.console import say, show

_WORKDIR = kinds.path(
    "workdir", None, "Folder of this run; made if it is not there.", required=True
)
_DRY_RUN = flags.DEFINE_bool(
    "dry_run",
    False,
    "Print the plan, compile the programs (into the compile cache), print what they need on these "
    "devices, and stop.",
)
_SHOW = flags.DEFINE_bool(
    "show_examples",
    False,
    "Print training examples in the chat template, answer tokens green (between >>> and <<< where "
    "there are no colours), and stop.",
)
_UPDATE = flags.DEFINE_bool(
    "update", False, "Go on in a workdir of other settings, running again what they change."
)
_VERIFY = flags.DEFINE_bool(
    "verify",
    False,
    "Compare all that finished stages hold with their manifests by SHA-256; else what leaves the "
    "run is, and the rest by size and time. A stage that differs is made again.",
)
flags.adopt_module_key_flags(settings_flags)
flags.adopt_module_key_flags(distributed)
flags.adopt_module_key_flags(profiling)


def run() -> None:
    distributed.join()
    settings = settings_flags.read_settings(fitted=True)
    # Imported here: --help does not need what runs. What plans imports JAX, and a run with nothing
    # left to do should not wait for it.
    if _DRY_RUN.value:
        from safepatch_jax.planning.plan import dry_run

        dry_run(settings, _WORKDIR.value)
        return
    if settings.derive.memory == "auto":
        from safepatch_jax.planning.fitting import fitted

        settings = fitted(settings, _WORKDIR.value, afresh=_UPDATE.value)
    from safepatch_jax.run.ending import result
    from safepatch_jax.run.job import Job

    job = Job(settings, _WORKDIR.value, update=_UPDATE.value, verify=_VERIFY.value)
    if _SHOW.value:
        for line in job.examples():
            show(line)
        return
    with profiling.traced():
        report = job.run(main.words())
    for line in result(job.workdir):
        say(line)
    say(f"Report: {report}")
    say(f"Model:  {job.state.folder('export')}")
    if job.state.patch_file is not None:
        say(f"Patch:  {job.state.patch_file}")


if __name__ == "__main__":
    main.run(run)
