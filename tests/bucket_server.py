"""A server of Google Cloud Storage's JSON API on loopback, with faults: bucket_server.py PORT
FAULTS.

What gcsfs and tensorstore ask for, and no more: objects are listed, read, written, copied and
deleted, on conditions of their generation. FAULTS is a file that holds a JSON object:
  busy: so many of the next requests are answered by 503;
  denied: true for 403 of every request;
  hidden: names that listings leave out, as a listing that lags behind does.
"""

from __future__ import annotations

import contextlib
import email.parser
import http.server
import itertools
import json
import pathlib
import re
import sys
import threading
import urllib.parse


class Store:
    """Objects by bucket and name: (generation, content)."""

    def __init__(self):
        self.buckets: dict[str, dict[str, tuple[int, bytes]]] = {"bucket": {}}
        self.uploads: dict[str, dict] = {}
        self.lock, self.numbers = threading.RLock(), itertools.count(1001)


STORE = Store()
FAULTS = pathlib.Path(sys.argv[2]) if len(sys.argv) > 2 else None


class Answer(Exception):
    def __init__(self, code, content=b"", headers=()):
        self.code, self.content, self.headers = code, content, dict(headers)


def refuse(code, text):
    error = {"code": code, "message": text, "errors": [{"message": text, "reason": text}]}
    raise Answer(code, json.dumps({"error": error}).encode())


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer waits 40 ms for the client's next packet
    wbufsize = -1

    def log_message(self, *_):
        pass

    def _serve(self):
        body = self._body()
        url = urllib.parse.urlsplit(self.path)
        query = {k: v[0] for k, v in urllib.parse.parse_qs(url.query).items()}
        try:
            self._fail()
            answer = self._answered(url.path, query, body)
        except Answer as given:
            answer = given
        if isinstance(answer, dict):
            answer = Answer(200, json.dumps(answer).encode())
        with contextlib.suppress(ConnectionError):  # the client has gone
            self._send(answer)

    def _send(self, answer):
        self.send_response(answer.code)
        headers = {"Content-Type": "application/json"} | answer.headers
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.content)

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = do_PATCH = _serve

    def _body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _fail(self):
        if FAULTS is None or not FAULTS.exists():
            return
        with STORE.lock:
            faults = json.loads(FAULTS.read_text() or "{}")
            if faults.get("denied"):
                refuse(403, "Forbidden: no access to this object")
            if faults.get("busy", 0) > 0:
                FAULTS.write_text(json.dumps(faults | {"busy": faults["busy"] - 1}))
                refuse(503, "backendError")

    def _answered(self, path, query, body):
        if path == "/storage/v1/b" and self.command == "POST":
            name = json.loads(body)["name"]
            with STORE.lock:
                STORE.buckets.setdefault(name, {})
            return {"kind": "storage#bucket", "name": name}
        if match := re.fullmatch(r"/upload/storage/v1/b/([^/]+)/o(?:/)?", path):
            return self._uploaded(match[1], query, body)
        if match := re.fullmatch(r"/storage/v1/b/([^/]+)/o", path):
            return self._listed(match[1], query)
        if match := re.fullmatch(r"(?:/download)?/storage/v1/b/([^/]+)/o/([^/]+)", path):
            return self._one(match[1], urllib.parse.unquote(match[2]), query, path)
        if match := re.fullmatch(
            r"/storage/v1/b/([^/]+)/o/([^/]+)/(?:rewriteTo|copyTo)/b/([^/]+)/o/([^/]+)", path
        ):
            return self._copied(*map(urllib.parse.unquote, match.groups()))
        if match := re.fullmatch(r"/storage/v1/b/([^/]+)", path):
            self._bucket(match[1])
            return {"kind": "storage#bucket", "name": match[1], "location": "HERE"}
        if path.startswith("/batch/"):
            return self._batched(body)
        return refuse(404, f"no such path {path}")

    def _bucket(self, name):
        if name not in STORE.buckets:
            refuse(404, "The specified bucket does not exist.")
        return STORE.buckets[name]

    def _listed(self, bucket, query):
        with STORE.lock:
            names = sorted(self._bucket(bucket))
            faults = {}
            if FAULTS is not None and FAULTS.exists():
                faults = json.loads(FAULTS.read_text() or "{}")
            hidden, prefix = set(faults.get("hidden", ())), query.get("prefix", "")
            start, end = query.get("startOffset", ""), query.get("endOffset")
            delimiter, items, prefixes = query.get("delimiter"), [], set()
            for name in names:
                if not name.startswith(prefix) or name < start or (end and name >= end):
                    continue
                rest = name[len(prefix) :]
                if delimiter and delimiter in rest:
                    prefixes.add(prefix + rest[: rest.index(delimiter) + 1])
                elif name not in hidden:
                    items.append(self._described(bucket, name))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}

    def _described(self, bucket, name):
        generation, content = STORE.buckets[bucket][name]
        quoted = urllib.parse.quote(name, safe="")
        host = f"http://{self.headers['Host']}"
        return {
            "kind": "storage#object",
            "name": name,
            "bucket": bucket,
            "generation": str(generation),
            "metageneration": "1",
            "size": str(len(content)),
            "etag": str(generation),
            "mediaLink": f"{host}/download/storage/v1/b/{bucket}/o/{quoted}?alt=media",
            "updated": "2026-01-01T00:00:00Z",
            "timeCreated": "2026-01-01T00:00:00Z",
            "contentType": "application/octet-stream",
        }

    def _one(self, bucket, name, query, path):
        with STORE.lock:
            objects = self._bucket(bucket)
            generation, content = objects.get(name, (0, b""))
            wanted = query.get("ifGenerationMatch")
            if wanted is not None and int(wanted) != generation:
                refuse(412, "conditionNotMet")
            unwanted = query.get("ifGenerationNotMatch")
            if unwanted is not None and int(unwanted) == generation:
                raise Answer(304)
            if not generation:
                refuse(404, f"No such object: {bucket}/{name}")
            if self.command == "DELETE":
                del objects[name]
                raise Answer(204)
            if query.get("alt") == "media" or path.startswith("/download"):
                return self._media(generation, content)
            return self._described(bucket, name)

    def _media(self, generation, content):
        headers = {
            "Content-Type": "application/octet-stream",
            "x-goog-generation": str(generation),
        }
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not match:
            return Answer(200, content, headers)
        size = len(content)
        start = int(match[1]) if match[1] else max(0, size - int(match[2]))
        end = min(int(match[2]), size - 1) if match[1] and match[2] else size - 1
        if start >= size:
            return Answer(416, b"", {"Content-Range": f"bytes */{size}"})
        headers["Content-Range"] = f"bytes {start}-{end}/{size}"
        return Answer(206, content[start : end + 1], headers)

    def _uploaded(self, bucket, query, body):
        self._bucket(bucket)
        kind = query.get("uploadType")
        if kind == "media":
            return self._put(bucket, query["name"], body, query)
        if kind == "multipart":
            head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
            parts = email.parser.BytesParser().parsebytes(head + body).get_payload()
            boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
            # The parser may change line ends in binary parts, so the content is cut by hand.
            piece = body.split(b"--" + boundary)[2]
            content = re.split(rb"\r?\n\r?\n", piece, maxsplit=1)[1]
            content = re.sub(rb"\r?\n\Z", b"", content)
            about = json.loads(parts[0].get_payload())
            return self._put(bucket, about.get("name") or query["name"], content, query)
        if "upload_id" in query:
            return self._continued(bucket, query, body)
        token = str(next(STORE.numbers))
        name = query.get("name") or json.loads(body or b"{}").get("name")
        STORE.uploads[token] = {"name": name, "query": query, "content": b""}
        place = f"http://{self.headers['Host']}/upload/storage/v1/b/{bucket}/o"
        return Answer(200, b"", {"Location": f"{place}?uploadType=resumable&upload_id={token}"})

    def _continued(self, bucket, query, body):
        upload = STORE.uploads[query["upload_id"]]
        upload["content"] += body
        size = len(upload["content"])
        total = self.headers.get("Content-Range", "").rpartition("/")[2]
        if total == "*" or (total.isdigit() and size < int(total)):
            return Answer(308, b"", {"Range": f"bytes=0-{size - 1}"} if size else {})
        return self._put(bucket, upload["name"], upload["content"], upload["query"])

    def _put(self, bucket, name, content, query):
        with STORE.lock:
            objects = self._bucket(bucket)
            wanted = query.get("ifGenerationMatch")
            if wanted is not None and int(wanted) != objects.get(name, (0,))[0]:
                refuse(412, "conditionNotMet")
            objects[name] = next(STORE.numbers), content
            return self._described(bucket, name)

    def _copied(self, bucket, name, other, target):
        with STORE.lock:
            if name not in self._bucket(bucket):
                refuse(404, "No such object")
            content = STORE.buckets[bucket][name][1]
            about = self._put(other, target, content, {})
        return {"kind": "storage#rewriteResponse", "done": True, "resource": about} | about

    def _batched(self, body):
        """Answer several deletions in one request."""
        parts = []
        for match in re.finditer(rb"DELETE /storage/v1/b/([^/]+)/o/([^ ?]+)", body):
            bucket, name = (urllib.parse.unquote(x.decode()) for x in match.groups())
            with STORE.lock:
                there = self._bucket(bucket).pop(name, None)
            code = "204 No Content" if there else "404 Not Found"
            parts.append(
                f"--batch\r\nContent-Type: application/http\r\n\r\nHTTP/1.1 {code}\r\n\r\n"
            )
        content = "".join([*parts, "--batch--\r\n"]).encode()
        return Answer(200, content, {"Content-Type": "multipart/mixed; boundary=batch"})


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):
        """A client that went away is no error of ours."""


if __name__ == "__main__":
    server = Server(("127.0.0.1", int(sys.argv[1])), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()
