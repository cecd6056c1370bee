"""Where a live model keeps the tensors of a checkpoint: under a prefix, within a wrapper, or as
rows of a fused tensor, as inference servers hold them; no JAX, no torch.

Nothing here is taken on trust: what a wrong place holds has another hash, and is refused.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Mapping

from safepatch_jax.patch_file.file import PatchFile
from safepatch_jax.runtime.console import some

# The rows of a fused tensor, from the top.
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
# Parts of a name that torch.compile, FSDP and activation checkpointing put in.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_PADDED = ("embed_tokens.weight", "lm_head.weight")  # servers add rows to make the vocabulary even
Shapes = Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Part:
    """Where a checkpoint's tensor lies: rows `start` to `stop` of a live tensor; all of it if
    `stop` is None."""

    live: str
    start: int = 0
    stop: int | None = None


def places(patch: PatchFile, shapes: Shapes) -> dict[str, Part]:
    """Find the tensors of a patch in a live model.

    Args:
      patch: the patch file.
      shapes: of the live tensors, by their names.

    Returns:
      {checkpoint name: where it lies}; those that the model does not hold are left out.

    Raises:
      ValueError: a fused tensor has other rows than its parts together.
    """
    clean = {_unwrapped(name): name for name in shapes}
    add, cut = _prefixes(patch, clean)
    found, problems = {}, []
    for name, tensor in patch.tensors.items():
        if not name.startswith(cut):
            continue
        wanted = add + name.removeprefix(cut)
        live = clean.get(wanted)
        if live is not None:
            found[name] = _whole(name, live, tensor.shape, shapes[live])
            continue
        fused, members = _fused(wanted)
        if fused in clean:
            start, rows = _rows(patch, name, members)
            live = clean[fused]
            if shapes[live][:1] != (rows,):
                problems.append(
                    f"{live} has {shapes[live][0]:,} rows, {', '.join(members)} have {rows:,}"
                )
            found[name] = Part(live, start, start + tensor.shape[0])
    if problems:
        raise ValueError(
            f"Fused tensors do not fit the patch {patch.path}: {some(sorted(set(problems)))}. "
            "Nothing was written. A part of a model (tensor parallel) cannot be patched: patch the "
            "whole one, or its folder."
        )
    return found


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _prefixes(patch: PatchFile, clean: Mapping[str, str]) -> tuple[str, str]:
    """Return what live names have in front of the checkpoint's, and what they lack of it; the pair
    that fits the most names."""
    wanted = set(patch.tensors)
    for name in patch.tensors:
        wanted.add(_fused(name)[0])
    count: collections.Counter[tuple[str, str]] = collections.Counter()
    for name in clean:
        for head, tail in _splits(name):
            if tail in wanted:
                count[head, ""] += 1
    for name in wanted:
        for head, tail in _splits(name):
            if head and tail in clean:
                count["", head] += 1
    if not count:
        return "", ""
    return max(count, key=lambda pair: (count[pair], -len(pair[0]) - len(pair[1])))


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """Yield the ways to cut a name before one of its parts: ('', 'a.b'), ('a.', 'b')."""
    parts = name.split(".")
    for count in range(len(parts)):
        head = "".join(f"{part}." for part in parts[:count])
        yield head, ".".join(parts[count:])


def _fused(name: str) -> tuple[str, tuple[str, ...]]:
    """Return the name of the fused tensor that has this one's rows, and its parts; ('', ()) if
    there is none."""
    parts = name.split(".")
    for fused, members in FUSED.items():
        if len(parts) > 1 and parts[-2] in members:
            return ".".join([*parts[:-2], fused, parts[-1]]), members
    return "", ()


def _rows(patch: PatchFile, name: str, members: tuple[str, ...]) -> tuple[int, int]:
    """Return the first row of a tensor in the fused one, and how many that has."""
    *head, member, last = name.split(".")
    start = rows = 0
    for other in members:
        if other == member:
            start = rows
        tensor = patch.tensors.get(".".join([*head, other, last]))
        rows += tensor.shape[0] if tensor else 0
    return start, rows


def _whole(name: str, live: str, shape: tuple[int, ...], has: tuple[int, ...]) -> Part:
    """Return the place of a tensor that has a live one of its own, whose last rows may be
    padding."""
    if name.endswith(_PADDED) and has[1:] == shape[1:] and has[:1] > shape[:1]:
        return Part(live, 0, shape[0])
    return Part(live)
