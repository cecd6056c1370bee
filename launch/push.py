"""Push a patched model, or its patch file alone, to the Hugging Face Hub.

  python -m launch.push --model=runs/demo/stages/export/model --repo=org/name --dry_run
  python -m launch.push --model=DIR --repo=org/name --private
  python -m launch.push --patch=runs/demo/stages/patch_file/patch.safetensors --repo=org/name

Needs a token that may write: hf auth login, or HF_TOKEN. Of a model are sent config, tokenizer,
chat templates, licence, weights (safetensors), the card README.md, certificate.json and merge.json;
of a patch the file, and a card that is made from what it records. --dry_run prints files, sizes and
the card, and sends nothing. All comes in one commit; after an interruption the same command sends
what is still missing.

Refused: a folder that is half-written or half patched, and a derived model (SE or OSM: broken,
jailbroken). Read the card before you publish it: the licence of the base applies.
"""

from absl import flags

from launch import kinds, main
from safepatch_jax.runtime.console import say, show
from safepatch_jax.runtime.text import printable

_MODEL = kinds.path("model", None, "The model's folder, in Hugging Face format.")
_PATCH = kinds.path("patch", None, "A patch file, in place of a model.")
_REPO = flags.DEFINE_string("repo", None, "The repository, org/name.", required=True)
_PRIVATE = flags.DEFINE_bool(
    "private", None, "Make the repository private, if it is not there yet."
)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print what would be sent, and stop.")


def run() -> None:
    from safepatch_jax.run import push  # here: --help needs none of it

    if bool(_MODEL.value) == bool(_PATCH.value):
        raise ValueError("one of --model and --patch is needed.")
    push.check_repository(_REPO.value)
    if _MODEL.value:
        parcel = push.parcel_of_model(_MODEL.value)
    else:
        parcel = push.parcel_of_patch(_PATCH.value)
    for line in parcel.lines():
        say(line)
    card = parcel.card()
    if not card:
        say("NOTE: the folder has no README.md, so the repository gets no card.")
    if not _DRY_RUN.value:
        say(f"Pushed: {push.push(parcel, _REPO.value, private=_PRIVATE.value)}")
        return
    for line in card.splitlines():
        show(f"  | {printable(line)}")
    say(f"Dry run: nothing was sent to {_REPO.value}.")


if __name__ == "__main__":
    main.run(run)
