"""Configs that are refused: unknown, missing and absurd values, damaged files."""

import json

import pytest

from safepatch_jax.models.config import (
    config_from_hf,
    read_hf_config,
)
from safepatch_jax.testing import tiny_config
from tests.models.configs import assert_means, refusal
from tests.models.families import FAMILIES, LLAMA3, hf_config, tiny_raw, without


@pytest.mark.parametrize("family", FAMILIES)
def test_all_offenders_are_listed(family):
    message = refusal(
        tiny_raw(
            family,
            hidden_act="relu",
            attention_bias=True,
            mlp_bias=True,
            attention_dropout=0.2,
            pretraining_tp=2,
            rope_scaling={"type": "dynamic"},
            partial_rotary_factor=0.5,
            rope_interleaved=True,
            rope_parameters={"rope_type": "yarn", "factor": 4.0},
            logit_scale=2.0,
        )
    )
    activations = "'silu'"
    if family.startswith("gemma"):
        activations = f"{'gelu' if family == 'gemma' else None!r} or 'gelu_pytorch_tanh'"
    for part in (
        f"hidden_act = 'relu' (supported: {activations})",
        "attention_bias = True (supported: False)",
        "mlp_bias = True (supported: False)",
        "attention_dropout = 0.2 (supported: 0.0",
        "rope_scaling.rope_type = 'dynamic' (supported: 'default' or 'llama3' or 'linear')",
        "rope_parameters.rope_type = 'yarn' (supported: 'default' or 'llama3' or 'linear')",
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


@pytest.mark.parametrize("value", ["yarn", "dynamic", "longrope", "su", ["llama3"], None])
@pytest.mark.parametrize(
    "key, kind",
    [("rope_parameters", "rope_type"), ("rope_scaling", "rope_type"), ("rope_scaling", "type")],
)
def test_other_kinds_of_rope_are_refused(key, kind, value):
    raw = tiny_raw(
        "llama", **{key: {kind: value, "factor": 2.0, "original_max_position_embeddings": 12}}
    )
    assert f"{key}.rope_type = {value!r} (supported: 'default' or 'llama3' or 'linear')" in refusal(
        raw
    )


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
        f"model_type {model_type!r} is not supported; supported: llama, gemma, mistral, qwen2, "
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
