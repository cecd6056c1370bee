"""A registry that holds a line of four patches."""

import pytest

from safepatch_jax.registry.changes import add
from safepatch_jax.registry.store import Store
from tests.registry.lines import ENTRIES, write_line


@pytest.fixture(scope="session")
def line(tmp_path_factory):
    """Models and patch files, see `write_line`; tests do not change them."""
    return write_line(tmp_path_factory.mktemp("line"))


@pytest.fixture
def store(line, tmp_path):
    store = Store(str(tmp_path / "registry"))
    for name in ENTRIES:
        add(store, str(line / f"{name}.patch"), name)
    return store
