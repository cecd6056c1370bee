"""A tiny Hugging Face Hub on this machine, and a cache of its own for each test."""

import base64
import hashlib
import http.server
import json
import pathlib
import re
import threading
import urllib.parse

import pytest

_API = re.compile(r"/api/(models|datasets)/([\w.-]+/[\w.-]+)(?:/revision/(.+))?")
_FILE = re.compile(r"/(datasets/)?([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)")
_CODES = {"GatedRepo": 403, "RepoNotFound": 401, "RevisionNotFound": 404, "EntryNotFound": 404}


def commit_of(contents):
    """Return a hash that stands for the commit of some files."""
    return hashlib.sha1(repr(sorted(contents.items())).encode()).hexdigest()


def files_of(folder):
    """Return the bytes of a folder's files by name."""
    contents = {}
    for path in pathlib.Path(folder).rglob("*"):
        if path.is_file():
            contents[path.relative_to(folder).as_posix()] = path.read_bytes()
    return contents


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = urllib.parse.urlsplit(self.path).path
        self.server.asked.append(f"{self.command} {path}")
        if self.server.status:
            self.reply(self.server.status, b"{}")
        elif match := _API.fullmatch(path):
            self.tell(match[1], match[2], urllib.parse.unquote(match[3] or "main"))
        elif match := _FILE.fullmatch(path):
            kind = "datasets" if match[1] else "models"
            revision, file = map(urllib.parse.unquote, (match[3], match[4]))
            self.send_file(kind, match[2], revision, file)
        else:
            self.reply(404, b"{}")

    do_HEAD = do_GET

    def find(self, kind, name, revision, gate=False):
        """Return commit and files; None where the reply is an error, which is sent."""
        repository = self.server.repositories.get((kind, name))
        if repository is None:
            return self.refuse("RepoNotFound")
        if gate and name in self.server.gated:
            return self.refuse("GatedRepo")
        commit = repository["refs"].get(revision, revision)
        if commit not in repository["commits"]:
            return self.refuse("RevisionNotFound")
        return commit, repository["commits"][commit]

    def tell(self, kind, name, revision):
        if found := self.find(kind, name, revision):
            commit, contents = found
            rows = [{"rfilename": file, "size": len(x)} for file, x in contents.items()]
            reply = {"id": name, "sha": commit, "siblings": rows, "private": False, "tags": []}
            self.reply(200, json.dumps(reply).encode())

    def send_file(self, kind, name, revision, file):
        if found := self.find(kind, name, revision, gate=True):
            commit, contents = found
            if file not in contents:
                self.refuse("EntryNotFound")
                return
            digest = hashlib.sha256(contents[file]).hexdigest()
            self.reply(200, contents[file], {"X-Repo-Commit": commit, "ETag": f'"{digest}"'})

    def do_POST(self):
        path = urllib.parse.urlsplit(self.path).path
        self.server.asked.append(f"POST {path}")
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.status:
            self.reply(self.server.status, b'{"error": "no right to write"}')
        elif path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self.reply(200, json.dumps({"url": f"{self.server.address}/org/new"}).encode())
        elif path == "/api/validate-yaml":
            self.reply(200, b'{"errors": [], "warnings": []}')
        elif "/preupload/" in path:
            rows = []
            for file in json.loads(body)["files"]:
                row = {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                rows.append(row)
            self.reply(200, json.dumps({"files": rows}).encode())
        else:
            contents = {}
            for line in body.splitlines():
                row = json.loads(line)
                if row["key"] == "file":
                    contents[row["value"]["path"]] = base64.b64decode(row["value"]["content"])
            self.server.pushed.append(contents)
            commit = commit_of(contents)
            reply = {"commitUrl": f"{self.server.address}/org/new/commit/{commit}"}
            self.reply(200, json.dumps(reply | {"commitOid": commit}).encode())

    def refuse(self, code):
        self.reply(_CODES[code], b"{}", {"X-Error-Code": code})

    def reply(self, status, content, headers=None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args):
        pass


class Hub(http.server.ThreadingHTTPServer):
    """The server: `asked` are the requests so far, `gated` the names of gated repositories,
    `status` is an error with which everything is answered; `created` and `pushed` have what was
    sent."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.repositories, self.gated, self.status = {}, set(), 0
        self.asked, self.created, self.pushed = [], [], []

    def put(self, name, contents, revision="main", kind="models"):
        """Add a commit to a repository, to which a branch then points; return its hash."""
        empty = {"refs": {}, "commits": {}}
        repository = self.repositories.setdefault((kind, name), empty)
        commit = commit_of(contents)
        repository["refs"][revision] = commit
        repository["commits"][commit] = contents
        return commit


def use(monkeypatch, cache, address="", offline=False):
    """Let huggingface_hub use a cache, and a server or none."""
    from huggingface_hub import constants, file_download

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    if address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        for module in (constants, file_download):  # versions before 1 have it in the second too
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub with nothing in it, and an empty cache `hub.cache`."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Hub() as server:
        server.cache = tmp_path / "cache"
        use(monkeypatch, server.cache, server.address)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def lay_out(cache, name, contents, revision="main", kind="models"):
    """Lay files out as the Hub's cache does: blobs, and a snapshot of links to them; return the
    snapshot's folder."""
    root = pathlib.Path(cache, f"{kind}--{name.replace('/', '--')}")
    folder = root / "snapshots" / commit_of(contents)
    (root / "blobs").mkdir(parents=True, exist_ok=True)
    for file, content in contents.items():
        blob = root / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(blob)
    reference = root / "refs" / revision
    reference.parent.mkdir(parents=True, exist_ok=True)
    reference.write_text(folder.name)
    return folder
