"""The table of chips, and mistakes in naming a topology."""

import importlib.util
import itertools

import jax
import pytest

from safepatch_jax.planning.cards import CARDS, target_config
from safepatch_jax.planning.chips import CHIPS, GIB, POOL, present, topology
from tests.conftest import sharder_of


def test_the_table_is_plausible():
    kinds = list(itertools.chain.from_iterable(chip.kinds for chip in CHIPS.values()))
    assert len(kinds) == len(set(kinds))
    for chip in CHIPS.values():
        assert 10 * GIB < chip.hbm < 200 * GIB and 1e14 < chip.flops < 1e15
        assert chip.flops > chip.bandwidth > chip.link > chip.network
        assert chip.platform == ("gpu" if "NVIDIA" in chip.kinds[0] else "tpu")


@pytest.mark.parametrize(
    "text",
    ["v9:2x2", "v5e", "v5e:4", "v5e:2x2x2", "v4:2x2", "v6e-64", "4x4", "h100:2x2", "v5e:4x-4", ""],
)
def test_unknown_topologies_list_the_forms(text):
    with pytest.raises(ValueError, match=r"Unknown topology '.*'. Forms: v4:2x2x2, v5e:4x4"):
        topology(text)


def test_the_compiler_is_asked_for_by_name(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[tpu-aot\]'"):
        topology("v5e:4x4")
    with pytest.raises(ValueError, match="--num_slices must be at least 1"):
        topology("v5e:4x4", 0)


def test_devices_at_hand():
    sharder = sharder_of(8, tensor=2)
    target = present(sharder)
    assert target.title == f"8 x {jax.devices()[0].device_kind}"
    assert target.chip is None and target.memory is None
    assert dict(target.sharder("tensor:4,fsdp:2").mesh.shape) == {"data": 1, "fsdp": 2, "tensor": 4}
    assert present(sharder, CHIPS["h100"]).memory == CHIPS["h100"].hbm
    assert target.slices == 1


def test_cpu_devices_stand_for_gpus_where_the_compiler_is_absent(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    target = topology("h100:2")
    assert target.title.startswith("h100:2: 2 x H100 SXM, by XLA's compiler for CPU")
    assert "pip install -e '.[gpu-aot]'" in target.title and target.capability is None
    assert len(target.devices) == 2 and target.chip is CHIPS["h100"]
    assert target.memory == int(POOL * CHIPS["h100"].hbm)
    with pytest.raises(ValueError, match="needs 9 simulated devices.*device_count=9"):
        topology("a100-40:9")
    for text in ("h100:0", "h900:1", "v5e:4"):
        with pytest.raises(ValueError, match="Unknown topology.*Forms: .*h100:1"):
            topology(text)


def test_every_gpu_of_the_table_has_what_its_compiler_asks():
    gpus = {name for name, chip in CHIPS.items() if chip.platform == "gpu"}
    assert gpus == set(CARDS)
    for name, card in CARDS.items():
        text = target_config(card, CHIPS[name].kinds[0], CHIPS[name].hbm, CHIPS[name].bandwidth)
        assert f"device_memory_size: {CHIPS[name].hbm}\n" in text
        assert f"major: {card.capability[0]} minor: {card.capability[1]}" in text
        # Two for a multiplication and its addition: what float32 units give is below bfloat16's.
        assert card.cores * card.lanes * 2e9 * card.clock < CHIPS[name].flops
