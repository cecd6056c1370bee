"""Parity with the torch implementation of Hugging Face, module by module, so that a failure names the module."""

import collections
import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="parity is measured against torch: pip install torch")

from safetensors.numpy import load_file, save_file
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from safepatch_jax.data.chat import prompt_batch
from safepatch_jax.evaluation.generate import greedy_decode
from safepatch_jax.io.hf import load_params
from safepatch_jax.models.decoder import Attention, Block, Decoder, Embedder, Mlp, RMSNorm, rotary_angles, rotate
from safepatch_jax.testing import write_tiny_model

TOLERANCE = 1e-5  # of the reference's largest magnitude
VARIANTS = {
    "mha": {"num_key_value_heads": 4, "rms_norm_eps": 1e-2},
    "gqa-untied": {"tie_word_embeddings": False},
    "mqa-theta": {"num_key_value_heads": 1, "rope_theta": 500000.0},
    "head_dim-untied": {"head_dim": 12, "tie_word_embeddings": False, "rope_theta": 100.0},
}
LENGTH = 12
Pair = collections.namedtuple("Pair", "reference decoder params")  # one set of weights in both implementations


class At(nn.Module):
    """Runs one module of the decoder by itself, at its own place in the parameter dictionary."""

    kind: Any
    decoder: Decoder
    names: tuple[str, ...]

    @nn.compact
    def __call__(self, *args):
        name, *rest = self.names
        if rest:
            return At(self.kind, self.decoder, tuple(rest), name=name)(*args)
        return self.kind(self.decoder.config, self.decoder.dtype, None, name=name)(*args)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def apply_at(kind, decoder, names, params, *args):
    return At(kind, decoder, names).apply({"params": params}, *args)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(decoder, params, tokens_BT, positions_BT, valid_BT):
    return decoder.apply({"params": params}, tokens_BT, positions_BT, valid_BT)[0]


def forward(pair, tokens_BT):
    """Logits of sequences without padding."""
    tokens_BT = np.asarray(tokens_BT)
    positions_BT = np.broadcast_to(np.arange(tokens_BT.shape[1]), tokens_BT.shape)
    return np.asarray(logits_of(pair.decoder, pair.params, tokens_BT, positions_BT, np.ones(tokens_BT.shape, bool)))


def at_layer(params, layer):
    return {**params, "layers": jax.tree.map(lambda x: x[layer], params["layers"])}


def assert_close(ours, reference):
    ours, reference = np.asarray(ours), reference.detach().numpy()
    assert ours.shape == reference.shape and ours.dtype == reference.dtype
    assert np.max(np.abs(ours - reference)) <= TOLERANCE * np.max(np.abs(reference))


def make_pair(folder, sharder, **changes):
    """Write weights whose norm scales differ from one, and load them twice."""
    write_tiny_model(folder, **changes)
    rng = np.random.default_rng(0)
    tensors = {name: x + rng.normal(0, 0.3, x.shape).astype(x.dtype) if "norm" in name else x
               for name, x in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config, params = load_params(folder, sharder)
    reference = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    return Pair(reference, Decoder(config, jnp.float32, None), params)


@pytest.fixture(scope="module", params=VARIANTS, ids=list(VARIANTS))
def pair(request, tmp_path_factory, sharder):
    return make_pair(tmp_path_factory.mktemp("parity") / "model", sharder, **VARIANTS[request.param])


@pytest.fixture(scope="module")
def untied(tmp_path_factory, sharder):
    return make_pair(tmp_path_factory.mktemp("untied") / "model", sharder, **VARIANTS["gqa-untied"])


@pytest.fixture(scope="module")
def tokens_BT():
    return np.random.default_rng(1).integers(0, 256, (2, LENGTH))


@pytest.fixture(scope="module")
def x_BTD():
    return np.random.default_rng(2).normal(size=(2, LENGTH, 32)).astype(np.float32)


def surroundings(pair, x_BTD):
    """Angles and mask of a plain causal sequence: ours, then those of the reference."""
    positions_BT = np.broadcast_to(np.arange(LENGTH), x_BTD.shape[:2])
    ours = rotary_angles(pair.decoder.config, jnp.asarray(positions_BT)), jnp.ones(x_BTD.shape[:2], bool)
    cos_sin = pair.reference.model.rotary_emb(torch.tensor(x_BTD), torch.tensor(positions_BT))
    mask = torch.full((LENGTH, LENGTH), torch.finfo(torch.float32).min).triu(1)[None, None]
    return ours, {"position_embeddings": cos_sin, "attention_mask": mask}


def test_embedder(pair, tokens_BT):
    ours = apply_at(Embedder, pair.decoder, ("embedder",), pair.params, tokens_BT)
    assert_close(ours, pair.reference.model.embed_tokens(torch.tensor(tokens_BT)))


@pytest.mark.parametrize("name", ["attention_norm", "mlp_norm", "final_norm"])
def test_rms_norm(pair, x_BTD, name):
    layer = pair.reference.model.layers[1]
    theirs = {"attention_norm": layer.input_layernorm, "mlp_norm": layer.post_attention_layernorm,
              "final_norm": pair.reference.model.norm}[name]
    names = (name,) if name == "final_norm" else ("layers", name)
    x_BTD = 0.1 * x_BTD  # small enough for epsilon to count
    assert_close(apply_at(RMSNorm, pair.decoder, names, at_layer(pair.params, 1), x_BTD), theirs(torch.tensor(x_BTD)))


def test_rotary(pair):
    config, rng = pair.decoder.config, np.random.default_rng(3)
    positions_BT = np.stack([np.arange(LENGTH), np.arange(40, 40 + LENGTH)])
    q_BTNH = rng.normal(size=(2, LENGTH, config.num_heads, config.head_dim)).astype(np.float32)
    k_BTKH = rng.normal(size=(2, LENGTH, config.num_kv_heads, config.head_dim)).astype(np.float32)
    cos, sin = pair.reference.model.rotary_emb(torch.tensor(q_BTNH), torch.tensor(positions_BT))
    theirs = apply_rotary_pos_emb(*(torch.tensor(x).transpose(1, 2) for x in (q_BTNH, k_BTKH)), cos, sin)
    angles_BTh = rotary_angles(config, jnp.asarray(positions_BT))
    for x_BTNH, reference in zip((q_BTNH, k_BTKH), theirs):
        assert_close(rotate(jnp.asarray(x_BTNH), angles_BTh), reference.transpose(1, 2))


def test_attention(pair, x_BTD):
    ours, theirs = surroundings(pair, x_BTD)
    y_BTD, _ = apply_at(Attention, pair.decoder, ("layers", "attention"), at_layer(pair.params, 1), x_BTD, *ours)
    assert_close(y_BTD, pair.reference.model.layers[1].self_attn(torch.tensor(x_BTD), **theirs)[0])


def test_mlp(pair, x_BTD):
    ours = apply_at(Mlp, pair.decoder, ("layers", "mlp"), at_layer(pair.params, 1), x_BTD)
    assert_close(ours, pair.reference.model.layers[1].mlp(torch.tensor(x_BTD)))


@pytest.mark.parametrize("layer", [0, 1])
def test_block(pair, x_BTD, layer):
    (angles_BTh, valid_BT), theirs = surroundings(pair, x_BTD)
    y_BTD, _ = apply_at(Block, pair.decoder, ("layers",), at_layer(pair.params, layer), x_BTD, None, None, angles_BTh,
                        valid_BT, None)
    reference = pair.reference.model.layers[layer](torch.tensor(x_BTD), **theirs)
    assert_close(y_BTD, reference if torch.is_tensor(reference) else reference[0])  # transformers 4 returns a tuple


def test_logits(pair, tokens_BT):
    assert_close(forward(pair, tokens_BT), pair.reference(torch.tensor(tokens_BT)).logits)


def test_logits_at_chosen_positions(untied, tokens_BT):
    at_BA = np.array([[0, 5], [LENGTH - 1, 3]])
    positions_BT = np.broadcast_to(np.arange(LENGTH), tokens_BT.shape)
    chosen, _ = untied.decoder.apply({"params": untied.params}, tokens_BT, positions_BT,
                                     np.ones(tokens_BT.shape, bool), logits_at_BA=at_BA)
    np.testing.assert_allclose(chosen, np.take_along_axis(forward(untied, tokens_BT), at_BA[..., None], 1), atol=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(pair, tokens_BT, side):
    sizes = (LENGTH - 5, LENGTH)
    valid_BT = np.stack([np.arange(LENGTH) < n if side == "right" else np.arange(LENGTH) >= LENGTH - n for n in sizes])
    positions_BT = np.maximum(np.cumsum(valid_BT, axis=1) - 1, 0)
    padded_BT = np.where(valid_BT, tokens_BT, 77)
    logits_BTV = np.asarray(logits_of(pair.decoder, pair.params, padded_BT, positions_BT, valid_BT))
    for b in range(2):
        alone = pair.reference(torch.tensor(tokens_BT[b:b + 1][:, valid_BT[b]])).logits
        assert_close(logits_BTV[b:b + 1][:, valid_BT[b]], alone)


def test_greedy_decode_equals_full_forward_and_hf_generate(pair, tokens_BT):
    sizes, new = (LENGTH - 4, LENGTH), 8
    batch = prompt_batch([tokens_BT[b, :n].tolist() for b, n in enumerate(sizes)], LENGTH)
    decode = lambda stop: np.asarray(greedy_decode(
        pair.decoder, pair.params, batch["tokens"], batch["valid"], jnp.array([stop]), max_new=new))
    free = decode(-2)
    assert len(np.unique(free)) > 2, "the model repeats itself: the cache is not tested"

    whole = np.zeros((2, LENGTH + new), np.int64)
    for b, n in enumerate(sizes):
        whole[b, :n], whole[b, n:n + new] = tokens_BT[b, :n], free[b]
    best = forward(pair, whole).argmax(-1)
    for b, n in enumerate(sizes):
        np.testing.assert_array_equal(free[b], best[b, n - 1:n - 1 + new])

    stop = int(free[0, 3])
    theirs = pair.reference.generate(
        input_ids=torch.tensor(batch["tokens"], dtype=torch.long), attention_mask=torch.tensor(batch["valid"]).long(),
        do_sample=False, max_new_tokens=new, eos_token_id=stop, pad_token_id=263)[:, LENGTH:].numpy()
    ours = decode(stop)
    np.testing.assert_array_equal(np.where(ours < 0, 263, ours)[:, :theirs.shape[1]], theirs)
    for row, unstopped in zip(ours, free):
        end = next((i for i, t in enumerate(unstopped) if t == stop), new)
        assert row.tolist() == unstopped[:end + 1].tolist() + [-1] * (new - end - 1)


def test_remat_gives_the_same_gradients(untied, tokens_BT):
    positions_BT = np.broadcast_to(np.arange(LENGTH), tokens_BT.shape)
    valid_BT = np.ones(tokens_BT.shape, bool)

    def loss(decoder, params):
        logits_BTV, _ = decoder.apply({"params": params}, tokens_BT, positions_BT, valid_BT)
        logprobs_BTV = jax.nn.log_softmax(logits_BTV)
        return -jnp.mean(jnp.take_along_axis(logprobs_BTV[:, :-1], tokens_BT[:, 1:, None], axis=-1))

    remat = dataclasses.replace(untied.decoder, remat=True)
    plain_gradients, remat_gradients = (
        jax.jit(jax.grad(functools.partial(loss, decoder)))(untied.params) for decoder in (untied.decoder, remat))
    for plain, again in zip(jax.tree.leaves(plain_gradients), jax.tree.leaves(remat_gradients), strict=True):
        assert np.max(np.abs(plain)) > 0
        np.testing.assert_allclose(again, plain, rtol=0, atol=1e-6 * np.max(np.abs(plain)))
    programs = [str(jax.make_jaxpr(jax.grad(functools.partial(loss, d)))(untied.params)) for d in (untied.decoder, remat)]
    assert "remat" not in programs[0] and "remat" in programs[1]


def test_a_later_token_leaves_earlier_logits_as_they_are(pair, tokens_BT):
    changed_BT = tokens_BT.copy()
    changed_BT[:, 7] = (changed_BT[:, 7] + 1) % 256
    before, after = forward(pair, tokens_BT), forward(pair, changed_BT)
    np.testing.assert_array_equal(after[:, :7], before[:, :7])
    assert np.all(np.max(np.abs(after - before)[:, 7:], axis=-1) > 0)


def test_gradients_are_causal(untied):
    tokens_1T = np.arange(LENGTH)[None] * 7  # each token once, so that its embedding row stands for one position

    def read_out_T(embedding_VD):
        params = {**untied.params, "embedder": {"embedding": embedding_VD}}
        logits_1TV, _ = untied.decoder.apply(
            {"params": params}, tokens_1T, np.arange(LENGTH)[None], np.ones((1, LENGTH), bool))
        return logits_1TV[0] @ jnp.cos(jnp.arange(264.0))

    jacobian_TVD = np.asarray(jax.jit(jax.jacrev(read_out_T))(untied.params["embedder"]["embedding"]))
    reach_TV = np.max(np.abs(jacobian_TVD), axis=-1)
    np.testing.assert_array_equal(reach_TV[:, tokens_1T[0]] > 0, np.tril(np.ones((LENGTH, LENGTH), bool)))
    unused = np.setdiff1d(np.arange(264), tokens_1T[0])
    assert not np.any(reach_TV[:, unused])
