"""Parity of every family with the torch implementation of Hugging Face, rung by rung, so that a
failure names the rung.

The reference runs once with hooks; each of our modules then gets the very input of its counterpart.
"""

import copy
import dataclasses
import functools
import json
import operator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from safepatch_jax.data.chat import prompt_batch
from safepatch_jax.evaluation.generate import decode as generate_tokens
from safepatch_jax.io.hf import load_params
from safepatch_jax.models import decoder as modules
from safepatch_jax.models.attention import Attention, visible
from safepatch_jax.models.cache import Cache
from safepatch_jax.models.config import DecoderConfig, config_from_hf
from safepatch_jax.models.decoder import Decoder
from safepatch_jax.models.module import RMSNorm
from safepatch_jax.models.rope import layer_kinds, rotary_angles, rotary_frequencies, rotate
from safepatch_jax.models.table import param_table, unnest
from tests.models.families import LLAMA3, hf_config, tiny_raw
from tests.padding import left_padded

torch = pytest.importorskip("torch", reason="parity is measured against torch: pip install torch")

TOLERANCE = 1e-5  # of the reference's largest magnitude
LENGTH, WINDOW, VOCAB = 20, 5, 264
LLAMA_3_1 = LLAMA3 | {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
WINDOWS = {
    "num_hidden_layers": 3,
    "sliding_window": WINDOW,
    "use_sliding_window": True,
    "max_window_layers": 1,
}
VARIANTS = {
    "llama-mha": ("llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-2}),
    "llama-gqa-untied": ("llama", {"tie_word_embeddings": False}),
    "llama-mqa-theta": ("llama", {"num_key_value_heads": 1, "rope_theta": 500000.0}),
    "llama-head_dim-untied": (
        "llama",
        {"head_dim": 12, "tie_word_embeddings": False, "rope_theta": 100.0},
    ),
    # Of the 8 rotations, 1 is faster than the scaled ones, 2 lie between and 5 are slow; LENGTH is
    # beyond the original 12.
    "llama3-scaled": ("llama", {"head_dim": 16, "rope_theta": 10.0, "rope_scaling": LLAMA3}),
    "gemma": ("gemma", {"head_dim": 256, "num_attention_heads": 2, "num_key_value_heads": 1}),
    "gemma-gelu": ("gemma", {"hidden_act": "gelu", "hidden_activation": None}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 12}),
    "mistral-window": ("mistral", {"sliding_window": WINDOW}),
    "qwen2": (
        "qwen2",
        {"use_sliding_window": False, "tie_word_embeddings": False, "rope_theta": 1e6},
    ),
    "qwen2-tied-windows": ("qwen2", WINDOWS),
    "qwen3-windows": ("qwen3", WINDOWS),
    "smollm3": ("smollm3", {"num_hidden_layers": 3, "no_rope_layers": [0, 1, 0]}),
    "granite": ("granite", {"tie_word_embeddings": False}),
    "olmo2": ("olmo2", {"tie_word_embeddings": False}),
    "gemma2": ("gemma2", {"num_hidden_layers": 3}),
    "gemma3": ("gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
}
ONE_OF_EACH = ["llama3-scaled", "gemma", "mistral-window", "qwen2-tied-windows"]
TOKENS = np.random.default_rng(1).integers(0, VOCAB, (2, LENGTH))


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


def counted(tokens_BT):
    """Positions and validity of sequences without padding."""
    positions_BT = np.broadcast_to(np.arange(tokens_BT.shape[1]), tokens_BT.shape)
    return positions_BT, np.ones(tokens_BT.shape, bool)


def relative_error(ours, reference):
    ours, reference = (
        x.detach().numpy() if torch.is_tensor(x) else np.asarray(x) for x in (ours, reference)
    )
    assert ours.shape == reference.shape and ours.dtype == reference.dtype
    return np.max(np.abs(ours - reference)) / np.max(np.abs(reference))


def assert_close(ours, reference):
    assert relative_error(ours, reference) <= TOLERANCE


@dataclasses.dataclass
class Pair:
    """One set of weights in both implementations, and what went through the reference's modules."""

    reference: Any
    config: DecoderConfig
    params: Any
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]

    @property
    def decoder(self):
        return Decoder(self.config, jnp.float32, None)

    @property
    def logits_BTV(self):
        return self.outputs[""]

    def forward(self, tokens_BT, **changes):
        """Logits of sequences without padding; `changes` are of the architecture."""
        decoder = Decoder(dataclasses.replace(self.config, **changes), jnp.float32, None)
        return np.asarray(logits_of(decoder, self.params, tokens_BT, *counted(tokens_BT)))

    def assert_rung(self, kind, names, theirs, *args, layer=None):
        """Compare one module, given the input that its counterpart `theirs` had."""
        params = self.params
        if layer is not None:
            params = {**params, "layers": jax.tree.map(lambda x: x[layer], params["layers"])}
        ours = apply_at(kind, self.decoder, names, params, self.inputs[theirs], *args)
        assert_close(ours[0] if isinstance(ours, tuple) else ours, self.outputs[theirs])


def randomise(model):
    """Draw weights at which every part of the model counts: attention is far from uniform, norms
    and biases are not idle."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            draw = torch.randn(weight.shape, generator=generator)
            if name.endswith("norm.weight"):
                weight += 0.3 * draw  # from 1, or from 0 where the scale is an offset
            elif name.endswith("bias"):
                weight.copy_(0.5 * draw)
            else:
                weight.copy_(draw * (0.1 if "embed" in name else 1.5 * weight.shape[-1] ** -0.5))


def make_pair(folder, sharder, family, changes):
    """Let transformers write a model, load it twice, and run the reference once."""
    raw = tiny_raw(family, **changes)
    model = AutoModelForCausalLM.from_config(hf_config(raw))
    randomise(model)
    model.save_pretrained(folder)
    if (
        raw["hidden_act"] == "gelu"
    ):  # the files of the first Gemma releases; transformers 5 itself no longer writes them
        written = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(
            json.dumps(written | {"hidden_act": "gelu", "hidden_activation": None})
        )
    reference = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    config, params = load_params(folder, sharder)
    assert config == config_from_hf(raw)

    pair = Pair(reference, config, params, {}, {})

    def keep(name, _, args, kwargs, output):
        first = args[0] if args else next(iter(kwargs.values()))
        pair.inputs[name] = first.numpy()
        output = getattr(output, "logits", output)
        pair.outputs[name] = (output[0] if isinstance(output, tuple) else output).numpy()

    watched = {
        name: module
        for name, module in reference.named_modules()
        if not name
        or name.endswith(("embed_tokens", "norm", "self_attn", "mlp"))
        or name.split(".")[-1].isdigit()
    }
    hooks = [
        m.register_forward_hook(functools.partial(keep, name), with_kwargs=True)
        for name, m in watched.items()
    ]
    with torch.no_grad():
        reference(input_ids=torch.tensor(TOKENS), use_cache=False)
    for hook in hooks:
        hook.remove()
    return pair


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, sharder):
    return functools.cache(
        lambda name: make_pair(tmp_path_factory.mktemp("parity") / name, sharder, *VARIANTS[name])
    )


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, pairs):
    return pairs(request.param)


@pytest.fixture(scope="module", params=ONE_OF_EACH)
def family_pair(request, pairs):
    return pairs(request.param)


def test_embedder(pair):
    if pair.config.family == "granite":  # the reference multiplies outside of the module
        pair.outputs["model.embed_tokens"] *= pair.config.embed_multiplier
    pair.assert_rung(modules.Embedder, ("embedder",), "model.embed_tokens")


NORMS = {
    "pre": {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    "post": {
        "attention_post_norm": "post_attention_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    },
}
NORMS["both"] = {
    "attention_norm": "input_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    **NORMS["post"],
}


def test_rms_norm(pair):
    for layer in range(pair.config.num_layers):
        for ours, theirs in NORMS[pair.config.norms].items():
            pair.assert_rung(
                RMSNorm, ("layers", ours), f"model.layers.{layer}.{theirs}", layer=layer
            )
    pair.assert_rung(RMSNorm, ("final_norm",), "model.norm")


def test_rotary(pair):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    config, rng = pair.config, np.random.default_rng(3)
    positions_BT = np.stack([np.arange(LENGTH), rng.integers(0, 8192, LENGTH)])
    q_BTNH = rng.normal(size=(2, LENGTH, config.num_heads, config.head_dim)).astype(np.float32)
    k_BTKH = rng.normal(size=(2, LENGTH, config.num_kv_heads, config.head_dim)).astype(np.float32)
    kind = {"layer_type": "full_attention"} if config.family == "gemma3_text" else {}
    cos, sin = pair.reference.model.rotary_emb(
        torch.tensor(q_BTNH), torch.tensor(positions_BT), **kind
    )
    theirs = apply_rotary_pos_emb(
        *(torch.tensor(x).transpose(1, 2) for x in (q_BTNH, k_BTKH)), cos, sin
    )
    angles_BTh = rotary_angles(config, jnp.asarray(positions_BT))
    if config.ropes:
        angles_BTh = angles_BTh * rotary_frequencies(config)
    for x_BTNH, reference in zip((q_BTNH, k_BTKH), theirs):
        turn = jnp.sin(angles_BTh), jnp.cos(angles_BTh)
        assert_close(rotate(jnp.asarray(x_BTNH), *turn), reference.transpose(1, 2))


def surroundings(pair, layer):
    """What attention needs beside its input: angles, mask, distances and the layer's window."""
    positions_BT, valid_BT = counted(TOKENS)
    mask_BTS, distance_BTS = visible(jnp.asarray(positions_BT), jnp.asarray(valid_BT), None)
    kind = jax.tree.map(operator.itemgetter(layer), layer_kinds(pair.config))
    angles_BTh = rotary_angles(pair.config, positions_BT)
    if kind.frequencies is not None:
        angles_BTh = angles_BTh * kind.frequencies
    return angles_BTh, mask_BTS, distance_BTS, kind.window


def test_attention(pair):
    for layer in range(pair.config.num_layers):
        name = f"model.layers.{layer}.self_attn"
        pair.assert_rung(
            Attention,
            ("layers", "attention"),
            name,
            *surroundings(pair, layer),
            layer=layer,
        )


def test_mlp(pair):
    for layer in range(pair.config.num_layers):
        pair.assert_rung(modules.Mlp, ("layers", "mlp"), f"model.layers.{layer}.mlp", layer=layer)


def test_block(pair):
    for layer in range(pair.config.num_layers):
        kind = jax.tree.map(operator.itemgetter(layer), layer_kinds(pair.config))
        block = jax.tree.map(lambda x, layer=layer: x[layer], pair.params["layers"])
        module = modules.OneBlock(pair.config, pair.decoder.dtype, pair.decoder.sharder)
        inputs = pair.inputs[f"model.layers.{layer}"], kind, *counted(TOKENS)
        ours, _ = module.apply({"params": {"layers": block}}, *inputs)
        assert_close(ours, pair.outputs[f"model.layers.{layer}"])


def test_logits(pair):
    assert_close(pair.forward(TOKENS), pair.logits_BTV)


@pytest.mark.parametrize(
    "variant, changes",
    [
        ("llama-mha", {"norm_eps": 1e-5}),
        ("llama-mqa-theta", {"rope_theta": 10000.0}),
        ("llama3-scaled", {"rope_scaling": None}),
        ("gemma", {"norm_offset": False}),
        ("gemma", {"embed_multiplier": 1.0}),
        ("gemma-gelu", {"activation": "silu"}),
        ("mistral-window", {"windows": ()}),
        ("mistral-window", {"windows": (WINDOW - 1,) * 2}),
        ("mistral-window", {"windows": (WINDOW + 1,) * 2}),
        ("qwen2-tied-windows", {"windows": ()}),
        ("qwen2-tied-windows", {"windows": (WINDOW,) * 3}),
        ("qwen2", {"qkv_bias": False}),
        ("smollm3", {"ropes": ()}),
        ("granite", {"embed_multiplier": 1.0}),
        ("granite", {"residual_multiplier": 1.0}),
        ("granite", {"attention_scale": None}),
        ("granite", {"logit_divisor": 1.0}),
        ("gemma2", {"attention_cap": 0.0}),
        ("gemma2", {"logit_cap": 0.0}),
        ("gemma2", {"attention_scale": None}),
        ("gemma3", {"local_rope_theta": 10000.0}),
        ("gemma3", {"rope_scaling": None}),
        ("gemma3", {"ropes": ()}),
    ],
    ids=lambda x: x if isinstance(x, str) else "-".join(x),
)
def test_each_switch_counts(pairs, variant, changes):
    """The parity above says something only if a wrong switch would show."""
    pair = pairs(variant)
    assert relative_error(pair.forward(TOKENS, **changes), pair.logits_BTV) > 1000 * TOLERANCE


def test_gelu_is_the_tanh_approximation(pairs):
    """The exact GELU, which the name in the file suggests, would not pass the tolerance of the
    feed-forward rung."""
    pair = pairs("gemma-gelu")
    exact, x_BTD = (
        pair.reference.model.layers[0].mlp,
        torch.tensor(pair.inputs["model.layers.0.mlp"]),
    )
    with torch.no_grad():
        y_BTD = exact.down_proj(
            torch.nn.functional.gelu(exact.gate_proj(x_BTD)) * exact.up_proj(x_BTD)
        )
    assert relative_error(y_BTD, pair.outputs["model.layers.0.mlp"]) > 10 * TOLERANCE


@pytest.mark.parametrize(
    "theta, head_dim, scaling",
    [
        (5e5, 128, LLAMA_3_1),
        (5e5, 64, LLAMA_3_1 | {"factor": 32.0}),  # LLaMA 3.1, 3.2
        (1e4, 128, LLAMA_3_1 | {"factor": 10.0, "low_freq_factor": 1.5, "high_freq_factor": 2.0}),
        (10.0, 16, LLAMA3),
        (1e4, 128, None),
        (5e5, 128, None),
        (1e6, 128, None),
        (1e6, 64, None),
        (1e4, 256, None),
    ],
)
def test_rotary_frequencies(theta, head_dim, scaling):
    raw = tiny_raw(
        "llama",
        rope_theta=theta,
        head_dim=head_dim,
        rope_scaling=scaling,
        max_position_embeddings=131072,
    )
    hf = hf_config(raw)
    theirs = type(AutoModelForCausalLM.from_config(hf).model.rotary_emb)(hf).inv_freq.numpy()
    ours = rotary_frequencies(config_from_hf(raw))
    assert ours.dtype == theirs.dtype == np.float32
    np.testing.assert_array_max_ulp(ours, theirs, maxulp=1)
    if scaling:
        plain = rotary_frequencies(config_from_hf(raw | {"rope_scaling": None}))
        slowed = plain / ours
        assert np.any(slowed == 1) and np.any(slowed == scaling["factor"])
        assert np.any((slowed > 1) & (slowed < scaling["factor"])), (
            "no rotation lies between the two bounds"
        )


def test_silu_and_its_gradient():
    x = np.linspace(-200, 200, 801, dtype=np.float32)
    t = torch.tensor(x, requires_grad=True)
    torch.nn.functional.silu(t).sum().backward()
    ours, gradient = jax.jit(jax.vmap(jax.value_and_grad(modules.silu)))(x)
    np.testing.assert_allclose(ours, torch.nn.functional.silu(t).detach(), rtol=1e-6, atol=1e-30)
    np.testing.assert_allclose(gradient, t.grad, atol=1e-6)


def test_logits_at_chosen_positions(family_pair):
    at_BA = np.array([[0, 5], [LENGTH - 1, 3]])
    chosen, _ = jax.jit(family_pair.decoder.apply)(
        {"params": family_pair.params}, TOKENS, *counted(TOKENS), logits_at_BA=at_BA
    )
    assert_close(chosen, np.take_along_axis(family_pair.logits_BTV, at_BA[..., None], 1))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(pair, side):
    sizes = (LENGTH - 7, LENGTH)
    valid_BT = np.stack(
        [
            np.arange(LENGTH) < n if side == "right" else np.arange(LENGTH) >= LENGTH - n
            for n in sizes
        ]
    )
    positions_BT = np.maximum(np.cumsum(valid_BT, axis=1) - 1, 0)
    padded_BT = np.where(valid_BT, TOKENS, 77)
    logits_BTV = np.asarray(logits_of(pair.decoder, pair.params, padded_BT, positions_BT, valid_BT))
    for b in range(2):
        alone_1T = TOKENS[b : b + 1][:, valid_BT[b]]
        assert_close(
            logits_BTV[b : b + 1][:, valid_BT[b]], pair.reference(torch.tensor(alone_1T)).logits
        )


def test_continuing_from_a_cache(family_pair):
    """A cache whose free slots are not empty, and several new tokens at once."""
    pair, first = family_pair, LENGTH - 8
    (positions_BT, valid_BT), params = counted(TOKENS), {"params": family_pair.params}

    def part(s):
        return TOKENS[:, s], positions_BT[:, s], valid_BT[:, s]

    apply = jax.jit(pair.decoder.apply, static_argnames="keep_kv")
    _, kv = apply(params, *part(slice(first)), keep_kv=True)
    slots = ((0, 0), (0, 0), (0, 0), (0, LENGTH + 2 - first), (0, 0))
    cache = Cache(*(jnp.pad(x.swapaxes(2, 3), slots, constant_values=3.0) for x in kv))
    logits_BTV, _ = apply(params, *part(slice(first, None)), cache=cache)
    assert_close(logits_BTV, pair.logits_BTV[:, first:])


def test_decode_equals_full_forward_and_hf_generate(pair):
    sizes, new = (LENGTH - 12, LENGTH - 8), 8
    prompts = [TOKENS[b, :n].tolist() for b, n in enumerate(sizes)]
    batch, (tokens, valid) = prompt_batch(prompts, max(sizes)), left_padded(prompts)

    def decode(stop):
        stop_ids = jnp.array([stop])
        return np.asarray(
            generate_tokens(pair.decoder, pair.params, *batch.values(), stop_ids, max_new=new)
        )

    free = decode(-2)
    assert len(np.unique(free)) > 2, "the model repeats itself: the cache is not tested"

    whole = np.zeros((2, LENGTH), np.int64)
    for b, n in enumerate(sizes):
        whole[b, :n], whole[b, n : n + new] = TOKENS[b, :n], free[b]
    best = pair.forward(whole).argmax(-1)
    for b, n in enumerate(sizes):
        np.testing.assert_array_equal(free[b], best[b, n - 1 : n - 1 + new])

    stop = int(free[0, 3])
    theirs = pair.reference.generate(
        input_ids=torch.tensor(tokens, dtype=torch.long),
        attention_mask=torch.tensor(valid).long(),
        do_sample=False,
        max_new_tokens=new,
        eos_token_id=stop,
        pad_token_id=VOCAB - 1,
    )[:, max(sizes) :].numpy()
    ours = decode(stop)
    np.testing.assert_array_equal(np.where(ours < 0, VOCAB - 1, ours)[:, : theirs.shape[1]], theirs)
    for row, unstopped in zip(ours, free):
        end = next((i for i, t in enumerate(unstopped) if t == stop), new)
        assert row.tolist() == unstopped[: end + 1].tolist() + [-1] * (new - end - 1)


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.grad, argnums=1)
def gradients_of(decoder, params):
    """Gradients of the mean loss of the next token."""
    logits_BTV, _ = decoder.apply({"params": params}, TOKENS, *counted(TOKENS))
    logprobs_BTV = jax.nn.log_softmax(logits_BTV)
    return -jnp.mean(jnp.take_along_axis(logprobs_BTV[:, :-1], TOKENS[:, 1:, None], axis=-1))


def test_gradients_equal_those_of_torch(family_pair):
    """Importance scores and training are made of these."""
    pair, flat = family_pair, unnest(gradients_of(family_pair.decoder, family_pair.params))
    pair.reference.zero_grad()
    pair.reference(torch.tensor(TOKENS), labels=torch.tensor(TOKENS)).loss.backward()
    theirs = {name: p.grad for name, p in pair.reference.named_parameters()}
    rows = param_table(pair.config).hf_names()
    assert rows.keys() == theirs.keys()
    for name, (row, layer) in rows.items():
        assert_close(row.as_matrices(flat[row.path])[layer], theirs[name])


def test_remat_gives_the_same_gradients(pairs):
    pair = pairs("qwen2-tied-windows")
    remat = dataclasses.replace(pair.decoder, remat="full")
    plain_gradients, remat_gradients = (
        gradients_of(decoder, pair.params) for decoder in (pair.decoder, remat)
    )
    for plain, again in zip(
        jax.tree.leaves(plain_gradients), jax.tree.leaves(remat_gradients), strict=True
    ):
        assert np.max(np.abs(plain)) > 0
        np.testing.assert_allclose(again, plain, rtol=0, atol=1e-6 * np.max(np.abs(plain)))
    programs = [
        str(jax.make_jaxpr(functools.partial(gradients_of, d))(pair.params))
        for d in (pair.decoder, remat)
    ]
    assert "remat" not in programs[0] and "remat" in programs[1]


def test_a_later_token_leaves_earlier_logits_as_they_are(pair):
    changed_BT = TOKENS.copy()
    changed_BT[:, 7] = (changed_BT[:, 7] + 1) % VOCAB
    before, after = pair.forward(TOKENS), pair.forward(changed_BT)
    np.testing.assert_array_equal(after[:, :7], before[:, :7])
    reach = 1 + sum(w - 1 if w else LENGTH for w in pair.config.windows or (0,))
    changed_T = np.max(np.abs(after - before), axis=(0, 2))[7:] > 0
    np.testing.assert_array_equal(changed_T, np.arange(LENGTH - 7) < reach)


@pytest.mark.parametrize("variant", ["llama-gqa-untied", "mistral-window"])
def test_gradients_are_causal_and_end_at_the_window(pairs, variant):
    pair = pairs(variant)
    tokens_1T = (
        np.arange(LENGTH)[None] * 7
    )  # each token once, so that its embedding row stands for one position

    def read_out_T(embedding_VD):
        params = {**pair.params, "embedder": {"embedding": embedding_VD}}
        logits_1TV, _ = pair.decoder.apply({"params": params}, tokens_1T, *counted(tokens_1T))
        return logits_1TV[0] @ jnp.cos(jnp.arange(float(VOCAB)))

    jacobian_TVD = np.asarray(jax.jit(jax.jacrev(read_out_T))(pair.params["embedder"]["embedding"]))
    reach_TV = np.max(np.abs(jacobian_TVD), axis=-1)
    distance_TT = np.arange(LENGTH)[:, None] - np.arange(LENGTH)
    farthest = sum(w - 1 for w in pair.config.windows) or LENGTH
    np.testing.assert_array_equal(
        reach_TV[:, tokens_1T[0]] > 0, (distance_TT >= 0) & (distance_TT <= farthest)
    )
    assert not np.any(reach_TV[:, np.setdiff1d(np.arange(VOCAB), tokens_1T[0])])


def test_bfloat16_norm_is_cast_where_torch_casts_it(family_pair):
    pair, x_BTD = family_pair, family_pair.inputs["model.norm"]
    decoder = dataclasses.replace(pair.decoder, dtype=jnp.bfloat16)
    ours_BTD = apply_at(
        RMSNorm, decoder, ("final_norm",), pair.params, jnp.asarray(x_BTD, jnp.bfloat16)
    )
    with torch.no_grad():
        theirs_BTD = (
            copy.deepcopy(pair.reference.model.norm)
            .bfloat16()(torch.tensor(x_BTD).bfloat16())
            .float()
            .numpy()
        )
    # Rarely, float32 rounds across a boundary.
    assert np.mean(np.asarray(ours_BTD, np.float32) == theirs_BTD) > 0.98


def test_bfloat16_is_as_near_to_float32_as_in_torch(family_pair):
    pair = family_pair
    rough = AutoModelForCausalLM.from_pretrained(
        pair.reference.name_or_path, dtype=torch.bfloat16
    ).eval()
    with torch.no_grad():
        theirs_BTV = rough(torch.tensor(TOKENS)).logits.float().numpy()
    ours_BTV = logits_of(
        dataclasses.replace(pair.decoder, dtype=jnp.bfloat16), pair.params, TOKENS, *counted(TOKENS)
    )

    def distance(x_BTV):
        return np.sqrt(np.mean(np.square(x_BTV - pair.logits_BTV)))

    assert 0.5 * distance(theirs_BTV) < distance(ours_BTV) < 1.5 * distance(theirs_BTV)
