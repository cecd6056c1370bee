"""SIGTERM: it waits for what is held, and ends a process that waits for itself."""

import signal
import subprocess
import sys
import time

import pytest

from safepatch_jax import stopping
from safepatch_jax.workers import Workers, wait
from tests.calls import ROOT


@pytest.fixture
def handled(monkeypatch):
    before = signal.signal(signal.SIGTERM, stopping.on_signal)
    yield
    signal.signal(signal.SIGTERM, before)
    signal.alarm(0)


def test_it_waits_until_what_is_held_has_run(handled):
    done = []
    with pytest.raises(SystemExit) as ended:
        with stopping.held(), stopping.held():
            signal.raise_signal(signal.SIGTERM)
            done.append("held")
        done.append("beyond")
    assert done == ["held"] and ended.value.code == 143


def test_who_listens_is_asked_after_what_is_held(handled):
    with pytest.raises(SystemExit), stopping.listening():
        with stopping.held():
            signal.raise_signal(signal.SIGTERM)
            assert not stopping.asked()
        assert stopping.asked()
    stopping._State.asked = False


def test_workers_give_results_and_errors_in_order():
    with Workers(2) as pool:
        assert list(pool.map(lambda x, y: x - y, range(50), range(0, 100, 2))) == [-x for x in range(50)]
        with pytest.raises(ZeroDivisionError):
            wait(pool.submit(lambda: 1 // 0))


@pytest.mark.parametrize("use", ["pool.submit(len, 'x')", "wait(pool.submit(time.sleep, 0.1))", "list(pool.map(len, ['x']))"])
def test_a_pool_ends_when_sigterm_comes_within_its_locks(use):
    """Between the taking of a lock and the block that gives it back."""
    script = f"""
import signal, threading, time
from safepatch_jax import stopping
from safepatch_jax.workers import Workers, wait
signal.signal(signal.SIGTERM, stopping.on_signal)
enter = threading.Condition.__enter__
def interrupted(self):
    entered = enter(self)
    if threading.current_thread() is threading.main_thread():
        signal.raise_signal(signal.SIGTERM)
    return entered
with Workers(2) as pool:
    wait(pool.submit(len, "x"))  # the threads have begun
    threading.Condition.__enter__ = interrupted
    try:
        {use}
    finally:
        threading.Condition.__enter__ = enter
"""
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=20).returncode == 143


def test_a_process_that_waits_for_itself_is_ended(tmp_path):
    script = ("import signal, threading\nfrom safepatch_jax import stopping\nstopping._GRACE = 1\n"
              "signal.signal(signal.SIGTERM, stopping.on_signal)\nlock = threading.Lock()\nlock.acquire()\n"
              "try:\n    signal.raise_signal(signal.SIGTERM)\nfinally:\n    lock.acquire()\n")
    begun = time.monotonic()
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=60)
    assert result.returncode == -signal.SIGALRM and time.monotonic() - begun > 1
