"""The parameter table: each row there and back bitwise, each checkpoint key once, one tree for all
that derives."""

import dataclasses
import math

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safepatch_jax.models.config import config_from_hf
from safepatch_jax.models.decoder import Decoder
from safepatch_jax.models.table import SCOPES, ParamTable, nest, param_table, unnest
from tests.conftest import sharder_of
from tests.models.families import FAMILIES, hf_config, tiny_raw

VARIANTS = {
    "gqa": {},
    "mha-untied": {"num_key_value_heads": 4, "tie_word_embeddings": False},
    "mqa-deep-tied": {
        "num_key_value_heads": 1,
        "num_hidden_layers": 12,
        "tie_word_embeddings": True,
    },
    "head_dim": {"head_dim": 12, "num_hidden_layers": 1},
}
BITS = {2: np.uint16, 4: np.uint32}


def config_of(family="llama", **changes):
    return config_from_hf(tiny_raw(family, **changes))


@st.composite
def small_tables(draw):
    kv_heads, size = draw(st.integers(1, 3)), st.integers(1, 5)
    return param_table(
        config_of(
            draw(st.sampled_from(list(FAMILIES))),
            vocab_size=draw(size),
            hidden_size=draw(size),
            intermediate_size=draw(size),
            num_hidden_layers=draw(st.integers(1, 3)),
            num_key_value_heads=kv_heads,
            num_attention_heads=kv_heads * draw(st.integers(1, 3)),
            head_dim=2 * draw(size),
            tie_word_embeddings=draw(st.booleans()),
        )
    )


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_each_row_there_and_back_is_bitwise(data):
    dtype = np.dtype(data.draw(st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16])))
    bits = BITS[dtype.itemsize]
    for row in data.draw(small_tables()):
        # Any bits: NaN, infinities, -0.0.
        whole = data.draw(hnp.arrays(bits, row.shape)).view(dtype)
        matrices = row.as_matrices(whole)
        assert matrices.shape == (row.num_layers, *row.hf_shape) and matrices.dtype == dtype
        for layer in range(row.num_layers):
            part = whole[layer] if row.stacked else whole
            tensor = row.to_hf(part)
            assert part.shape == row.layer_shape and tensor.shape == row.hf_shape
            assert tensor.tobytes() == matrices[layer].tobytes() == part.tobytes()


@given(small_tables())
@settings(max_examples=20, deadline=None)
def test_position_within_a_layer_is_the_flat_index_of_the_hf_tensor(table):
    for row in table:
        part = np.arange(math.prod(row.layer_shape)).reshape(row.layer_shape)
        np.testing.assert_array_equal(row.to_hf(part).ravel(), part.ravel())


def test_sides_are_split_into_heads_as_hugging_face_means_them():
    config = config_of("qwen2", head_dim=12)
    table = param_table(config)
    q, bias, o = (
        table["layers/attention/q"],
        table["layers/attention/q_bias"],
        table["layers/attention/o"],
    )
    assert (q.hf_shape, bias.hf_shape, o.hf_shape) == ((48, 32), (48,), (32, 48))
    parts = (np.arange(math.prod(row.layer_shape)).reshape(row.layer_shape) for row in (q, bias, o))
    q_NHD, bias_NH, o_DNH = parts
    hf_q, hf_bias, hf_o = q.to_hf(q_NHD), bias.to_hf(bias_NH), o.to_hf(o_DNH)
    for n in range(config.num_heads):
        for h in range(config.head_dim):
            np.testing.assert_array_equal(q_NHD[n, h], hf_q[n * 12 + h])
            assert bias_NH[n, h] == hf_bias[n * 12 + h]
            np.testing.assert_array_equal(o_DNH[:, n, h], hf_o[:, n * 12 + h])


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_key_of_the_hf_model_is_matched_once(family, changes):
    torch = pytest.importorskip(
        "torch", reason="the keys come from the torch model: pip install torch"
    )
    from transformers import AutoModelForCausalLM

    raw = tiny_raw(family, **changes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config(raw))
    state = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    if raw["tie_word_embeddings"]:
        assert state.pop("lm_head.weight") == state["model.embed_tokens.weight"]
    table = param_table(config_from_hf(raw))
    declared = []
    for row in table:
        declared += [(name, row.hf_shape) for name in row.hf_names]
    assert sorted(declared) == sorted(state.items())
    assert len({row.path for row in table}) == len(table.rows) and table.size == sum(
        p.numel() for p in model.parameters()
    )
    assert list(table.hf_names()) == [name for name, _ in declared]
    for name, (row, layer) in table.hf_names().items():
        assert row.hf_names[layer] == name and (not row.stacked or f".layers.{layer}." in name)


@pytest.mark.parametrize(
    "family, variant",
    [
        *(("llama", variant) for variant in VARIANTS),
        *((family, "gqa") for family in FAMILIES if family != "llama"),
    ],
)
def test_one_tree_for_shapes_initialisation_sharding_and_flax(family, variant, sharder):
    config = config_of(family, **VARIANTS[variant])
    table = param_table(config)
    shapes = {row.path: row.shape for row in table}
    assert all(len(row.axes) == len(row.shape) for row in table)
    abstract, drawn = (
        unnest(table.abstract(sharder, jnp.bfloat16)),
        unnest(table.init(jax.random.key(0))),
    )
    tokens = jnp.zeros((1, 8), jnp.int32)
    flax_made = jax.eval_shape(
        Decoder(config, jnp.float32, None).init, jax.random.key(0), tokens, tokens, tokens == 0
    )
    for tree in (abstract, drawn, unnest(flax_made["params"])):
        assert {path: x.shape for path, x in tree.items()} == shapes
    assert unnest(table.shardings(sharder)).keys() == shapes.keys()
    assert {x.dtype for x in abstract.values()} == {jnp.dtype(jnp.bfloat16)}
    constants = {"norm": 0.0 if config.norm_offset else 1.0, "bias": 0.0}
    assert ("bias" in {row.kind for row in table}) == (family == "qwen2")
    for row in table:
        if row.kind in constants:
            np.testing.assert_array_equal(drawn[row.path], constants[row.kind], err_msg=row.path)
        else:
            assert np.std(drawn[row.path]) > 0.01, row.path


@pytest.mark.parametrize("family", FAMILIES)
def test_initial_constants_are_those_of_transformers(family):
    pytest.importorskip(
        "torch", reason="the constants come from the torch model: pip install torch"
    )
    from transformers import AutoModelForCausalLM

    theirs = dict(AutoModelForCausalLM.from_config(hf_config(tiny_raw(family))).named_parameters())
    for row in param_table(config_of(family)):
        assert (row.start is not None) == (row.kind in ("norm", "bias"))
        if row.start is not None:
            for name in row.hf_names:
                np.testing.assert_array_equal(
                    theirs[name].detach().numpy(), row.start, err_msg=name
                )


@pytest.mark.parametrize("family", FAMILIES)
def test_scopes(family):
    linear = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}

    def part(rows):
        return {row.hf_name.removesuffix(".weight").rsplit(".", 1)[-1] for row in rows}

    tied, untied = (
        param_table(config_of(family, tie_word_embeddings=tie)) for tie in (True, False)
    )
    for table in (tied, untied):
        assert set(SCOPES) == {"block_linear", "all_linear", "all"}
        assert part(table.scope("block_linear")) == linear
        assert table.scope("all") == table.rows
    assert part(tied.scope("all_linear")) == linear
    assert part(untied.scope("all_linear")) == linear | {"lm_head"}


def test_a_path_declared_twice_is_refused():
    row = param_table(config_of())["final_norm/scale"]
    with pytest.raises(ValueError, match="a path twice"):
        ParamTable((row, dataclasses.replace(row, hf_name="other")))


def test_biases_are_patched_in_the_widest_scope_alone():
    table = param_table(config_of("qwen2"))
    biases = {f"layers/attention/{name}_bias" for name in "qkv"}
    for scope, expected in (("block_linear", set()), ("all_linear", set()), ("all", biases)):
        assert {row.path for row in table.scope(scope)} & biases == expected


def test_a_dimension_that_does_not_divide_is_named():
    table = param_table(config_of(num_key_value_heads=1))
    with pytest.raises(
        ValueError,
        match=r"layers/attention/k \(2, 1, 8, 32\): dimension 'kv_heads' of 1 .* tensor = 2",
    ):
        table.shardings(sharder_of(2, tensor=2))


names = st.text(st.characters(exclude_characters="/", codec="ascii"), max_size=3)
trees = st.dictionaries(
    names,
    st.recursive(
        st.integers(),
        lambda children: st.dictionaries(names, children, min_size=1, max_size=3),
        max_leaves=8,
    ),
    max_size=4,
)


@given(trees)
@settings(deadline=None)
def test_nest_and_unnest_are_inverse(tree):
    flat = unnest(tree)
    assert nest(flat) == tree
    assert unnest(nest(flat)) == flat and not any(isinstance(x, dict) for x in flat.values())
