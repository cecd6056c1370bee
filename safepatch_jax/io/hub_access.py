"""One file of the Hugging Face Hub: found in the cache or fetched, and what went wrong in one line.

huggingface_hub is imported by what is called alone: most commands never need it. It sends the token
of `hf auth login` or HF_TOKEN, keeps files in HF_HUB_CACHE (HF_HOME), and stays off the network
where HF_HUB_OFFLINE is set.
"""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

from safepatch_jax.runtime.reading import Refused, reason
from safepatch_jax.runtime.text import hide, without_user

MODEL, DATASET = "model", "dataset"
_KINDS = {MODEL: ("a model", ""), DATASET: ("a data set", "datasets/")}
_taken: list[dict[str, str]] = []


def listing(kind: str, name: str, revision: str) -> tuple[str, dict[str, int]]:
    """Ask the Hub what a repository holds.

    Args:
      kind: MODEL or DATASET.
      name: of the repository, 'org/name'.
      revision: branch, tag or commit; '' for the main branch.

    Returns:
      its commit, and the sizes of its files in bytes by name (0 where the Hub tells none).

    Raises:
      Exception: of huggingface_hub or its HTTP library; see `problem`.
    """
    from huggingface_hub import HfApi

    hide_token()
    info = HfApi(library_name="safepatch_jax").repo_info(
        name, repo_type=kind, revision=revision or None, files_metadata=True
    )
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    return info.sha, sizes


def hide_token() -> None:
    """Keep the user's token out of all that is printed."""
    from huggingface_hub import get_token

    hide(get_token() or "")


def fetch(kind: str, name: str, revision: str, file: str) -> pathlib.Path:
    """Return where a file of a repository lies in the cache; it is fetched where it is not there.
    Raises as `listing`."""
    from huggingface_hub import hf_hub_download

    path = hf_hub_download(
        name, file, repo_type=kind, revision=revision or None, library_name="safepatch_jax"
    )
    return pathlib.Path(path)


def cached(kind: str, name: str, revision: str, file: str) -> pathlib.Path | None:
    """Return where a file lies in the cache; None if it is not there. The network is not used."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(name, file, repo_type=kind, revision=revision or None)
    return pathlib.Path(path) if isinstance(path, str) else None


def is_absent(kind: str, name: str, commit: str, file: str) -> bool:
    """Return whether the cache knows that a commit has no such file."""
    return _note(kind, name, commit, file).is_file()


def note_absent(kind: str, name: str, commit: str, file: str) -> None:
    """Let the cache know that a commit has no such file, as huggingface_hub does."""
    path = _note(kind, name, commit, file)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def _note(kind: str, name: str, commit: str, file: str) -> pathlib.Path:
    return _root(kind, name) / ".no_exist" / commit / file


def page(kind: str, name: str) -> str:
    """Return the address of a repository's page."""
    return f"{_endpoint()}/{_KINDS[kind][1]}{name}"


def _endpoint() -> str:
    """Return the address of the Hub, as it may be shown: that of a mirror can hold a password."""
    from huggingface_hub import constants

    return without_user(constants.ENDPOINT)


def command(kind: str, name: str, revision: str = "") -> str:
    """Return the command that fetches a repository."""
    text = f"hf download {name}"
    if kind == DATASET:
        text += " --repo-type=dataset"
    return f"{text} --revision={revision}" if revision else text


def problem(error: Exception, kind: str, name: str, revision: str, given: str) -> Refused:
    """Say in one line why a repository cannot be had, and what to do.

    Args:
      error: what huggingface_hub or its HTTP library raised.
      kind, name, revision: see `listing`.
      given: what else the user may have meant, such as 'no folder of this name is here, and '; or
        ''.
    """
    from huggingface_hub import constants, errors

    what, download = _KINDS[kind][0], command(kind, name, revision)
    whole = f"{name}@{revision}" if revision else name
    start = f"'{whole}': {given}"
    if isinstance(error, errors.HFValidationError):
        return Refused(f"{start}it is no name of {what} on the Hugging Face Hub: {reason(error)}.")
    if isinstance(error, errors.GatedRepoError):
        return Refused(
            f"{start}the repository on the Hugging Face Hub is gated. Accept its licence at "
            f"{page(kind, name)}, run hf auth login with a token of that account, then {download}."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return Refused(
            f"{start}the repository {name} on the Hugging Face Hub has no revision "
            f"'{revision}'. Its branches, tags and commits are listed at {page(kind, name)}; then "
            f"{download}."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return Refused(
            f"{start}the Hugging Face Hub has no such repository, or it is private. See that the "
            f"name is right ({page(kind, name)}); for a private one run hf auth login first, then "
            f"{download}."
        )
    if isinstance(error, errors.EntryNotFoundError) and not _is_of_network(error):
        return Refused(f"{start}{reason(error)}. Look at {page(kind, name)}, then {download}.")
    if constants.HF_HUB_OFFLINE:
        return Refused(
            f"{start}it is not in the cache of the Hugging Face Hub ({constants.HF_HUB_CACHE}), "
            f"and HF_HUB_OFFLINE forbids to fetch it. Where there is a network: {download}."
        )
    if status := getattr(getattr(error, "response", None), "status_code", None):
        return Refused(
            f"{start}the Hugging Face Hub ({_endpoint()}) answers {status}: "
            f"{server_text(error)}. Where it is allowed: hf auth login; then {download}."
        )
    return Refused(
        f"{start}the Hugging Face Hub ({_endpoint()}) cannot be reached "
        f"({reason(error)}), and the cache ({constants.HF_HUB_CACHE}) does not hold it. Where "
        f"there is a network: {download}."
    )


def silence(error: Exception) -> str:
    """Say why the Hub gave no answer that counts, where the cache stands in."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    return f"the Hub gives no answer ({type(error).__name__})"


def _is_of_network(error: Exception) -> bool:
    from huggingface_hub import errors

    return isinstance(error, errors.LocalEntryNotFoundError)


def server_text(error: Any) -> str:
    """Return what a server said, in a few words."""
    said = getattr(error, "server_message", None) or str(error).partition("\n")[0]
    return without_user(said).strip().rstrip(".")[:300]


class Counter:
    """Fetches files of one commit, and counts them and their bytes."""

    def __init__(self, kind: str, name: str, commit: str):
        self._place = kind, name, commit
        self._blobs = _blobs(kind, name)  # at the start: files of other commits share them
        self._sizes: dict[str, int] = {}
        self._fetched = 0

    def fetch(self, file: str) -> pathlib.Path:
        """Do what `fetch` does."""
        there = cached(*self._place, file)
        path = fetch(*self._place, file)
        size = path.stat().st_size
        if there is None and path.resolve().name not in self._blobs:
            self._fetched += size
        self._sizes[file] = size
        return path

    def text(self) -> str:
        """Say how many files and bytes there are, and how many came over the network."""
        total = sum(self._sizes.values())
        text = f"{len(self._sizes)} files, {total:,} bytes"
        if self._fetched == total:
            return f"{text}, fetched"
        return f"{text}, {self._fetched:,} of them fetched" if self._fetched else f"{text}, cached"


def record(kind: str, name: str, revision: str, commit: str) -> None:
    """Remember what this process has taken from the Hub."""
    entry = {"kind": kind, "repository": name, "revision": revision or "main", "commit": commit}
    same = [x for x in _taken if x | {"revision": ""} == entry | {"revision": ""}]
    if entry not in same and not (same and revision == commit):
        _taken.append(entry)


def taken() -> list[dict[str, str]]:
    """Return what this process has taken from the Hub: kind, repository, revision, commit."""
    return list(_taken)


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Show no progress bars in the block: small files need none."""
    from huggingface_hub import utils

    if utils.are_progress_bars_disabled():
        yield
        return
    utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.enable_progress_bars()


def snapshot_folder(kind: str, name: str, revision: str) -> pathlib.Path | None:
    """Return the folder in which the cache has a revision of a repository; None if there is none.
    The network is not used."""
    root = _root(kind, name)
    reference, commit = root / "refs" / (revision or "main"), revision
    if reference.is_file():
        commit = reference.read_text().strip()
    folder = root / "snapshots" / commit
    return folder if commit and folder.is_dir() else None


def _root(kind: str, name: str) -> pathlib.Path:
    """Return the folder of a repository in the cache."""
    from huggingface_hub import constants

    return pathlib.Path(constants.HF_HUB_CACHE, "--".join([f"{kind}s", *name.split("/")]))


def _blobs(kind: str, name: str) -> set[str]:
    """Return the names of the contents that the cache holds of a repository."""
    return {path.name for path in (_root(kind, name) / "blobs").glob("*")}
