"""A tiny OpenAI-compatible server on this machine, for judges and graders."""

import contextlib
import http.server
import json
import threading

import pytest

from safepatch_jax.evaluation.judges.endpoint import API_KEY


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append((self.path, self.headers, body))
            reply = self.next_reply()
        if callable(reply):
            reply = reply(body)
        if reply is None:
            self.connection.close()
            return
        if isinstance(reply, int):
            self.send_response(reply)
            self.send_header("retry-after-ms", "1")
            if 300 <= reply < 400:
                self.send_header("Location", "/elsewhere")
            content = f"the key {self.headers.get('Authorization')} is wrong".encode()
        else:
            self.send_response(200)
            content = reply
        if isinstance(reply, str):
            content = json.dumps({"choices": [{"message": {"content": reply}}]}).encode()
        self.end_headers()
        with contextlib.suppress(OSError):  # the client has had enough
            for part in [content] if isinstance(content, bytes) else content:
                self.wfile.write(part)

    def next_reply(self):
        if len(self.server.replies) > 1:
            return self.server.replies.pop(0)
        return self.server.replies[0]

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server whose `replies` are its next ones: a word, raw bytes or an iterator of them, an HTTP
    status, None, which hangs up, or a function of the request that returns one of these. The last
    one stays.

    `requests` holds (path, headers, body) of each request, `text` is its judge with one request at
    a time.
    """
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv(API_KEY, raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.lock, server.replies, server.requests = threading.Lock(), ["COMPLIED"], []
        server.address = f"endpoint:http://127.0.0.1:{server.server_port}/v1?model=org/judge"
        server.text = f"{server.address}&concurrency=1"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()
