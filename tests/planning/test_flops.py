"""FLOPs of traced programs: by hand, against XLA's count of an unrolled program, and of the train
step."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec as P

from safepatch_jax.models.config import config_from_hf
from safepatch_jax.models.decoder import Decoder
from safepatch_jax.models.table import param_table
from safepatch_jax.planning.flops import count_flops
from safepatch_jax.planning.programs import abstract_batch
from safepatch_jax.testing import tiny_config
from safepatch_jax.training.step import Trainer
from tests.conftest import sharder_of

X, W = jnp.ones((3, 4)), jnp.ones((5, 4, 4))
ONE = 2 * 3 * 4 * 4


def count(f, *args, **options):
    return count_flops(jax.make_jaxpr(f)(*args), **options)


def test_products():
    assert count(lambda x, w: x @ w[0], X, W) == ONE
    assert count(lambda x, w: jnp.einsum("bd,lde->lbe", x, w), X, W) == 5 * ONE
    assert (
        count(
            lambda q, k: jnp.einsum("btnh,bsnh->bnts", q, k),
            jnp.ones((2, 7, 3, 8)),
            jnp.ones((2, 5, 3, 8)),
        )
        == 2 * 2 * 3 * 7 * 5 * 8
    )
    assert count(lambda x: x * x + 1, X) == 0


@pytest.mark.parametrize(
    "f, times",
    [
        (lambda x, w: jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0], 5),
        (lambda x, w: jax.lax.fori_loop(0, 7, lambda i, x: x @ w[0], x), 7),
        (lambda x, w: jax.lax.while_loop(lambda x: jnp.sum(x) < 9, lambda x: x @ w[0], x), 11),
        (
            lambda x, w: jax.lax.cond(
                x[0, 0] > 0, lambda x: x @ w[0] @ w[1], lambda x: x @ w[0], x
            ),
            2,
        ),
        (lambda x, w: jax.jit(lambda x: x @ w[0])(x), 1),
        (lambda x, w: jax.vmap(lambda w: x @ w)(w), 5),
        (jax.grad(lambda x, w: jnp.sum(jnp.tanh(x @ w[0]) @ w[1]), argnums=(0, 1)), 2 + 4),
        (
            jax.grad(
                lambda x, w: jnp.sum(
                    jax.checkpoint(lambda x: jnp.tanh(jnp.tanh(x @ w[0]) @ w[1]))(x)
                )
            ),
            2 + 2 + 2,
        ),
    ],
    ids=["scan", "fori", "while", "cond", "jit", "vmap", "grad", "remat"],
)
def test_loops_branches_and_calls(f, times):
    assert count(f, X, W, while_trips=11) == times * ONE


def test_custom_vjp_counts_what_runs():
    @jax.custom_vjp
    def f(x, w):
        return x @ w

    f.defvjp(lambda x, w: (f(x, w), (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))
    assert count(f, X, W[0]) == ONE
    assert count(jax.grad(lambda x, w: jnp.sum(f(x, w)), argnums=(0, 1)), X, W[0]) == 3 * ONE


def test_shard_map_counts_all_its_devices():
    mesh = sharder_of(8, tensor=2).mesh
    f = jax.shard_map(
        lambda x, w: x @ w,
        mesh=mesh,
        in_specs=(P("fsdp", None), P(None, "tensor")),
        out_specs=P("fsdp", "tensor"),
    )
    assert count(f, jnp.ones((8, 4)), jnp.ones((4, 6))) == 2 * 8 * 4 * 6


def test_a_kernel_counts_its_grid():
    def kernel(x_ref, w_ref, out_ref):
        out_ref[...] = x_ref[...] @ w_ref[...]

    f = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((16, 24), jnp.float32),
        grid=(2, 3),
        in_specs=[
            pl.BlockSpec((8, 4), lambda i, j: (i, 0)),
            pl.BlockSpec((4, 8), lambda i, j: (0, j)),
        ],
        out_specs=pl.BlockSpec((8, 8), lambda i, j: (i, j)),
    )
    assert count(f, jnp.ones((16, 4)), jnp.ones((4, 24))) == 2 * 16 * 4 * 24


def test_a_scan_counts_as_xla_counts_it_unrolled():
    def loss(ws, x, unroll):
        return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws, unroll=unroll)[0])

    args = jnp.ones((6, 128, 128)), jnp.ones((256, 128))
    unrolled = (
        jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
        .lower(*args, 6)
        .compile()
        .cost_analysis()["flops"]
    )
    assert count(lambda ws, x: jax.grad(loss, argnums=(0, 1))(ws, x, 1), *args) == pytest.approx(
        unrolled, rel=0.02
    )


def test_a_train_step_is_three_forward_passes_and_remat_adds_most_of_one():
    config = config_from_hf(tiny_config(num_hidden_layers=3, tie_word_embeddings=False))
    sharder = sharder_of(1)
    table, batch, length, answers = param_table(config), 4, 24, 8
    weights = sum(
        row.num_layers * row.hf_shape[0] * row.hf_shape[1] for row in table.scope("block_linear")
    )
    attention = config.num_layers * 2 * length * length * config.num_heads * config.head_dim
    blocks = 2 * batch * (length * weights + attention)
    head = 2 * batch * answers * config.vocab_size * config.embed_dim
    counts = {}
    for remat in ("none", "dots", "full"):
        trainer = Trainer(Decoder(config, jnp.float32, sharder, remat=remat), table, sharder)
        traced = trainer.trace(abstract_batch(batch, (length, answers), sharder))
        counts[remat] = count_flops(traced.jaxpr)
    assert counts["none"] == 3 * (blocks + head)
    assert counts["none"] < counts["dots"] < counts["full"] <= counts["none"] + blocks
