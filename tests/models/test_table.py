"""The parameter table: each row there and back bitwise, each checkpoint key once, one tree for all that derives."""

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
from safepatch_jax.testing import tiny_config
from tests.conftest import sharder_of

VARIANTS = {
    "gqa": {}, "mha-untied": {"num_key_value_heads": 4, "tie_word_embeddings": False},
    "mqa-deep": {"num_key_value_heads": 1, "num_hidden_layers": 12}, "head_dim": {"head_dim": 12, "num_hidden_layers": 1},
}
BITS = {2: np.uint16, 4: np.uint32}


def config_of(**changes):
    return config_from_hf(tiny_config(**changes))


@st.composite
def small_tables(draw):
    kv_heads, size = draw(st.integers(1, 3)), st.integers(1, 5)
    return param_table(config_of(
        vocab_size=draw(size), hidden_size=draw(size), intermediate_size=draw(size), num_hidden_layers=draw(st.integers(1, 3)),
        num_key_value_heads=kv_heads, num_attention_heads=kv_heads * draw(st.integers(1, 3)), head_dim=2 * draw(size),
        tie_word_embeddings=draw(st.booleans())))


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_each_row_there_and_back_is_bitwise(data):
    dtype = np.dtype(data.draw(st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16])))
    bits = BITS[dtype.itemsize]
    same = lambda x, y: x.shape == y.shape and x.dtype == y.dtype and np.array_equal(x.view(bits), y.view(bits))
    for row in data.draw(small_tables()):
        tensor = data.draw(hnp.arrays(bits, row.hf_shape)).view(dtype)  # any bits: NaN, infinities, -0.0
        part = row.from_hf(tensor)
        assert part.shape == row.layer_shape
        assert same(row.to_hf(part), tensor)
        assert same(row.from_hf(row.to_hf(part)), part)
        whole = data.draw(hnp.arrays(bits, row.shape)).view(dtype)
        matrices = row.as_matrices(whole)
        assert matrices.shape == (row.num_layers, *row.hf_shape)
        assert same(row.from_matrices(matrices), whole)
        for layer in range(row.num_layers):
            assert same(matrices[layer], row.to_hf(whole[layer] if row.stacked else whole))


@given(small_tables())
@settings(max_examples=20, deadline=None)
def test_position_within_a_layer_is_the_flat_index_of_the_hf_tensor(table):
    for row in table:
        tensor = np.arange(math.prod(row.hf_shape)).reshape(row.hf_shape)
        np.testing.assert_array_equal(row.from_hf(tensor).ravel(), tensor.ravel())


def test_sides_are_split_into_heads_as_hugging_face_means_them():
    config = config_of(head_dim=12)
    table = param_table(config)
    q, o = table["layers/attention/q"], table["layers/attention/o"]
    assert (q.hf_shape, o.hf_shape) == ((48, 32), (32, 48))
    hf_q, hf_o = (np.arange(48 * 32).reshape(row.hf_shape) for row in (q, o))
    for n in range(config.num_heads):
        for h in range(config.head_dim):
            np.testing.assert_array_equal(q.from_hf(hf_q)[n, h], hf_q[n * 12 + h])
            np.testing.assert_array_equal(o.from_hf(hf_o)[:, n, h], hf_o[:, n * 12 + h])


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_each_key_of_the_hf_model_is_matched_once(changes):
    torch = pytest.importorskip("torch", reason="the keys come from the torch model: pip install torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    raw = tiny_config(**changes)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**raw))
    state = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    if raw["tie_word_embeddings"]:
        assert state.pop("lm_head.weight") == state["model.embed_tokens.weight"]
    table = param_table(config_from_hf(raw))
    declared = [(name, row.hf_shape) for row in table for name in row.hf_names]
    assert sorted(declared) == sorted(state.items())
    assert table.size == sum(p.numel() for p in model.parameters())
    assert list(table.hf_names()) == [name for name, _ in declared]
    for name, (row, layer) in table.hf_names().items():
        assert row.hf_names[layer] == name and (not row.stacked or f".layers.{layer}." in name)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_one_tree_for_shapes_initialisation_sharding_and_flax(changes, sharder):
    config = config_of(**changes)
    table = param_table(config)
    shapes = {row.path: row.shape for row in table}
    assert all(len(row.axes) == len(row.shape) for row in table)
    abstract, drawn = unnest(table.abstract(sharder, jnp.bfloat16)), unnest(table.init(jax.random.key(0)))
    tokens = jnp.zeros((1, 8), jnp.int32)
    flax_made = jax.eval_shape(Decoder(config, jnp.float32, None).init, jax.random.key(0), tokens, tokens, tokens == 0)
    for tree in (abstract, drawn, unnest(flax_made["params"])):
        assert {path: x.shape for path, x in tree.items()} == shapes
    assert unnest(table.shardings(sharder)).keys() == shapes.keys()
    assert {x.dtype for x in abstract.values()} == {jnp.dtype(jnp.bfloat16)}
    for row in table:
        assert np.all(drawn[row.path] == 1) if row.kind == "norm" else np.std(drawn[row.path]) > 0.01


def test_scopes():
    linear = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    part = lambda rows: {row.hf_name.removesuffix(".weight").rsplit(".", 1)[-1] for row in rows}
    tied, untied = param_table(config_of()), param_table(config_of(tie_word_embeddings=False))
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


def test_a_dimension_that_does_not_divide_is_named():
    table = param_table(config_of(num_key_value_heads=1))
    with pytest.raises(ValueError, match=r"layers/attention/k \(2, 1, 8, 32\): dimension 'kv_heads' of 1 .* tensor = 2"):
        table.shardings(sharder_of(2, tensor=2))


names = st.text(st.characters(exclude_characters="/", codec="ascii"), max_size=3)
trees = st.dictionaries(names, st.recursive(
    st.integers(), lambda children: st.dictionaries(names, children, min_size=1, max_size=3), max_leaves=8), max_size=4)


@given(trees)
@settings(deadline=None)
def test_nest_and_unnest_are_inverse(tree):
    flat = unnest(tree)
    assert nest(flat) == tree
    assert unnest(nest(flat)) == flat and not any(isinstance(x, dict) for x in flat.values())
