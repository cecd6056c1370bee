"""A backbone, a patched model, and the patch between them."""

import pytest

from safepatch_jax.patch_file.create import create
from safepatch_jax.testing import write_tiny_model
from tests.patch_file.models import patched_copy


@pytest.fixture
def pair(tmp_path):
    """A backbone in several files, a patched model, and the patch between them."""
    base = write_tiny_model(tmp_path / "base", dtype="bfloat16", shard_bytes=16_000)
    model = patched_copy(base, tmp_path / "model")
    create(base, model, tmp_path / "x.patch", {"seed": 3})
    return base, model, tmp_path / "x.patch"
