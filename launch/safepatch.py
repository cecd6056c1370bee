"""Patch a chat model: derive the safety (SE) and over-safety (OSM) patches, merge them, export, evaluate, report.

  python -m launch.safepatch --config=configs/demo.py --workdir=runs/demo
  python -m launch.safepatch --config=configs/demo.py --workdir=runs/demo --dry_run
  python -m launch.safepatch --config=configs/demo.py --workdir=runs/real \\
      --data=harmful:advbench.csv,lookalike:xstest.csv --patch.retention=0.2

The workdir receives report.md, report.json, report.png, manifest.json, settings.json, stages/export/model (a Hugging Face
folder that transformers loads as it is) and stages/patch_file/patch.safetensors (its difference from the backbone, see
launch.patch; not where --export.dtype asks for another dtype). A run that was killed goes on where it stopped when the same
command is given again; stages whose inputs are unchanged are not run again. Derived models are deleted after success
(--run.keep_scratch keeps them: they are jailbroken or broken models, handle with care).
"""

from absl import flags

from launch import flags as settings_flags
from launch import main
from safepatch_jax.console import say
from safepatch_jax.pipeline.job import Job

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of this run; made if it is not there.", required=True)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the plan and stop; nothing is written.")
_UPDATE = flags.DEFINE_bool("update", False, "Go on in a workdir of other settings, running again what they change.")
flags.adopt_module_key_flags(settings_flags)


def run() -> None:
    job = Job(settings_flags.read_settings(), _WORKDIR.value, update=_UPDATE.value or _DRY_RUN.value)
    if _DRY_RUN.value:
        for line in job.plan():
            say(line)
        return
    report = job.run()
    say(f"Report: {report}")
    say(f"Model:  {job.folder('export')}")
    if job.patch_file is not None:
        say(f"Patch:  {job.patch_file}")


if __name__ == "__main__":
    main.run(run)
