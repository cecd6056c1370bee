"""Memory that stays with the process: no new pages while it is kept, given back afterwards."""

import os
import pathlib
import platform
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")

SCRIPT = """
import contextlib, resource, sys, threading
import numpy as np
from safepatch_jax.runtime import pages

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() >> 20

def work():
    for _ in range(5):
        arrays = [np.ones(16 << 20, np.int8) for _ in range(8)] + [np.ones(96 << 20, np.int8)]
        del arrays

def both():
    work()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()

pages.one_heap()
kept = sys.argv[1] == "kept"
with pages.kept() if kept else contextlib.nullcontext():
    both()
    before = faults()
    both()
    print(faults() - before, resident())
print(resident())
before = faults()
for _ in range(20):
    np.ones(4 << 20, np.int8)
print(faults() - before)
"""


def measure(kind, **environment):
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, kind],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **environment},
    )
    return [int(word) for word in result.stdout.split()]


def test_what_is_freed_stays_and_is_given_back_in_the_end():
    plain = measure("plain")[0]
    if not plain:
        pytest.skip("this system does not count page faults")
    faults, held, left, later = measure("kept")
    assert faults < 100 < plain / 20 and held > 224 and left < held - 200
    # Small arrays afterwards are taken from the heap again, not from the system each time.
    assert later < 2 * (4 << 20) // os.sysconf("SC_PAGE_SIZE")


def test_a_choice_by_the_user_stays():
    faults = measure("kept", MALLOC_MMAP_THRESHOLD_="131072")[0]
    if not faults:
        pytest.skip("this system does not count page faults")
    assert faults > 2000
