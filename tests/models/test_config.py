"""Reading config.json: what transformers 4 and 5 write for each family, defaults, the files of the
hub, every refusal."""

import copy
import json
import pathlib

import pytest

from safepatch_jax.models.config import (
    DecoderConfig,
    RopeScaling,
    config_from_hf,
    portable_config,
    read_hf_config,
)
from safepatch_jax.models.table import param_table
from safepatch_jax.testing import tiny_config
from tests.models.families import FAMILIES, LLAMA3, hf_config, tiny_raw, without

ARCHITECTURES = pathlib.Path(__file__).parents[2] / "configs" / "architectures"
SIZES = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}
BOTH = {**SIZES, "initializer_range": 0.02, "use_cache": True, "attention_dropout": 0.0}
V4 = BOTH | {"transformers_version": "4.57.6", "rope_theta": 100000.0, "dtype": "bfloat16"}
V5 = BOTH | {
    "transformers_version": "5.23.0",
    "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"},
    "dtype": "bfloat16",
    "pad_token_id": None,
}
READ = {
    "vocab_size": 264,
    "embed_dim": 32,
    "mlp_dim": 64,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "rope_theta": 1e5,
    "norm_eps": 1e-5,
    "max_length": 512,
    "dtype": "bfloat16",
    "eos_ids": (2,),
    "tied_head": False,
}

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "bos_token_id": 1,
    "eos_token_id": [257, 258],
    "tie_word_embeddings": False,
}
GEMMA = {
    "model_type": "gemma",
    "architectures": ["GemmaForCausalLM"],
    "num_hidden_layers": 2,
    "attention_bias": False,
    "head_dim": 16,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
MISTRAL = {
    "model_type": "mistral",
    "architectures": ["MistralForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
QWEN2 = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "num_hidden_layers": 3,
    "hidden_act": "silu",
    "max_window_layers": 1,
    "tie_word_embeddings": True,
}
LAYERS = ["full_attention", "sliding_attention", "sliding_attention"]
SCALED = {**LLAMA3, "rope_theta": 100000.0}
# the same model as transformers 4 and 5 write it, perhaps as older files have it, and what it means
STYLES = {
    "llama": (
        [
            V4 | LLAMA | {"rope_scaling": None, "head_dim": 8},
            V5 | LLAMA | {"head_dim": 8},
            without(V4, "dtype")
            | without(LLAMA, "mlp_bias")
            | {"rope_scaling": None, "torch_dtype": "bfloat16"},
        ],
        DecoderConfig(family="llama", **READ | {"eos_ids": (257, 258)}),
    ),
    "llama3": (
        [
            V4 | LLAMA | {"rope_scaling": LLAMA3},
            V5 | LLAMA | {"rope_parameters": SCALED},
            V4 | LLAMA | {"rope_scaling": without(LLAMA3, "rope_type") | {"type": "llama3"}},
            V4
            | LLAMA
            | {"rope_scaling": LLAMA3, "rope_parameters": SCALED, "torch_dtype": "bfloat16"},
        ],
        DecoderConfig(
            family="llama",
            **READ | {"eos_ids": (257, 258)},
            rope_scaling=RopeScaling(4.0, 1.0, 1.5, 12),
        ),
    ),
    "gemma": (
        [
            V4 | GEMMA | {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": None},
            V5
            | GEMMA
            | {"hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True, "pad_token_id": 0},
            without(V4, "dtype")
            | GEMMA
            | {"hidden_act": "gelu", "rope_scaling": None, "torch_dtype": "bfloat16"},
        ],
        DecoderConfig(
            family="gemma",
            **READ | {"head_dim": 16, "eos_ids": (1,), "tied_head": True},
            activation="gelu_tanh",
            norm_offset=True,
            embed_multiplier=32**0.5,
        ),
    ),
    "mistral": (
        [
            V4 | MISTRAL | {"head_dim": None, "sliding_window": None},
            V5 | MISTRAL | {"head_dim": 8, "sliding_window": None},
        ],
        DecoderConfig(family="mistral", **READ),
    ),
    "mistral-window": (
        [
            V4 | MISTRAL | {"head_dim": None, "sliding_window": 5},
            V5 | MISTRAL | {"head_dim": 8, "sliding_window": 5},
            without(V4, "dtype") | MISTRAL | {"sliding_window": 5, "torch_dtype": "bfloat16"},
        ],
        DecoderConfig(family="mistral", **READ, windows=(5, 5)),
    ),
    "qwen2": (
        [
            V4
            | QWEN2
            | {
                "rope_scaling": None,
                "use_sliding_window": False,
                "sliding_window": None,
                "layer_types": ["full_attention"] * 3,
                "eos_token_id": 2,
            },
            V5
            | QWEN2
            | {
                "use_sliding_window": False,
                "sliding_window": None,
                "layer_types": ["full_attention"] * 3,
                "bos_token_id": None,
                "eos_token_id": 2,
            },
            without(V4, "dtype")
            | QWEN2
            | {
                "use_sliding_window": False,
                "sliding_window": 131072,
                "torch_dtype": "bfloat16",
                "eos_token_id": 2,
            },
        ],
        DecoderConfig(family="qwen2", **READ | {"num_layers": 3, "tied_head": True}, qkv_bias=True),
    ),
    "qwen2-window": (
        [
            V4 | QWEN2 | {"use_sliding_window": True, "sliding_window": 5, "layer_types": LAYERS},
            V5
            | QWEN2
            | {
                "use_sliding_window": True,
                "sliding_window": 5,
                "layer_types": LAYERS,
                "eos_token_id": None,
            },
            V4 | QWEN2 | {"use_sliding_window": True, "sliding_window": 5},
        ],
        DecoderConfig(
            family="qwen2",
            **READ | {"num_layers": 3, "tied_head": True, "eos_ids": ()},
            qkv_bias=True,
            windows=(0, 5, 5),
        ),
    ),
}


def refusal(raw):
    with pytest.raises(ValueError) as raised:
        config_from_hf(raw, "folder/config.json")
    assert str(raised.value).startswith("folder/config.json: ")
    return str(raised.value)


@pytest.mark.parametrize("style", STYLES)
def test_all_styles_read_alike(style):
    raws, expected = STYLES[style]
    for raw in raws:
        assert config_from_hf(raw) == expected


def meaning(hf):
    """Fields of DecoderConfig as a configuration object of transformers gives them."""
    rope = getattr(hf, "rope_parameters", None) or {
        "rope_theta": hf.rope_theta,
        **(hf.rope_scaling or {}),
    }
    scaling = None
    if rope.get("rope_type") == "llama3":
        scaling = RopeScaling(*(rope[k] for k in LLAMA3 if k != "rope_type"))
    window = getattr(hf, "sliding_window", None) or 0
    kinds = getattr(hf, "layer_types", None) or ["sliding_attention"] * hf.num_hidden_layers
    windows = tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
    if not any(windows):
        windows = ()
    eos = [] if hf.eos_token_id is None else hf.eos_token_id
    return {
        "family": hf.model_type,
        "vocab_size": hf.vocab_size,
        "embed_dim": hf.hidden_size,
        "mlp_dim": hf.intermediate_size,
        "num_layers": hf.num_hidden_layers,
        "num_heads": hf.num_attention_heads,
        "num_kv_heads": hf.num_key_value_heads,
        "head_dim": getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        "rope_theta": rope["rope_theta"],
        "norm_eps": hf.rms_norm_eps,
        "tied_head": hf.tie_word_embeddings,
        "max_length": hf.max_position_embeddings,
        "eos_ids": tuple(eos) if isinstance(eos, list) else (eos,),
        "rope_scaling": scaling,
        "windows": windows,
    }


def assert_means(config, hf):
    expected = meaning(hf)
    assert {name: getattr(config, name) for name in expected} == expected


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


@pytest.mark.parametrize("family", FAMILIES)
def test_all_offenders_are_listed(family):
    message = refusal(
        tiny_raw(
            family,
            hidden_act="relu",
            attention_bias=True,
            mlp_bias=True,
            attention_dropout=0.1,
            pretraining_tp=2,
            rope_scaling={"type": "linear"},
            partial_rotary_factor=0.5,
            rope_interleaved=True,
            rope_parameters={"rope_type": "yarn", "factor": 4.0},
            logit_scale=2.0,
        )
    )
    activations = "'gelu' or 'gelu_pytorch_tanh'" if family == "gemma" else "'silu'"
    for part in (
        f"hidden_act = 'relu' (supported: {activations})",
        "attention_bias = True (supported: False)",
        "mlp_bias = True (supported: False)",
        "attention_dropout = 0.1 (supported: 0.0)",
        "rope_scaling.rope_type = 'linear' (supported: 'default' or 'llama3')",
        "rope_parameters.rope_type = 'yarn' (supported: 'default' or 'llama3')",
        "partial_rotary_factor = 0.5 (supported: 1.0)",
        "rope_interleaved = True (supported: False)",
        "logit_scale = 2.0 (unknown)",
        "An unknown key that means nothing for the forward pass may be deleted",
    ):
        assert part in message, part
    assert "pretraining_tp" not in message


def test_all_wrong_sizes_are_listed():
    message = refusal(
        without(
            tiny_raw(
                "llama",
                num_hidden_layers=2.5,
                rms_norm_eps="small",
                dtype="int8",
                eos_token_id="</s>",
                tie_word_embeddings="false",
                max_position_embeddings=0,
            ),
            "vocab_size",
            "hidden_size",
        )
    )
    for part in (
        "vocab_size is missing",
        "hidden_size is missing",
        "num_hidden_layers = 2.5 (a whole number from 1 to 1,000 is needed)",
        "rms_norm_eps = 'small' (a number above 0 is needed)",
        "dtype = 'int8' (supported: float32, bfloat16, float16)",
        "eos_token_id = '</s>' (a whole number or a list of them is needed)",
        "tie_word_embeddings = 'false' (true or false is needed)",
        "max_position_embeddings = 0 (a whole number from 1 to 2,147,483,647 is needed)",
    ):
        assert part in message, part


@pytest.mark.parametrize(
    "family, name, value",
    [
        ("llama", "sliding_window", 8),
        ("llama", "layer_types", ["full_attention"] * 2),
        ("gemma", "sliding_window", 8),
        ("mistral", "use_sliding_window", True),
        ("qwen2", "use_bidirectional_attention", False),
        ("gemma", "final_logit_softcapping", 30.0),
        ("gemma", "query_pre_attn_scalar", 256),
        ("qwen2", "qk_norm", True),
        ("llama", "logits_scaling", 1.0),
    ],
)
def test_an_attribute_of_another_family_is_unknown(family, name, value):
    assert f"{name} = {value!r} (unknown)" in refusal(tiny_raw(family, **{name: value}))


@pytest.mark.parametrize(
    "family, name, value, supported",
    [
        ("gemma", "hidden_activation", "relu", "None or 'gelu_pytorch_tanh'"),
        ("gemma", "hidden_activation", "gelu", "None or 'gelu_pytorch_tanh'"),
        ("gemma", "use_bidirectional_attention", True, "None or False"),
        ("qwen2", "use_mrope", True, "False"),
        ("qwen2", "hidden_act", "gelu", "'silu'"),
    ],
)
def test_an_attribute_that_the_decoder_has_no_switch_for(family, name, value, supported):
    assert f"{name} = {value!r} (supported: {supported})" in refusal(
        tiny_raw(family, **{name: value})
    )


@pytest.mark.parametrize(
    "name, value",
    [
        ("num_key_value_heads", "2"),
        ("head_dim", 0),
        ("head_dim", True),
        ("vocab_size", -1),
        ("sliding_window", 0),
        ("sliding_window", [5]),
        ("max_window_layers", -1),
        ("max_window_layers", None),
        ("max_window_layers", "1"),
        ("use_sliding_window", "no"),
        ("tie_word_embeddings", 1),
        ("rms_norm_eps", 0),
        ("rms_norm_eps", [1e-5]),
        ("rms_norm_eps", float("nan")),
        ("torch_dtype", "float64"),
        ("torch_dtype", ["float32"]),
        ("eos_token_id", [1, "2"]),
        ("eos_token_id", 2.0),
        ("eos_token_id", True),
        ("eos_token_id", {"id": 1}),
        ("layer_types", ["full_attention"]),
        ("layer_types", ["full_attention", "chunked_attention"]),
        ("layer_types", 2),
        ("layer_types", "full_attention"),
        ("layer_types", [["full_attention"], "full_attention"]),
        ("rope_theta", 0.0),
        ("rope_theta", "10000"),
        ("rope_theta", float("inf")),
        ("rope_theta", True),
    ],
)
def test_values_of_the_wrong_kind(name, value):
    message = refusal(tiny_raw("qwen2", **{name: value}))
    assert (
        f"{name.removeprefix('torch_')} = " in message
        and "missing" not in message
        and "unknown" not in message
    )


@pytest.mark.parametrize("value", ["yarn", "linear", "dynamic", "longrope", "su", ["llama3"], None])
@pytest.mark.parametrize(
    "key, kind",
    [("rope_parameters", "rope_type"), ("rope_scaling", "rope_type"), ("rope_scaling", "type")],
)
def test_other_kinds_of_rope_are_refused(key, kind, value):
    raw = tiny_raw(
        "llama", **{key: {kind: value, "factor": 2.0, "original_max_position_embeddings": 12}}
    )
    assert f"{key}.rope_type = {value!r} (supported: 'default' or 'llama3')" in refusal(raw)


@pytest.mark.parametrize(
    "changes, part",
    [
        ({"factor": None}, "llama3 needs factor, low_freq_factor, high_freq_factor"),
        ({"factor": "8"}, "numbers above 0"),
        ({"low_freq_factor": 0.0}, "numbers above 0"),
        ({"original_max_position_embeddings": None}, "numbers above 0"),
        ({"low_freq_factor": 4.0}, "low_freq_factor 4.0 must be below high_freq_factor 1.5"),
        ({"attention_factor": 1.0}, "attention_factor = 1.0 (unknown for rope_type 'llama3')"),
        ({"rope_type": "default"}, "factor = 4.0 (unknown for rope_type 'default')"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 (unknown"),
    ],
)
@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_llama3_scaling_that_makes_no_sense(key, changes, part):
    assert part in refusal(tiny_raw("llama", **{key: LLAMA3 | changes}))


def test_scaling_that_is_no_object():
    assert "rope_scaling = 8.0 (an object is needed)" in refusal(
        tiny_raw("llama", rope_scaling=8.0)
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        {"rope_parameters": LLAMA3, "rope_scaling": LLAMA3 | {"factor": 8.0}},
        {"rope_parameters": {"rope_type": "default"}, "rope_scaling": LLAMA3},
    ],
)
def test_conflicting_spellings_of_rope(changes):
    assert "rope_parameters disagrees with rope_theta or rope_scaling" in refusal(
        tiny_raw("llama", **changes)
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {}},
        {"rope_parameters": None},
        {"rope_scaling": {}},
        {"rope_scaling": {"type": "default"}},
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.0}},
        {"partial_rotary_factor": 1.0},
        {"rope_parameters": {"rope_theta": 10000.0}, "rope_scaling": None},
    ],
)
def test_plain_rope_in_many_words(changes):
    config = config_from_hf(tiny_raw("llama", **changes))
    assert (config.rope_theta, config.rope_scaling) == (10000.0, None)


def test_the_original_length_may_be_left_out():
    raw = tiny_raw("llama", rope_scaling=without(LLAMA3, "original_max_position_embeddings"))
    assert config_from_hf(raw).rope_scaling.original_max_length == 512
    assert_means(config_from_hf(raw), hf_config(raw))


@pytest.mark.parametrize(
    "name",
    ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"],
)
def test_missing_attribute(name):
    assert f"{name} is missing" in refusal(without(tiny_config(), name))
    assert f"{name} is missing" in refusal(tiny_config(**{name: None}))


@pytest.mark.parametrize("model_type", ["gemma3", None, ["llama"]])
def test_unknown_family(model_type):
    assert (
        f"model_type {model_type!r} is not supported; supported: llama, gemma, mistral, qwen2."
        in refusal(tiny_config() | {"model_type": model_type})
    )


def test_heads_that_do_not_divide():
    with pytest.raises(
        ValueError, match="num_attention_heads 4 must be a multiple of num_key_value_heads 3"
    ):
        config_from_hf(tiny_config(num_key_value_heads=3))


@pytest.mark.parametrize("changes", [{"head_dim": 7}, {"hidden_size": 34}, {"hidden_size": 36}])
def test_head_size_that_rope_cannot_turn(changes):
    assert "the head size must be even" in refusal(tiny_config(**changes))


# Portable files


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


def test_no_such_folder(tmp_path):
    with pytest.raises(
        ValueError, match="No model folder '.*absent'. Give a folder in Hugging Face format"
    ):
        read_hf_config(tmp_path / "absent")


def test_folder_without_config(tmp_path):
    with pytest.raises(ValueError, match="has no config.json"):
        read_hf_config(tmp_path)


def test_an_error_names_the_file(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config(sliding_window=8)))
    with pytest.raises(
        ValueError, match=r"config\.json: .*sliding_window = 8 \(unknown\)"
    ) as raised:
        read_hf_config(tmp_path)
    assert str(tmp_path) in str(raised.value)


@pytest.mark.parametrize("content", [b"", b'{"model_type": "llama",'])
def test_broken_json(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json cannot be read as JSON"):
        read_hf_config(tmp_path)


@pytest.mark.parametrize(
    "content", [b'["llama"]', b"null", b"\xff\xfe{}"], ids=["list", "null", "not UTF-8"]
)
def test_json_that_is_no_object_names_the_file(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json"):
        read_hf_config(tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"num_hidden_layers": 10**8},
            "num_hidden_layers = 100000000 .a whole number from 1 to 1,000",
        ),
        ({"vocab_size": 2**40}, "vocab_size = 1099511627776"),
        ({"rope_theta": 10**400}, "rope_theta = "),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps = "),
        ({"eos_token_id": [-1]}, "eos_token_id"),
    ],
)
def test_absurd_numbers_are_refused_before_anything_is_built(changes, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf(tiny_config(**changes))


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, '{"vocab_size": ' + "9" * 5000 + "}"]
)
def test_json_that_breaks_the_parser_names_the_file(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json cannot be read as JSON"):
        read_hf_config(tmp_path)
