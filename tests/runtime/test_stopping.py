"""SIGTERM: it waits for what defers it, and ends a process that waits for itself."""

import signal
import subprocess
import sys
import time

import pytest

from safepatch_jax.runtime import stopping
from safepatch_jax.runtime.workers import Workers, wait
from tests.calls import ROOT


@pytest.fixture
def handled(monkeypatch):
    before = signal.signal(signal.SIGTERM, stopping.on_signal)
    yield
    signal.signal(signal.SIGTERM, before)
    signal.alarm(0)


def test_it_waits_until_what_defers_it_has_run(handled):
    done = []
    with pytest.raises(SystemExit) as ended:
        with stopping.deferred(), stopping.deferred():
            signal.raise_signal(signal.SIGTERM)
            done.append("deferred")
        done.append("beyond")
    assert done == ["deferred"] and ended.value.code == 143


def test_a_listener_is_asked_after_what_defers_it(handled):
    with pytest.raises(SystemExit), stopping.listening():
        with stopping.deferred():
            signal.raise_signal(signal.SIGTERM)
            assert not stopping.requested()
        assert stopping.requested()
    stopping._State.requested = False


def test_workers_give_results_and_errors_in_order():
    with Workers(2) as pool:
        results = list(pool.map(lambda x, y: x - y, range(50), range(0, 100, 2)))
        assert results == [-x for x in range(50)]
        with pytest.raises(ZeroDivisionError):
            wait(pool.submit(lambda: 1 // 0))


@pytest.mark.parametrize(
    "begin, use",
    [
        ("", "pool.submit(len, 'x')"),
        ("future = pool.submit(time.sleep, 0.3)", "wait(future)"),
        ("results = pool.map(time.sleep, [0.3])", "list(results)"),
        ("pool.submit(time.sleep, 0.3), pool.submit(len, 'x')", "1 / 0"),
    ],
)
def test_a_pool_ends_when_sigterm_comes_within_its_locks(begin, use):
    """Between the taking of a lock and the block that gives it back."""
    script = f"""
import signal, sys, threading, time
from safepatch_jax.runtime import stopping
from safepatch_jax.runtime.workers import Workers, wait
signal.signal(signal.SIGTERM, stopping.on_signal)
enter = threading.Condition.__enter__
def interrupted(self):
    entered = enter(self)
    if threading.current_thread() is threading.main_thread():
        threading.Condition.__enter__ = enter
        signal.raise_signal(signal.SIGTERM)
    return entered
with Workers(1) as pool:
    {begin or "pass"}
    threading.Condition.__enter__ = interrupted
    {use}
"""
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, cwd=ROOT, timeout=20, capture_output=True)
    assert result.returncode == 143


def test_sigterm_in_a_block_that_raises_is_not_lost(handled):
    with pytest.raises(SystemExit):
        with stopping.deferred():
            signal.raise_signal(signal.SIGTERM)
            raise OSError("the disk is full")


def test_a_second_sigterm_does_not_wait(handled):
    done = []
    with pytest.raises(SystemExit), stopping.deferred():
        signal.raise_signal(signal.SIGTERM)
        done.append("first")
        signal.raise_signal(signal.SIGTERM)
        done.append("second")
    assert done == ["first"]


def test_what_has_not_begun_is_not_done_after_an_error():
    done = []
    with pytest.raises(KeyError), Workers(1) as pool:
        results = pool.map(lambda i: time.sleep(0.05) or done.append(i), range(40))
        next(results)
        raise KeyError
    assert 1 <= len(done) < 10


def test_a_process_that_waits_for_itself_is_ended(tmp_path):
    script = """
import signal, threading
from safepatch_jax.runtime import stopping
stopping._GRACE = 1
signal.signal(signal.SIGTERM, stopping.on_signal)
lock = threading.Lock()
lock.acquire()
try:
    signal.raise_signal(signal.SIGTERM)
finally:
    lock.acquire()
"""
    begun = time.monotonic()
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=60)
    assert result.returncode == -signal.SIGALRM and time.monotonic() - begun > 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_a_callback_swallows_comes_again(number):
    """A garbage collection calls back, and what is raised there is printed and lost."""
    script = f"""
import gc, signal, time
from safepatch_jax.runtime import stopping
stopping.install()
def once(*_):
    gc.callbacks.remove(once)
    signal.raise_signal({int(number)})
    for _ in range(1000):
        pass
gc.callbacks.append(once)
try:
    gc.collect()
    for _ in range(100):
        time.sleep(0.05)
except KeyboardInterrupt:
    raise SystemExit(130)
"""
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, timeout=60, capture_output=True, text=True
    )
    assert result.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    assert result.stderr == ""
