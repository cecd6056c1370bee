"""Chains that no run has made: a log, and links of patch files as they are given; no JAX."""

from safepatch_jax.patch_file.log import (
    PatchLog,
    companion_hashes,
    folder_hash,
    patch_facts,
    patch_hash,
)
from safepatch_jax.patch_file.log_lines import FORMAT


def begin(workdir, start):
    """Begin the log of a chain without links on a model folder."""
    line = {
        "format": FORMAT,
        "source": str(start),
        "aligned": False,
        "folder": str(start),
        "model": folder_hash(start),
        "companions": companion_hashes(start),
        "settings": {},
        "versions": {},
    }
    return PatchLog.begin(workdir, line)


def next_number(log):
    return max(log.links, default=0) + 1


def log_link(log, name, patch, seed=0):
    """Log a patch file on the head as the next link."""
    parent = log.head
    line = {
        "number": next_number(log),
        "name": name,
        "parent": {"link": parent, "model": log.hash(parent)},
        "model": patch_hash(patch, "after"),
        "data": {"harmful": "x.csv", "category": name, "hash": "0" * 64, "records": 3},
        "seed": seed,
        "settings": {},
        "versions": {},
        "patch": patch_facts(patch),
    }
    log.append("link", line)
