"""Processes that are numbered by hand find one another, or each hears why not."""

import socket
import threading

import pytest

from safepatch_jax.runtime.meeting import meet


@pytest.fixture
def port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def together(port, numbers, counts=None, timeout=20.0):
    """Let processes meet, in threads; return what each of them is told."""
    told = [None] * len(numbers)

    def one(i):
        try:
            meet(f"127.0.0.1:{port}", (counts or [3] * len(numbers))[i], numbers[i], timeout)
        except ValueError as error:
            told[i] = str(error)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(numbers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return told


def test_all_come_in_any_order_and_the_port_is_free_again(port):
    assert together(port, [2, 0, 1]) == [None] * 3
    assert together(port, [1, 2, 0]) == [None] * 3
    socket.create_server(("127.0.0.1", port)).close()


def test_two_of_one_number(port):
    for text in together(port, [0, 1, 1]):
        assert text.startswith("Two processes have --process_id=1. Start the same command with")


def test_two_numbered_zero(port):
    told = together(port, [0, 0], timeout=2)
    assert any(f"Process 0 cannot open 127.0.0.1:{port}: Address already in use" in t for t in told)


def test_numbers_of_processes_that_differ(port):
    for text in together(port, [0, 1], [2, 3]):
        assert "Process 0 has --num_processes=2, process 1 has 3" in text


def test_who_does_not_come_is_named(port):
    told = together(port, [0, 2], timeout=1)
    assert told[0] == told[1]
    assert "within 1 s: there is none with --process_id=1. Start the same command" in told[0]
    assert "found nobody" in together(port, [1], timeout=1)[0]


def test_another_program_at_the_port(port):
    with socket.create_server(("127.0.0.1", port)) as server:

        def serve():
            with server.accept()[0] as connection:
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        threading.Thread(target=serve, daemon=True).start()
        assert "is no process 0 of a run" in together(port, [1])[0]
        assert "cannot open" in together(port, [0])[0]


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\n\r\n", b"[" * 5000, b"{}\n", b"\xff\n"])
def test_a_stranger_is_not_counted(port, sent):
    done = []
    thread = threading.Thread(target=lambda: done.append(together(port, [0, 1, 2])))

    def knock():
        for _ in range(200):
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=1) as s:
                    s.sendall(sent)
                return
            except OSError:
                pass

    stranger = threading.Thread(target=knock)
    stranger.start()
    thread.start()
    thread.join(60)
    assert done == [[None] * 3]
