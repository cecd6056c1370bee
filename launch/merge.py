"""Merge two derived models into their backbone on a small host: tensor by tensor, piece by piece.

  python -m launch.merge --base=DIR --patch_se=DIR2 --patch_osm=DIR3 --out=NEW_DIR \\
      --merge=dare --patch.retention=0.3
  python -m launch.merge --base=DIR --out=NEW_DIR --config=configs/llama2_7b_chat.py \\
      --patch_se=RUN/stages/derive_se --patch_osm=RUN/stages/derive_osm \\
      --scores_se=RUN/stages/score_se --scores_osm=RUN/stages/score_osm

--patch_se and --patch_osm are derived models: folders in Hugging Face format, patch files that turn
the base into one, or stages of a run with --run.keep_scratch. SNIP (SafePatching) needs the scores
of such a run too; other methods rank by size, or at random, or not at all. --config, --merge and
the flags below mean what they mean in launch.safepatch, and give the same bits. A run's backbone is
its --model.source, or WORKDIR's aligned model; --config's other groups are not used.

Memory is that of a few million entries; a stage of a run is read one stacked parameter at a time.
Compiled programs are kept in --run.cache_dir.
NEW_DIR appears whole or not at all, with config and tokenizer, merge.json (the settings, and the
number of entries kept in each tensor) and patch.png. The patch file is then made by

  python -m launch.patch create --base=DIR --model=NEW_DIR --patch=FILE
"""

from absl import flags

from launch import kinds, main, options
from safepatch_jax.runtime import files, paths, programs

_BASE = kinds.path(
    "base", None, "The backbone: a Hugging Face folder, or org/name[@revision].", required=True
)
_DERIVED = {
    "se": kinds.path(
        "patch_se",
        None,
        "The SE model (gradient ascent), or what DARE and TIES merge first.",
        required=True,
    ),
    "osm": kinds.path(
        "patch_osm", None, "The OSM model (gradient descent), or the second one.", required=True
    ),
}
_SCORES = {
    role: kinds.path(
        f"scores_{role}", None, f"Sums of |gradient| at the {role.upper()} model; SafePatching."
    )
    for role in _DERIVED
}
_OUT = kinds.path("out", None, "The new folder.", required=True)
_NAMES = options.define(["patch", "export", "run.seed", "run.cache_dir"])
flags.adopt_module_key_flags(options)


def run() -> None:
    programs.one_thread_a_program()
    programs.keep_freed_memory()
    from safepatch_jax.run import merge_folders  # here: --help needs no JAX

    derived, scores = _values(_DERIVED), _values(_SCORES)
    settings = options.read(_NAMES)
    cache_dir = paths.resolve(settings.run.cache_dir)
    files.refuse_unusable(cache_dir, "--run.cache_dir")
    programs.keep_programs(cache_dir)
    merge_folders.merge_folders(_BASE.value, derived, scores, _OUT.value, settings)


def _values(holders: dict[str, flags.FlagHolder]) -> dict[str, str]:
    return {role: holder.value for role, holder in holders.items() if holder.value}


if __name__ == "__main__":
    main.run(run)
