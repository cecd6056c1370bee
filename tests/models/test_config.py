"""Reading config.json: what transformers 4 and 5 write for each family, defaults, the files of the
hub, other spellings."""

import copy
import json

import pytest

from safepatch_jax.models.config import (
    RopeScaling,
    config_from_hf,
    portable_config,
    read_hf_config,
)
from safepatch_jax.models.table import param_table
from safepatch_jax.testing import tiny_config
from tests.models.configs import (
    ARCHITECTURES,
    STYLES,
    assert_means,
)
from tests.models.families import FAMILIES, LLAMA3, hf_config, tiny_raw, without


@pytest.mark.parametrize("style", STYLES)
def test_all_styles_read_alike(style):
    raws, expected = STYLES[style]
    for raw in raws:
        assert config_from_hf(raw) == expected


@pytest.mark.parametrize(
    "family, changes",
    [
        *((family, {}) for family in FAMILIES),
        (
            "llama",
            {
                "rope_scaling": LLAMA3,
                "head_dim": 12,
                "tie_word_embeddings": False,
                "rope_theta": 12345.0,
            },
        ),
        ("llama", {"num_key_value_heads": None, "eos_token_id": [257, 3]}),
        ("gemma", {"tie_word_embeddings": False}),
        ("mistral", {"sliding_window": None, "head_dim": None}),
        ("mistral", {"rope_scaling": LLAMA3}),
        ("qwen2", {"use_sliding_window": False, "eos_token_id": None}),
        ("qwen2", {"layer_types": ["sliding_attention", "full_attention"]}),
        ("qwen2", {"max_window_layers": 0, "rope_scaling": LLAMA3}),
    ],
)
def test_what_transformers_writes_is_read(tmp_path, family, changes):
    hf = hf_config(tiny_raw(family, **changes))
    hf.save_pretrained(tmp_path)
    config = read_hf_config(tmp_path)
    assert config == config_from_hf(tiny_raw(family, **changes))
    assert_means(config, hf)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "absent",
    [
        "num_key_value_heads",
        "head_dim",
        "rope_theta",
        "rms_norm_eps",
        "tie_word_embeddings",
        "max_position_embeddings",
        "eos_token_id",
        "sliding_window",
        "use_sliding_window",
        "max_window_layers",
        "hidden_act",
    ],
)
def test_defaults_are_those_of_transformers(family, absent):
    raw = without(
        tiny_raw(family, num_attention_heads=32, hidden_size=64, num_hidden_layers=30), absent
    )
    assert_means(config_from_hf(raw), hf_config(raw))


def test_storage_type_is_float32_unless_said():
    assert config_from_hf(without(tiny_raw("llama"), "torch_dtype")).dtype == "float32"


# The files of the hub: what their config.json says (less ids that nobody reads), and the number of
# parameters.
def published(name):
    return json.loads((ARCHITECTURES / f"{name}.json").read_text())


LLAMA3_8B, MISTRAL_7B = (
    published("llama3_8b"),
    published("mistral_7b_v0_1") | {"rope_theta": 1000000.0, "sliding_window": None},
)
SCALED_3_1 = LLAMA3 | {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
QWEN2_5 = {
    "model_type": "qwen2",
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
}
HUB = {
    "Llama-2-7b-chat": (
        published("llama2_7b"),
        6_738_415_616,
        {
            "rope_theta": 1e4,
            "eos_ids": (2,),
            "dtype": "float16",
            "tied_head": False,
            "max_length": 4096,
        },
    ),
    "Llama-2-13b-chat": (
        published("llama2_13b"),
        13_015_864_320,
        {"rope_theta": 1e4, "num_kv_heads": 40, "head_dim": 128},
    ),
    "Meta-Llama-3-8B-Instruct": (
        LLAMA3_8B,
        8_030_261_248,
        {"rope_theta": 5e5, "rope_scaling": None, "num_kv_heads": 8, "dtype": "bfloat16"},
    ),
    "Meta-Llama-3-70B-Instruct": (
        published("llama3_70b"),
        70_553_706_496,
        {"rope_theta": 5e5, "num_heads": 64, "num_kv_heads": 8, "head_dim": 128},
    ),
    "Llama-3.1-8B-Instruct": (
        LLAMA3_8B
        | {
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "eos_token_id": [128001, 128008, 128009],
            "rope_scaling": SCALED_3_1,
            "transformers_version": "4.42.3",
        },
        8_030_261_248,
        {"rope_scaling": RopeScaling(8.0, 1.0, 4.0, 8192), "eos_ids": (128001, 128008, 128009)},
    ),
    "Llama-3.2-1B-Instruct": (
        LLAMA3_8B
        | {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "head_dim": 64,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "eos_token_id": [128001, 128008, 128009],
            "rope_scaling": SCALED_3_1 | {"factor": 32.0},
            "tie_word_embeddings": True,
            "transformers_version": "4.45.0.dev0",
        },
        1_235_814_400,
        {"rope_scaling": RopeScaling(32.0, 1.0, 4.0, 8192), "tied_head": True, "head_dim": 64},
    ),
    "gemma-1.1-7b-it": (
        published("gemma_1_1_7b"),
        8_537_680_896,
        {
            "head_dim": 256,
            "tied_head": True,
            "norm_offset": True,
            "embed_multiplier": 3072**0.5,
            "activation": "gelu_tanh",
            "rope_theta": 1e4,
            "eos_ids": (1,),
        },
    ),
    "Mistral-7B-Instruct-v0.1": (
        published("mistral_7b_v0_1"),
        7_241_732_096,
        {"windows": (4096,) * 32, "rope_theta": 1e4, "head_dim": 128, "tied_head": False},
    ),
    "Mistral-7B-Instruct-v0.2": (
        MISTRAL_7B,
        7_241_732_096,
        {"windows": (), "rope_theta": 1e6, "max_length": 32768},
    ),
    "Mistral-7B-Instruct-v0.3": (
        MISTRAL_7B | {"vocab_size": 32768},
        7_248_023_552,
        {"windows": (), "rope_theta": 1e6},
    ),
    "Qwen2.5-0.5B-Instruct": (
        QWEN2_5
        | {
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "max_window_layers": 21,
            "sliding_window": 32768,
            "tie_word_embeddings": True,
            "vocab_size": 151936,
        },
        494_032_768,
        {"windows": (), "tied_head": True, "head_dim": 64, "qkv_bias": True, "eos_ids": (151645,)},
    ),
    "Qwen2.5-7B-Instruct": (
        QWEN2_5
        | {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "max_window_layers": 28,
            "sliding_window": 131072,
            "tie_word_embeddings": False,
            "vocab_size": 152064,
        },
        7_615_616_512,
        {"windows": (), "tied_head": False, "head_dim": 128, "qkv_bias": True, "rope_theta": 1e6},
    ),
}


@pytest.mark.parametrize("model", HUB)
def test_models_of_the_hub(model):
    raw, size, expected = HUB[model]
    config = config_from_hf(raw)
    assert param_table(config).size == size
    assert {name: getattr(config, name) for name in expected} == expected
    assert_means(config, hf_config(raw))


@pytest.mark.parametrize("style", STYLES)
def test_a_file_in_the_style_of_5_gains_the_spelling_of_4(style):
    raw = STYLES[style][0][1]
    before = copy.deepcopy(raw)
    portable = portable_config(raw)
    assert raw == before
    assert {k: portable[k] for k in raw} == raw, "an attribute changed"
    assert portable.keys() - raw.keys() == {"rope_theta", "rope_scaling", "torch_dtype"}
    assert config_from_hf(portable) == config_from_hf(raw)
    # What transformers 4, which knows no rope_parameters, makes of it; and older ones, which know
    # no dtype.
    assert config_from_hf(without(portable, "rope_parameters", "dtype")) == config_from_hf(raw)
    assert portable_config(portable) == portable
    assert_means(config_from_hf(raw), hf_config(portable))


@pytest.mark.parametrize("raw", [raw for raw, *_ in HUB.values()], ids=HUB)
def test_a_file_in_the_style_of_4_stays_as_it_is(raw):
    assert list(portable_config(raw).items()) == list(raw.items())


@pytest.mark.parametrize(
    "given",
    [
        {
            "rope_parameters": LLAMA3 | {"rope_theta": 10000.0},
            "rope_scaling": None,
            "rope_theta": None,
        },
        {"rope_parameters": LLAMA3},
        {"rope_parameters": LLAMA3, "rope_scaling": {}},
        {"rope_parameters": without(LLAMA3, "rope_type") | {"type": "llama3"}},
        {"rope_parameters": LLAMA3 | {"rope_theta": None}},
    ],
    ids=["nulls", "theta outside", "empty", "old key", "null theta"],
)
def test_scaling_is_never_lost_on_transformers_4(given):
    raw = tiny_raw("llama", **given)
    seen_by_4 = config_from_hf(without(portable_config(raw), "rope_parameters"))
    assert seen_by_4 == config_from_hf(raw)
    assert (seen_by_4.rope_theta, seen_by_4.rope_scaling) == (
        10000.0,
        RopeScaling(4.0, 1.0, 1.5, 12),
    )


@pytest.mark.parametrize(
    "given, named",
    [
        ({"dtype": "float32"}, {"dtype", "torch_dtype"}),
        ({"torch_dtype": "float32"}, {"torch_dtype"}),
        ({}, {"torch_dtype"}),
        ({"dtype": "float32", "torch_dtype": None}, {"dtype", "torch_dtype"}),
    ],
)
def test_a_change_of_storage_type_is_said_in_every_spelling(given, named):
    raw = without(tiny_config(), "torch_dtype") | given
    portable = portable_config(raw, "bfloat16")
    assert {k: v for k, v in portable.items() if k in ("dtype", "torch_dtype")} == dict.fromkeys(
        named, "bfloat16"
    )
    assert without(portable, "dtype", "torch_dtype") == without(raw, "dtype", "torch_dtype")
    assert config_from_hf(portable).dtype == "bfloat16"


# Files
