"""Shared fixtures: 8 simulated devices, a compile cache, tiny model folders."""

import os
import pathlib
import sys
import tempfile

import jax
import pytest

from safepatch_jax.mesh import Sharder, make_mesh
from safepatch_jax.testing import write_tiny_model
from tests.bucket import bucket_either, bucket_server, s3_server  # noqa: F401  (fixtures)
from tests.endpoint import server  # noqa: F401  (a fixture)
from tests.hub import hub  # noqa: F401  (a fixture)
from tests.jobs import machine_of

CACHE = pathlib.Path(tempfile.gettempdir()) / f"safepatch_jax_tests_{os.getuid()}"
# For the launchers that tests start; of these, XLA reads its own at its first program here too.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Else each of some hundred launchers compiles the sources of its libraries again, for seconds.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
# Fast to compile rather than fast: tests compile for minutes and compute for seconds. `make test`
# runs the tests of bits with XLA's own optimisation. (An XLA that does not know one of these ends
# with "Unknown flag in XLA_FLAGS": then it is left out here.)
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
)
# JAX has read the environment when it was imported.
jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
jax.config.update("jax_num_cpu_devices", 8)
# Where whole jobs run, by launchers of their own; the files there take longest.
LONG = ("launch", "studies", "api", "run", "planning", "runtime")


def pytest_collection_modifyitems(items):
    """Begin with long files: at the end one worker waits for the other's last file."""
    rank = {name: place for place, name in enumerate((*LONG, "tests"))}
    items.sort(key=lambda item: rank.get(item.path.parent.name, len(rank)))


def sharder_of(devices: int, tensor: int = 1) -> Sharder:
    """A mesh over the first so many simulated devices."""
    return Sharder(make_mesh(f"data:1,fsdp:-1,tensor:{tensor}", jax.devices()[:devices]))


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Drop compiled programs when there are many: each holds memory maps, and a process that has
    used up the system's number of them crashes in the compiler."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_text().count("\n") > 20_000:
        jax.clear_caches()


@pytest.fixture(scope="module")
def one_device():
    with machine_of(1):
        yield


@pytest.fixture(scope="session")
def sharder():
    return sharder_of(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A tiny model folder; read only."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")
