"""Where a model is: its kind and path, and what is cheaply seen of it. Needs no JAX."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

from safepatch_jax.io import gguf, hub
from safepatch_jax.io.companions import MODEL
from safepatch_jax.models.config import read_hf_config
from safepatch_jax.runtime import addresses, files, paths, processes
from safepatch_jax.runtime.text import printable


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a model is.

    Attributes:
      kind: 'hf', 'orbax' or 'gguf'.
      path: of the folder or file.
      origin: ``org/name@COMMIT`` of a model of the Hugging Face Hub, '' of another.
    """

    kind: str
    path: pathlib.Path
    origin: str = ""

    @classmethod
    def parse(cls, text: str) -> Place:
        """Read ``hf:DIR``, ``orbax:DIR``, ``gguf:FILE``, ``smollm2``, or a bare path, whose kind is
        then seen from its content; or ``org/name[@revision]``, a model of the Hugging Face Hub,
        which is brought into its cache. All processes call this.

        Raises:
          ValueError: another kind, or no path; see `hub.snapshot`.
        """
        if parts := hub.named(text.removeprefix("hf:")):
            found = hub.snapshot(*parts, check=read_hf_config)
            return cls("hf", found.folder, found.origin)
        kind, _, rest = text.partition(":")
        place = rest if kind in paths.MODEL_KINDS else text
        if addresses.is_address(place):
            paths.readable(place)
        return cls.local(text)

    @classmethod
    def local(cls, text: str) -> Place:
        """Do what `parse` does, for what is on this machine or is to be written: nothing is looked
        up on the Hub."""
        if text == "smollm2":
            return cls("gguf", gguf.find_smollm2())
        kind, colon, rest = text.partition(":")
        if colon and kind in paths.MODEL_KINDS and rest:
            return cls(kind, pathlib.Path(paths.local(rest)))
        path = pathlib.Path(paths.local(text))
        if colon and not path.exists() and not addresses.is_address(text):
            raise ValueError(
                f"'{printable(text, 200)}' names no model: use hf:DIR, orbax:DIR, gguf:FILE or "
                "smollm2."
            )
        if path.suffix == ".gguf":
            return cls("gguf", path)
        return cls("orbax" if (path / MODEL).is_file() else "hf", path)

    def absolute(self) -> Place:
        return dataclasses.replace(self, path=self.path.absolute())


def source_facts(place: Place) -> dict[str, Any]:
    """Return what is cheaply seen of a source: its files' sizes, by relative name, and its
    config."""
    if not processes.several():
        return {}
    facts: dict[str, Any] = {}
    if place.origin:  # each host may have a cache of its own, with more in it
        return {"model on the Hub": place.origin}
    for path in [*gguf.parts_of(place.path), *sorted(place.path.rglob("*"))]:
        if path.is_file():
            name = path.name if path == place.path else path.relative_to(place.path)
            facts[f"size of {name}"] = path.stat().st_size
            if path.name == "config.json":
                facts[f"SHA-256 of {name}"] = files.file_sha256(path)
    return facts
