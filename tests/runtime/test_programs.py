"""How JAX runs programs: settings that are made before it is used, each in a process of its own."""

import os
import platform
import subprocess
import sys

import pytest

SORTED = """
from safepatch_jax.runtime import programs
programs.one_thread_a_program()
import jax
sort = jax.jit(jax.numpy.sort)
x = jax.random.uniform(jax.random.key(0), (1 << 22,))
sort(x).block_until_ready()
print(sort(x).is_ready())
"""
FLAGS = """
import os
from safepatch_jax.runtime import programs
programs.one_thread_a_program()
print(os.environ["XLA_FLAGS"])
"""
ALLOCATED = """
import resource
import numpy as np
from safepatch_jax.runtime import programs
programs.keep_freed_memory()
for _ in range(800):
    np.ones(1 << 18)  # 2 MiB; NumPy asks for huge pages from 4 on
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


def output(code: str, **env: str) -> str:
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""} | env
    return subprocess.run(
        [sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True
    ).stdout.strip()


def test_a_call_returns_when_its_program_has_run():
    assert output(SORTED) == "True"


def test_the_users_flags_stay():
    flag = "--xla_cpu_prefer_vector_width=256"
    assert output(FLAGS, XLA_FLAGS=f"--xla_dump_to= {flag}") == f"--xla_dump_to= {flag}"
    assert "512" in output(FLAGS)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="memory is another allocator's")
def test_freed_memory_is_kept_unless_the_user_has_set_how():
    pages = 800 * (2 << 20) // os.sysconf("SC_PAGE_SIZE")
    assert int(output(ALLOCATED)) < pages / 4
    assert int(output(ALLOCATED, MALLOC_MMAP_THRESHOLD_="131072")) > pages / 2
