"""A bucket on loopback for tests: a server in a process of its own, and the variables by which the
clients find it."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

SERVER = pathlib.Path(__file__).with_name("bucket_server.py")
needed = pytest.mark.skipif(
    importlib.util.find_spec("gcsfs") is None, reason="gcsfs is not installed"
)


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
