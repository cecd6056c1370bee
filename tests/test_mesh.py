"""Mesh text, sharding rules and their errors."""

import jax
import pytest

from safepatch_jax.mesh import Sharder, make_mesh
from safepatch_jax.models.config import config_from_hf
from safepatch_jax.models.table import param_table
from safepatch_jax.testing import tiny_config
from tests.conftest import sharder_of


def test_shapes():
    assert dict(make_mesh("data:1,fsdp:-1,tensor:2").shape) == {"data": 1, "fsdp": 4, "tensor": 2}
    assert dict(make_mesh("tensor:8").shape) == {"data": 1, "fsdp": 1, "tensor": 8}


@pytest.mark.parametrize(
    "text, message",
    [
        ("data:16", "needs 16 devices"),
        ("model:8", "is not one of"),
        ("data:-1,fsdp:-1", "may stand once"),
        ("data:x", "not a whole number"),
        ("data:1,data:8", "at most once"),
        ("data:3,fsdp:-1", "or a multiple"),
        ("fsdp:0", "at least 1"),
    ],
)
def test_mesh_errors(text, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(text, jax.devices())


def test_sharding_errors():
    sharder = sharder_of(8, tensor=2)
    with pytest.raises(ValueError, match="unknown logical axis 'width'"):
        sharder.sharding(("width",))
    with pytest.raises(ValueError, match="same mesh axis"):
        sharder.sharding(("heads", "mlp"))
    message = r"layers/q \(6, 9\): dimension 'heads' of 9 does not divide .*tensor = 2.*"
    with pytest.raises(ValueError, match=message + "--mesh=data:1,fsdp:8,tensor:1"):
        sharder.sharding(("layers", "heads"), (6, 9), "layers/q")


def test_rules():
    sharder = sharder_of(8, tensor=2)
    with pytest.raises(
        ValueError,
        match="rule of 'embed' names the mesh axis 'model'; the mesh has data, fsdp, tensor",
    ):
        sharder.with_rules(embed=("model",))
    with pytest.raises(ValueError, match="rules of experts are never used"):
        param_table(config_from_hf(tiny_config())).shardings(
            sharder.with_rules(experts=("tensor",))
        )
    free = sharder.with_rules(batch=(), features=("fsdp",))
    assert free.batch_ways == 1 and sharder.batch_ways == 4
    assert free.sharding(("batch", "features")).spec == jax.sharding.PartitionSpec(None, "fsdp")


def test_a_mesh_that_divides_is_named_and_divides():
    with pytest.raises(ValueError, match="Nearest mesh that divides it: --mesh=(.*).$") as caught:
        sharder_of(8, tensor=8).sharding(("kv_heads", "head_dim"), (6, 16), "k")
    mesh = str(caught.value).rpartition("--mesh=")[2].rstrip(".")
    assert mesh == "data:1,fsdp:4,tensor:2"
    Sharder(make_mesh(mesh)).sharding(("kv_heads", "head_dim"), (6, 16), "k")
