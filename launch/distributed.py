"""Flags with which a launcher runs in several processes, one on each host."""

from __future__ import annotations

import os
import sys

from absl import flags

from safepatch_jax.runtime import processes

_DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "This is one of several processes, which find one another: the command was started on every "
    "worker of a TPU pod slice, or by SLURM (srun), Open MPI or Kubernetes.",
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "HOST:PORT of process 0, which opens it, where the processes cannot find one another. Each "
    "also needs --num_processes and --process_id.",
)
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "How many processes there are; with --coordinator."
)
_PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "Which one this is, from 0; with --coordinator."
)


def join() -> None:
    """Join the other processes if the flags name any.

    Raises:
      ValueError: as `processes.initialize`.
    """
    by_hand = (_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    if not _DISTRIBUTED.value and by_hand == (None, None, None):
        return
    processes.initialize(*by_hand)
    import jax

    if jax.default_backend() == "cpu":
        # gloo writes a line for each device to stdout, past Python.
        stdout = os.dup(sys.stdout.fileno())
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.stdout = os.fdopen(stdout, "w")
