"""Buckets on loopback for tests: a server in a process of its own, and the variables by which the
clients find it. gs:// has a server of ours, s3:// that of the package moto."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

from safepatch_jax.runtime.addresses import BASE
from safepatch_jax.runtime.objects import filesystem

SERVER = pathlib.Path(__file__).with_name("bucket_server.py")
needed = pytest.mark.skipif(
    importlib.util.find_spec("gcsfs") is None, reason="gcsfs is not installed"
)
_MOTO = """
import signal
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
signal.pause()
"""


class Bucket:
    """A running server. `variables`: what the environment of its clients needs."""

    def __init__(self, folder: pathlib.Path, port: str):
        self._faults = folder / "faults.json"
        self.variables = {
            "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}",
            "TENSORSTORE_GCS_HTTP_URL": f"http://127.0.0.1:{port}",
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "emulator",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "SAFEPATCH_BUCKETS_DIR": str(folder / "buckets"),
        }

    @contextlib.contextmanager
    def faults(self, **faults):
        """Let requests fail while the block runs; see bucket_server.py."""
        self._faults.write_text(json.dumps(faults))
        try:
            yield
        finally:
            self._faults.unlink()


@contextlib.contextmanager
def running(folder: pathlib.Path):
    """Start a server with one empty bucket, named 'bucket'."""
    command = [sys.executable, str(SERVER), "0", str(folder / "faults.json")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Bucket(folder, process.stdout.readline().strip())
        finally:
            process.kill()


@pytest.fixture(scope="module")
def bucket_server(tmp_path_factory):
    """A running server that the clients of this process, and of those it starts, find."""
    with running(tmp_path_factory.mktemp("bucket")) as server:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in server.variables.items():
                patch.setenv(name, value)
            yield server


@pytest.fixture(scope="module")
def s3_server():
    """A running server of s3:// with one empty bucket, named 'bucket', that the clients of this
    process, and of those it starts, find."""
    for package in ("s3fs", "moto.server"):
        reason = f"{package} is not installed: pip install s3fs 'moto[server]'"
        pytest.importorskip(package, reason=reason)
    command = [sys.executable, "-c", _MOTO]
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, text=True, **quiet) as process:
        try:
            port = process.stdout.readline().strip()
            assert port, f"the server did not start: {' '.join(command)}"
            variables = {
                "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
                "AWS_ACCESS_KEY_ID": "of tests",
                "AWS_SECRET_ACCESS_KEY": "of tests",
                "AWS_DEFAULT_REGION": "us-east-1",
            }
            with pytest.MonkeyPatch.context() as patch:
                for name, value in variables.items():
                    patch.setenv(name, value)
                filesystem("s3").clear_instance_cache()  # another module's server had this client
                filesystem.cache_clear()
                filesystem("s3").mkdir("bucket")
                yield
        finally:
            process.kill()


@pytest.fixture(params=["gs", "s3"])
def bucket_either(request, tmp_path, monkeypatch):
    """An address of the test's own in a bucket of either kind."""
    request.getfixturevalue({"gs": "bucket_server", "s3": "s3_server"}[request.param])
    monkeypatch.setenv(BASE, str(tmp_path / "here"))
    return f"{request.param}://bucket/{request.node.name.partition('[')[0]}"
