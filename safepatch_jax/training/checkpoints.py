"""Checkpoints within a training run, from which a killed run resumes with the bits that it would
have had.

A checkpoint is orbax's, written in the background: the state's arrays, and as JSON the position in
the data and the measures so far. It appears whole or not at all. A checksum of each array, computed
on the devices when it is saved, is compared after it is read; where they differ, the checkpoint
before it is used.
"""

from __future__ import annotations

import contextlib
import json
import logging
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from jax import lax

from safepatch_jax.io.checkpoint import from_disk, handler, literal, opened
from safepatch_jax.numerics import row_major_index
from safepatch_jax.runtime import addresses, files, mirror, processes
from safepatch_jax.runtime.console import say
from safepatch_jax.runtime.objects import Objects
from safepatch_jax.runtime.text import printable

KEPT = 2  # the last one may be damaged
_MOST_OF_REASON = 300  # characters
# In log records of orbax and asyncio about a failed write, which is also raised.
_RAISED_TOO = (
    "Handler Commit operations",
    "Save Finalize thread",
    "_SignalingThread.run() raised",
    "exception was never retrieved",
)


class Checkpoints:
    """The checkpoints of one training run.

    Args:
      folder: holds nothing else; made if it is not there.
      abstract: the state as ShapeDtypeStructs with shardings. A checkpoint may come from another
        mesh.
    """

    def __init__(self, folder: str | pathlib.Path, abstract: Any):
        self._folder, self._abstract = pathlib.Path(folder).absolute(), abstract
        processes.on_first(files.refuse_link, self._folder)
        absl_logging.get_absl_handler().addFilter(_is_not_raised_too)
        if not addresses.address_of(self._folder):
            processes.on_first(self._folder.mkdir, parents=True, exist_ok=True)
        self._aliases = contextlib.ExitStack()
        self._manager = ocp.CheckpointManager(
            self._aliases.enter_context(literal(self._folder)),
            item_handlers={"state": handler(abstract), "facts": ocp.JsonCheckpointHandler()},
            options=ocp.CheckpointManagerOptions(max_to_keep=KEPT, cleanup_tmp_directories=True),
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        """Finish what is being written. A failure is reported and not raised, since a run that has
        come here no longer needs the checkpoint."""
        try:
            self.wait()
        except OSError as error:
            # An OSError that ends the block may be this very one.
            if kind is None or not issubclass(kind, OSError):
                say(f"  {error}")
        # `close` raises again what `wait` has raised.
        with contextlib.suppress(Exception):
            self._manager.close()
        self._aliases.close()

    def restore(self) -> tuple[Any, dict[str, Any]] | None:
        """Return state and facts of the last checkpoint that is intact; None where there is none.

        Checkpoints that cannot be read, or whose arrays are not as they were saved, are reported
        and deleted.
        """
        for step in processes.broadcast(sorted(self._manager.all_steps(), reverse=True)):
            reason, content = self._read(step)
            if not reason:
                return content
            say(
                f"  The checkpoint of step {step} is damaged ({reason}). It is deleted; what was "
                "saved before it, or the start, takes its place."
            )
            processes.on_first(_delete, self._folder / str(step))
            self._manager.reload()
        return None

    def _read(self, step: int) -> tuple[str, tuple[Any, dict[str, Any]] | None]:
        """Return why a checkpoint cannot be used ('' if it can), the same in all processes, and
        what it holds.

        Orbax would wait for all processes while it reads, also for one that has failed; so each
        reads its own parts here.
        """
        folder, flat, reason = self._folder / str(step), _flat(self._abstract), ""
        try:
            metadata = _metadata(folder / "facts" / "metadata")
            saved, facts = _facts(metadata)
            arrays = {name: _stored_array(folder / "state", name, x) for name, x in flat.items()}
        except Exception as error:  # whatever damaged bytes make their readers raise
            reason = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
        if reasons := list(filter(None, processes.everyones(reason))):
            return reasons[0], None
        for name, value in checksums(arrays).items():
            if saved.get(name) != value:
                return f"{name} is not as it was saved", None
        state = jax.tree.unflatten(jax.tree.structure(self._abstract), arrays.values())
        return "", (state, facts)

    def save(self, step: int, state: Any, facts: Mapping[str, Any]) -> None:
        """Write a checkpoint. When this returns, each process has copied its part of the state to
        its host's memory, from where it is written in the background.

        Raises:
          OSError: the disk is full or cannot be written; for this checkpoint or the one before.
        """
        flat = _flat(state)
        facts = json.loads(json.dumps(facts))  # a copy: they are written in the background too
        with self._explained():
            self._manager.save(
                step,
                force=True,
                args=ocp.args.Composite(
                    facts=ocp.args.JsonSave(
                        {
                            "facts": facts,
                            "facts_sha256": files.text_hash(facts),
                            "checksums": checksums(flat),
                        }
                    ),
                    state=ocp.args.PyTreeSave(flat),
                ),
            )

    def wait(self) -> None:
        """Return when everything is written. Raises OSError as `save` does."""
        with self._explained():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Raise a failed write as an OSError that says what to do about it."""
        try:
            yield
        except ocp.checkpoint_manager.StepAlreadyExistsError:
            raise
        except Exception as error:
            if not from_disk(error):
                raise
            # Tensorstore's reasons end with pages of its settings.
            reason = printable(str(error.__cause__ or error).partition("\n")[0], _MOST_OF_REASON)
            size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self._abstract))
            raise OSError(
                f"Cannot write a checkpoint to {self._folder}: {reason}. It needs {size:,} bytes, "
                f"{KEPT} are kept; free space, or write none (--run.checkpoint_minutes=0), then "
                "give the same command again."
            ) from error


def _delete(folder: pathlib.Path) -> None:
    shutil.rmtree(folder, ignore_errors=bool(addresses.address_of(folder)))
    mirror.delete(folder)


def _metadata(path: pathlib.Path) -> dict[str, Any]:
    if address := addresses.address_of(path):
        return json.loads(Objects(address).read() or b"")
    return files.read_json(path)


def _is_not_raised_too(record: logging.LogRecord) -> bool:
    """Return whether to keep a log record: failed writes, which orbax and asyncio log, are raised
    too."""
    return not (record.exc_info and any(text in record.getMessage() for text in _RAISED_TOO))


def _facts(metadata: Mapping[str, Any]) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """Return (checksums by array, facts) as `save` has written them. Raises ValueError if they are
    damaged."""
    saved, facts = metadata.get("checksums"), metadata.get("facts")
    if not isinstance(saved, dict) or not isinstance(facts, dict):
        raise ValueError("its facts or checksums are gone")
    digest = files.text_hash(facts)  # checkpoints of earlier versions have none
    if metadata.get("facts_sha256", digest) != digest:
        raise ValueError("its facts are not as they were saved")
    return saved, facts


def _stored_array(folder: pathlib.Path, name: str, abstract: jax.ShapeDtypeStruct) -> jax.Array:
    """Read this process's parts of an array. Raises ValueError if it is absent, damaged, or of
    another shape or dtype."""
    stored = opened(folder, name)
    if stored.shape != abstract.shape or stored.dtype.numpy_dtype != abstract.dtype:
        raise ValueError(
            f"{name} is {stored.dtype.name} {stored.shape}, and not {abstract.dtype} "
            f"{abstract.shape}"
        )
    return jax.make_array_from_callback(
        abstract.shape, abstract.sharding, lambda part: stored[part].read().result()
    )


def _flat(tree: Any) -> dict[str, Any]:
    """Return the leaves of a state by name, in their order."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): x
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def checksums(arrays: Mapping[str, jax.Array]) -> dict[str, int]:
    """Return a checksum of each array's bits, whatever its sharding; a change of one entry always
    changes it."""
    return {name: int(x) for name, x in jax.device_get(_checksums(dict(arrays))).items()}


@jax.jit
def _checksums(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    def checksum(x):
        bits = x.astype(jnp.uint32) if x.dtype == bool else lax.bitcast_convert_type(x, jnp.uint32)
        # Modulo 2^32 a sum has no order, and an odd factor loses nothing.
        factors = 2 * row_major_index(x.shape, range(x.ndim), jnp.uint32(0)) + 1
        return jnp.sum(bits * factors, dtype=jnp.uint32)

    return {name: checksum(x) for name, x in arrays.items()}
