"""The programs compiled for TPUs by the real compiler, without a TPU: they partition, fit, and
exchange what they should.

Needs libtpu (make test-tpu installs it); skips without it. Nothing is run: results and speed are
not examined here.
"""

import importlib.util
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

if importlib.util.find_spec("libtpu") is None:
    pytest.skip(
        "the TPU compiler is not installed: pip install -e '.[tpu-aot]'",
        allow_module_level=True,
    )

from safepatch_jax.models.config import config_from_hf
from safepatch_jax.models.table import param_table
from safepatch_jax.planning.chips import GIB, topology
from safepatch_jax.planning.compile import measure, memory_needed
from safepatch_jax.planning.programs import architecture, device_bytes, programs
from safepatch_jax.settings import Settings, load_config
from safepatch_jax.testing import tiny_config

ROOT = pathlib.Path(__file__).parents[2]
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "vocab_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "torch_dtype": "bfloat16",
}
FAMILIES = {"llama": {}, "gemma": {}, "mistral": {}, "qwen2": {}}


@pytest.fixture(scope="module")
def settings():
    return Settings().override(
        {
            "model.compute_dtype": "bfloat16",
            "model.remat": "full",
            "mesh.shape": "fsdp:4,tensor:4",
            "evaluate.max_new_tokens": 8,
        }
    )


@pytest.fixture(scope="module")
def llama2():
    """Settings of the full-size LLaMA-2-7B."""
    return load_config(ROOT / "configs" / "llama2_7b_chat.py")


@pytest.mark.parametrize(
    "text, chips",
    [("v4:2x2x2", 8), ("v5e:2x4", 8), ("v5e:1x1", 1), ("v5p:2x2x1", 4), ("v6e:2x4", 8)],
)
def test_every_generation_has_a_compiler_and_the_memory_of_the_table(text, chips):
    target = topology(text)
    sharder = target.sharder("fsdp:-1")
    assert len(target.devices) == chips and target.devices[0].device_kind in target.chip.kinds

    def array(n):
        return jax.ShapeDtypeStruct((n,), jnp.float32, sharding=sharder.replicated())

    jax.jit(lambda x: x + 1).lower(array(1024)).compile()
    with pytest.raises(jax.errors.JaxRuntimeError) as raised:
        jax.jit(lambda x: x + 1).lower(array(2**36)).compile()
    assert memory_needed(str(raised.value)) >= 2**38
    limit = float(str(raised.value).split("available HBM (")[1].split("G")[0])
    assert target.memory == pytest.approx(limit * GIB, rel=1e-3)


@pytest.mark.parametrize("kind", ["train", "score", "decode"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_compiles(family, kind, settings):
    target = topology("v5e:4x4")
    config = config_from_hf(tiny_config(model_type=family, **SIZES, **FAMILIES[family]))
    sharder = target.sharder(settings.mesh.shape)
    for program in programs(settings, config, sharder, [kind]):
        f = measure(program, target, sharder)
        assert f.fits and not f.work.unknown_loops
        # Some products are elementwise sums to the compiler.
        assert f.work.flops >= 0.9 * f.flops / 16, program.title
        if kind == "train":  # gradients are exchanged in pieces, not whole
            assert f.work.by_kind()["reduce-scatter"][0] > 0


@pytest.mark.parametrize(
    "changes, sizes",
    [
        (
            {
                "derive.optimizer": "adafactor",
                "derive.accumulate": 2,
                "derive.batch_size": 8,
                "model.remat": "dots",
            },
            {},
        ),
        ({"model.attention": "fused", "data.max_prompt_tokens": 500}, {"head_dim": 128}),
        (
            {
                "derive.train": "scope",
                "derive.backward": "layerwise",
                "derive.accumulate": 2,
                "derive.batch_size": 8,
            },
            {},
        ),
    ],
    ids=["adafactor-accumulate-dots", "splash", "layerwise"],
)
def test_options_of_the_train_step_compile(changes, sizes, settings):
    target, settings = topology("v5e:4x4"), settings.override(changes)
    sharder = target.sharder(settings.mesh.shape)
    config = config_from_hf(tiny_config(**SIZES, **sizes))
    parts = programs(settings, config, sharder, ["train"])
    measured = [measure(program, target, sharder) for program in parts]
    assert all(f.fits for f in measured) and sum(f.flops for f in measured) > 0


def test_slices_exchange_gradients_alone(settings):
    target = topology("v5e:2x2", slices=2)
    settings = settings.override({"mesh.shape": "data:2,fsdp:2,tensor:2"})
    config = config_from_hf(tiny_config(**SIZES))
    sharder = target.sharder(settings.mesh.shape)
    assert target.slices == 2
    assert [d.slice_index for d in sharder.mesh.devices.flat] == [0] * 4 + [1] * 4
    (program,) = programs(settings, config, sharder, ["train"])
    f = measure(program, target, sharder)
    across = f.work.sent(across=True)
    assert f.fits and f.floor["network"] > 0
    assert any("between slices" in kind for kind in f.work.by_kind())
    # Each device's share of the gradients, and no more than a few times it: no weights.
    assert 0 < across < 4 * device_bytes(param_table(config), sharder, "float32")


def test_the_full_size_patch_operation(llama2):
    """LLaMA-2-7B on 16 x v5e: counts cross chips, nothing is sorted or gathered, and half of the
    memory stays free."""
    target, config = topology("v5e:4x4"), architecture(llama2)
    sharder = target.sharder("data:1,fsdp:4,tensor:4")
    operations = programs(llama2, config, sharder, ["patch"])
    assert [p.name for p in operations] == ["q k v", "o", "gate up", "down"]
    for program in operations:
        f = measure(program, target, sharder)
        assert f.fits and f.peak < target.memory / 2, program.title
        assert set(f.work.by_kind()) == {"all-reduce"} and not f.work.sorts, program.title
        assert f.work.sent() < 2**20 and not f.work.unknown_loops
        assert f.temporaries < 0.2 * f.arguments, program.title


def test_what_does_not_fit_is_refused(llama2):
    settings = llama2.override(
        {"model.remat": "none", "derive.batch_size": 64, "data.max_prompt_tokens": 1900}
    )
    target = topology("v5e:4x4")
    sharder = target.sharder("data:1,fsdp:16,tensor:1")
    f = measure(programs(settings, architecture(settings), sharder, ["train"])[0], target, sharder)
    assert not f.fits and f.needed > 30 * GIB


def test_the_launcher_finds_what_fits(tmp_path):
    """A small model and long sequences: the attention weights of all layers together are too many,
    those of one are not."""
    raw = tiny_config(
        **SIZES
        | {
            "hidden_size": 512,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "num_hidden_layers": 12,
        }
    )
    (tmp_path / "long.json").write_text(json.dumps(raw))
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "launch.compile_tpu",
            f"--model.architecture={tmp_path / 'long.json'}",
            "--topology=v5e:2x2",
            "--mesh=fsdp:4",
            "--programs=train",
            "--model.compute_dtype=bfloat16",
            "--derive.batch_size=32",
            "--data.max_prompt_tokens=2000",
            "--model.remat=none",
            f"--json={tmp_path / 'figures.json'}",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 3, result.stderr
    assert "Verdict: does not fit. train needs" in result.stdout
    assert "Nearest setting that fits: --model.remat=dots" in result.stdout
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert not figures["fits"] and figures["nearest_that_fits"]["changes"] == {
        "model.remat": "dots"
    }
