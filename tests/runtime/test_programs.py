"""How JAX runs programs: settings that are made before it is used, each in a process of its own."""

import os
import subprocess
import sys

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
