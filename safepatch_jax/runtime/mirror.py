"""Folders of buckets, worked on through local ones that stand for them (see `addresses`).

Publication without renaming: the list of a folder (a stage's manifest.json, else published.json)
is deleted first and written last, and readers trust that list alone: names, sizes, SHA-256. A
folder that is being written has the object `.publishing`, so that one which a killed writer left
is known. Arrays are written to the bucket directly by all processes (orbax), under the name that
their folder will have, before its list.
"""

from __future__ import annotations

import contextlib
import functools
import json
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from safepatch_jax.runtime import addresses, files, lease
from safepatch_jax.runtime.addresses import address_of
from safepatch_jax.runtime.holding import Held, check_leases, leased, leases_above
from safepatch_jax.runtime.listing import below, inside, listed_outputs
from safepatch_jax.runtime.objects import Objects
from safepatch_jax.runtime.reading import Refused

STAGE_LIST, LIST, PUBLISHING = "manifest.json", "published.json", ".publishing"
_ARRAYS = "_CHECKPOINT_METADATA"  # orbax puts it into each folder of arrays
_SPARE = 1 << 30  # bytes of the local disk that stay free


def stand_in(address: str) -> pathlib.Path:
    """Return the local path that stands for an address; what is put in place there from now on is
    published."""
    return addresses.stand_in(address)


def publish(path: pathlib.Path) -> None:
    """Bring what was put in place at a path to its address, if it has one and lies in nothing that
    is still being filled. Raises ValueError if the bucket cannot be used, or a lease is lost."""
    address = address_of(path)
    if not address or addresses.is_partial(path):
        return
    check_leases(address)
    if path.is_file():
        Objects(address).upload({"": path})
        return
    _publish_folder(path, Objects(address))
    for workspace in Held.workspaces:
        workspace.took(path)


def _publish_folder(folder: pathlib.Path, objects: Objects) -> None:
    listed = STAGE_LIST if (folder / STAGE_LIST).is_file() else LIST
    paths = below(folder)
    last = paths.pop(listed, None)
    if last is None:  # a stage's list has its arrays, all else that is there before
        there = objects.sizes().keys() - {PUBLISHING, lease.NAME}
        outputs = objects.hashes(there) | files.folder_hashes(folder)
    check = functools.partial(check_leases, objects.address)
    objects.write(PUBLISHING, b"")
    objects.delete([STAGE_LIST, LIST])
    objects.upload(paths, check)
    check()
    if last is None:
        content = json.dumps({"format": 1, "outputs": outputs}, indent=2)
        objects.write(LIST, content.encode())
    else:
        objects.upload({STAGE_LIST: last})
    objects.delete([PUBLISHING])


@contextlib.contextmanager
def filling(path: pathlib.Path, replace: bool | None) -> Iterator[None]:
    """Make the address of a path, if it has one, ready for what the block puts there, and publish
    that at the end. A folder below no lease that is held has one of its own meanwhile.

    Args:
      replace: what is there already; None where a file is written, not a folder.

    Raises:
      ValueError: not `replace`, and there is something published, or that is not ours; or another
        command is filling the folder.
    """
    if not (address := address_of(path)) or addresses.is_partial(path):
        yield
        return
    with contextlib.ExitStack() as stack:
        if replace is not None and not leases_above(address):
            stack.enter_context(leased(address))
        if not replace:
            refuse_full(path)
            files.delete(path)  # a copy of what is no longer there, or what was never published
        objects = Objects(address)
        if replace is not None:
            check_leases(address)
            objects.write(PUBLISHING, b"")  # first: what a kill leaves is known as half-written
            objects.delete([STAGE_LIST, LIST])
            objects.delete(objects.sizes().keys() - {lease.NAME, PUBLISHING})
        yield
        publish(path)


def refuse_full(path: pathlib.Path) -> None:
    """Raise ValueError if there is something at the address of a path, if it has one, but for what
    a killed writer left."""
    if not (address := address_of(path)) or addresses.is_partial(path):
        return
    check_leases(address)
    names = Objects(address).sizes().keys() - {lease.NAME}
    abandoned = PUBLISHING in names and not names & {STAGE_LIST, LIST}
    if not abandoned and (names or Objects(address).exists()):
        raise ValueError(
            f"'{address}' exists and is not empty; nothing was written. Give another address or "
            "remove it first."
        )


files.checks.append(refuse_full)
files.fillings.append(filling)


def fetch(path: pathlib.Path) -> pathlib.Path:
    """Bring what is at the address of a path to that path, verified by its list where it has one;
    what is there already with the same list is not read again.

    Returns:
      the path.

    Raises:
      ValueError: there is nothing, it is half-written or not as its list says, the disk is too
        small, or the bucket cannot be used.
    """
    objects = Objects(address_of(path))
    if (listed := objects.read(LIST)) is not None:
        _fetch_listed(objects, path, listed_outputs(listed))
        return path
    if objects.exists():
        files.delete(path)
        objects.download({"": path})
        return path
    sizes = objects.sizes()
    if PUBLISHING in sizes:
        raise _half_written(objects.address)
    if outputs := _listed_above(objects.address):
        _fetch_listed(objects, path, outputs)
        return path
    if not sizes:
        raise Refused(f"There is nothing at {objects.address}. Is the address right?")
    tags, have = json.dumps(objects.tags()), path.with_name(f".{path.name}.list")
    if not (path.is_dir() and have.is_file() and have.read_text() == tags):
        files.delete(path)
        _make_room(sum(sizes.values()), path)
        objects.download({name: inside(path, name) for name in sizes})
        have.write_text(tags)
    return path


def _fetch_listed(
    objects: Objects, path: pathlib.Path, outputs: Mapping[str, Mapping[str, Any]]
) -> None:
    """Bring what a list has, unless it is here: noted when it was brought, or by its hashes where
    this process has published it itself."""
    have, listed = path.with_name(f".{path.name}.list"), json.dumps(outputs)
    if path.is_dir() and have.is_file() and have.read_text() == listed:
        return
    sizes = {name: file.stat().st_size for name, file in below(path).items()}
    same = sizes == {name: entry["bytes"] for name, entry in outputs.items()}
    if not (same and files.folder_hashes(path) == outputs):
        files.delete(path)
        _download(objects, path, outputs, objects.address)
    have.write_text(listed)


def _half_written(address: str) -> Refused:
    return Refused(
        f"{address} is half-written: its writer is at work or was killed. Wait for it, or give the "
        "command that wrote it again."
    )


def _listed_above(address: str) -> dict[str, dict[str, Any]]:
    """Return what the list of a folder that holds an address has below it, such as of the model of
    a stage; {} where there is none. Raises ValueError if that folder is half-written."""
    parent, _, name = address.rpartition("/")
    if parent.count("/") < 3:  # a bucket
        return {}
    above = Objects(parent)
    for listed in (STAGE_LIST, LIST):
        content = above.read(listed)
        if content is not None and b'"outputs"' in content:
            outputs, skip = listed_outputs(content), len(name) + 1
            return {x[skip:]: entry for x, entry in outputs.items() if x.startswith(f"{name}/")}
    if above.read(PUBLISHING) is not None:
        raise _half_written(parent)
    return {}


def refresh(folder: pathlib.Path) -> None:
    """Make the local folder of a stage that of the bucket: with the same manifest, and nothing of
    an older one."""
    if not (address := address_of(folder)):
        return
    listed, have = Objects(address).read(STAGE_LIST), folder / STAGE_LIST
    if listed is None:
        have.unlink(missing_ok=True)  # what else is there may be on its way to the bucket
    elif not have.is_file() or have.read_bytes() != listed:
        files.delete(folder)
        folder.mkdir(parents=True)
        have.write_bytes(listed)


def bring(folder: pathlib.Path, outputs: Mapping[str, Mapping[str, Any]]) -> None:
    """Bring the outputs of a stage that are missing locally, but for arrays, which are read where
    they are. Raises ValueError as `fetch`."""
    if not (address := address_of(folder)):
        return
    Held.used.add(folder)
    arrays = [name.removesuffix(_ARRAYS) for name in outputs if name.endswith("/" + _ARRAYS)]
    missing = {}
    for name, entry in outputs.items():
        path = folder / name
        here = path.is_file() and path.stat().st_size == entry["bytes"]
        if not here and not name.startswith(tuple(arrays)):
            missing[name] = entry
    _download(Objects(address), folder, missing, address)


def bring_listed(folder: pathlib.Path) -> None:
    """Bring the outputs of a stage that a run has made, as `bring`, if the folder stands for one of
    a bucket and all of them are there."""
    if not (address := address_of(folder)):
        return
    refresh(folder)
    if (folder / STAGE_LIST).is_file():
        outputs = listed_outputs((folder / STAGE_LIST).read_bytes())
        if outputs.keys() <= Objects(address).sizes().keys():
            bring(folder, outputs)


def bring_file(path: pathlib.Path) -> None:
    """Make a local file that of its address, if it has one; one that is not there is deleted."""
    if address := address_of(path):
        content = Objects(address).read()
        if content is None:
            path.unlink(missing_ok=True)
        elif not path.is_file() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_bytes(path, content)


def alone(folder: pathlib.Path) -> contextlib.AbstractContextManager[None]:
    """Return a context that holds the lease of a folder, if it stands for one of a bucket. Raises
    ValueError where another run has it."""
    address = address_of(folder)
    return leased(address) if address else contextlib.nullcontext()


def is_published(folder: pathlib.Path) -> bool:
    """Return whether there is a folder with a list at the address of a path, or at the path itself
    if it has none."""
    if address := address_of(folder):
        return Objects(address).read(LIST) is not None
    return folder.is_dir()


def bring_whole(folder: pathlib.Path) -> None:
    """Bring all outputs of a stage, also arrays. Raises ValueError as `fetch`."""
    refresh(folder)
    if (folder / STAGE_LIST).is_file():
        outputs = listed_outputs((folder / STAGE_LIST).read_bytes())
        if not json.loads((folder / STAGE_LIST).read_bytes()).get("deleted"):
            _download(Objects(address_of(folder)), folder, outputs, address_of(folder))


def _download(
    objects: Objects, folder: pathlib.Path, outputs: Mapping[str, Mapping[str, Any]], where: str
) -> None:
    if not outputs:
        return
    _make_room(sum(entry["bytes"] for entry in outputs.values()), folder)
    paths = {name: inside(folder, name) for name in outputs}
    wanted = {name: entry["sha256"] for name, entry in outputs.items()}
    if others := objects.download(paths, wanted):
        raise Refused(
            f"{where}/{others[0]} has other bytes than were published (SHA-256). Delete that "
            "folder in the bucket, and give the command that wrote it again."
        )


def has_any(folder: pathlib.Path) -> bool:
    """Return whether the bucket has more of a folder than its list; False without an address."""
    if not (address := address_of(folder)):
        return False
    return bool(Objects(address).sizes().keys() - {STAGE_LIST})


def is_one(folder: pathlib.Path) -> bool:
    """Return whether a folder stands for one of a bucket."""
    return bool(address_of(folder))


def damage(folder: pathlib.Path, outputs: Mapping[str, Mapping[str, Any]], verify: bool) -> str:
    """Say what of a stage's outputs in the bucket is not as listed; '' if nothing is.

    Args:
      verify: read them all, but for what was read before and has not changed since.
    """
    objects = Objects(address_of(folder))
    sizes, tags = objects.sizes(), objects.tags()
    for name, entry in outputs.items():
        if sizes.get(name) != entry["bytes"]:
            return f"{name} is missing in the bucket or has another size than its manifest says"
    unread = []
    for name, entry in outputs.items():
        if verify and Held.compared.get(f"{objects.address}/{name}") != (tags[name], entry):
            unread.append(name)
    for name, found in objects.hashes(unread).items():
        if found["sha256"] != outputs[name]["sha256"]:
            return f"{name} has other bytes in the bucket than its manifest says (SHA-256)"
        Held.compared[f"{objects.address}/{name}"] = tags[name], outputs[name]
    return ""


def array_hashes(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Return {name: {bytes, sha256}} of what was written to the bucket directly while a folder was
    being filled; {} where it has no address."""
    if not (address := address_of(folder)):
        return {}
    objects = Objects(address)
    return objects.hashes(objects.sizes().keys() - {PUBLISHING, lease.NAME})


def delete(path: pathlib.Path) -> None:
    """Delete what is at the address of a path, its list first, if it has an address."""
    if address := address_of(path):
        check_leases(address)
        objects = Objects(address)
        if names := objects.sizes().keys() - {PUBLISHING}:
            objects.write(PUBLISHING, b"")  # what a kill leaves is known as half-written
            objects.delete([STAGE_LIST, LIST])
            objects.delete(names)
        objects.delete([PUBLISHING])


def folders(folder: pathlib.Path) -> list[str]:
    """Return the names of folders in one, of a bucket where it stands for an address."""
    if address := address_of(folder):
        return Objects(address).folders()
    return sorted(path.name for path in folder.glob("*") if path.is_dir())


def rewritten(folder: pathlib.Path) -> None:
    """Write the manifest of a stage, whose outputs were deleted, to the bucket, and delete them
    there."""
    if address := address_of(folder):
        check_leases(address)
        objects = Objects(address)
        objects.upload({STAGE_LIST: folder / STAGE_LIST})
        objects.delete(objects.sizes().keys() - {STAGE_LIST})


def forget(folder: pathlib.Path) -> None:
    """Delete what this process has of a folder of a bucket, which stays as it is there."""
    if is_one(folder):
        files.delete(folder)


def delete_others(stages: pathlib.Path, keep: Iterable[str]) -> None:
    """Delete folders of stages from the bucket that are not kept, and checkpoints; what no run has
    made stays."""
    if not (address := address_of(stages)):
        return
    check_leases(address)
    for name in Objects(address).folders():
        objects = Objects(f"{address}/{name}")
        ours = name.endswith((".steps", ".lock")) or objects.read(STAGE_LIST) is not None
        if ours and name not in keep:
            objects.delete([STAGE_LIST])
            objects.delete(objects.sizes())


def written(path: pathlib.Path) -> None:
    """Bring a file that was added to a published folder to the bucket, if it has an address."""
    if address := address_of(path):
        check_leases(address)
        Objects(address).upload({"": path})


def shared(path: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Let the other processes read the files of a folder; return {name: {bytes, sha256}} of them.

    A folder that is published lies in the bucket; one within another that is still being filled is
    laid into a place of its own, see `end_share`.
    """
    outputs = files.folder_hashes(path)
    if addresses.is_partial(path):
        _share(path).upload({name: path / name for name in outputs})
    return outputs


def take_share(path: pathlib.Path, outputs: Mapping[str, Mapping[str, Any]]) -> None:
    """Bring what process 0 has shared to the same path of this process."""
    files.delete(path)
    path.mkdir(parents=True)
    objects = _share(path) if addresses.is_partial(path) else Objects(address_of(path))
    _download(objects, path, outputs, objects.address)


def end_share(path: pathlib.Path) -> None:
    """Delete the place through which a folder was shared, if it had one."""
    if addresses.is_partial(path):
        objects = _share(path)
        objects.delete(objects.sizes())


def _share(path: pathlib.Path) -> Objects:
    parent, _, name = address_of(path).rpartition("/")
    return Objects(f"{parent}/.sharing/{name}")


def _make_room(needed: int, folder: pathlib.Path) -> None:
    """Delete local copies of other stages until so many bytes fit on the disk, the oldest first.
    Raises ValueError if they do not."""
    parent = next(path for path in (folder, *folder.parents) if path.exists())
    for victim in _copies(folder):
        if shutil.disk_usage(parent).free >= needed + _SPARE:
            return
        for path in victim.iterdir():
            if path.name != STAGE_LIST:
                files.delete(path)
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise Refused(
            f"{address_of(folder)} has {needed:,} bytes, and {parent} has {free:,} free. Give a "
            f"larger disk with {addresses.BASE}=DIR."
        )


def _copies(wanted: pathlib.Path) -> list[pathlib.Path]:
    """Return the local copies of stages but for one, the oldest first."""
    found = [path.parent for path in wanted.parent.glob(f"*/{STAGE_LIST}")]
    others = [x for x in found if x != wanted and x not in Held.used]
    return sorted(others, key=lambda x: x.stat().st_atime)
