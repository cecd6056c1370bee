"""What compiled programs do: real ones on 8 simulated devices, and lines as other compilers write
them."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from safepatch_jax.planning.hlo import Module, parse_arrays, parse_groups, parse_instruction
from safepatch_jax.planning.work import Collective, read_work, trip_counts
from tests.conftest import sharder_of

MESH = sharder_of(8, tensor=2).mesh  # fsdp 4, tensor 2


def compiled(f, *shapes_and_specs, out=None):
    args = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(MESH, spec))
        for shape, spec in shapes_and_specs
    ]
    return (
        jax.jit(f, out_shardings=None if out is None else NamedSharding(MESH, out))
        .lower(*args)
        .compile()
    )


def mapped(f, in_spec, out_spec):
    return jax.shard_map(f, mesh=MESH, in_specs=in_spec, out_specs=out_spec, check_vma=False)


@pytest.mark.parametrize(
    "f, out, kind, sent",
    [
        (lambda x: lax.psum(x, "fsdp"), P(None, None), "all-reduce", 2 * 3 / 4),
        (lambda x: lax.all_gather(x, "fsdp", tiled=True), P(None, None), "all-gather", 3),
        (
            lambda x: lax.ppermute(x, "fsdp", [(0, 1), (1, 2), (2, 3), (3, 0)]),
            P("fsdp", None),
            "collective-permute",
            1,
        ),
        (
            lambda x: lax.all_to_all(x, "fsdp", 0, 1, tiled=True),
            P("fsdp", None),
            "all-to-all",
            3 / 4,
        ),
    ],
)
def test_each_kind_of_collective(f, out, kind, sent):
    work = read_work(
        compiled(mapped(f, P("fsdp", None), out), ((64, 8), P("fsdp", None))).as_text()
    )
    assert work.by_kind() == {kind: (1, 16 * 8 * 4 * sent)}
    assert work.largest(kind) == 16 * 8 * 4 * (4 if kind == "all-gather" else 1)


def test_loops_multiply_what_is_in_them():
    def f(x):
        def inner(x, _):
            return lax.psum(x, "tensor") / 2, None

        def outer(x, _):
            x, _ = lax.scan(inner, x, None, length=3)
            return lax.ppermute(x, "fsdp", [(0, 1), (1, 0)]), None

        return lax.scan(outer, x, None, length=5)[0]

    text = compiled(
        mapped(f, P("fsdp", None), P("fsdp", None)), ((64, 8), P("fsdp", None))
    ).as_text()
    size = 16 * 8 * 4
    assert read_work(text).by_kind() == {
        "all-reduce": (15, 15.0 * size),
        "collective-permute": (5, 5.0 * size),
    }
    assert sorted(trip_counts(text).values()) == [3, 5]


def test_flops_of_each_device_and_traffic_of_a_scan():
    layers, width, rows = 24, 128, 64

    def f(ws, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0]

    work = read_work(
        compiled(
            f,
            ((layers, width, width), P(None, None, "tensor")),
            ((rows, width), P("fsdp", None)),
            out=P("fsdp", None),
        ).as_text()
    )
    assert work.flops == layers * 2 * rows * width * width // 8
    stack = layers * width * width // 2 * 4
    assert stack <= work.traffic < 6 * stack  # of each layer its slice, not the stack
    assert not work.unknown_loops and not work.sorts


def test_a_loop_that_may_end_early_counts_its_most_trips_and_sorts_are_seen():
    def f(x):
        def running(state):
            i, x = state
            return (i < 9) & ~jnp.all(x > 0)

        return lax.while_loop(running, lambda state: (state[0] + 1, jnp.sort(state[1])), (0, x))[1]

    text = jax.jit(f).lower(jnp.ones(64)).compile().as_text()
    assert list(trip_counts(text).values()) == [9] and read_work(text).sorts == 9


def test_a_loop_of_unknown_length_counts_once_and_is_reported():
    text = (
        jax.jit(lambda x, n: lax.fori_loop(0, n, lambda i, x: jnp.sin(x @ x), x))
        .lower(jnp.ones((8, 8)), 3)
        .compile()
        .as_text()
    )
    work = read_work(text)
    assert work.unknown_loops == 1 and work.flops == 2 * 8**3


def test_text_that_is_no_program():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        read_work("HloModule nothing")


@pytest.mark.parametrize(
    "text, groups",
    [
        ("replica_groups={{0,2},{1,3}}, dimensions={0}", ((0, 2), (1, 3))),
        ("source_target_pairs={{0,1},{1,0}}", ((0, 1), (1, 0))),
        ("replica_groups=[2,4]<=[8], to_apply=%add", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("replica_groups=[2,4]<=[4,2]T(1,0), x={{9}}", ((0, 2, 4, 6), (1, 3, 5, 7))),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", ((0, 1, 2, 3),)),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("channel_id=1", ()),
    ],
)
def test_spellings_of_replica_groups(text, groups):
    assert parse_groups(text) == groups


def test_shapes_and_instructions():
    sizes = [
        (a.size, a.dims, a.main)
        for a in parse_arrays(
            "(bf16[4,8]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/pred[3]{0}, f32[]{:T(128)}, s4[5]{0}, "
            "u32[]{:S(2)})"
        )
    ]
    assert sizes == [
        (64, (4, 8), False),
        (3, (3,), True),
        (4, (), True),
        (3, (5,), True),
        (4, (), False),
    ]
    i = parse_instruction(
        "  ROOT %dot.1 = f32[2,3]{1,0} dot(f32[2,4]{1,0} %a.1, f32[4,3]{1,0} %b), "
        "lhs_contracting_dims={1}"
    )
    assert (i.name, i.op, i.operands, i.root) == ("dot.1", "dot", ("a.1", "b"), True)
    assert parse_instruction("}") is None and parse_instruction("HloModule x, y={z}") is None


def test_exchanges_between_slices():
    attributes = (
        "channel_id=6, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="
        '"xla_megascale_runtime",_xla_megascale_target="{1,2}x{0:3}",'
        '_xla_megascale_transfer_type="ALL_REDUCE"}'
    )
    text = f"""ENTRY %main (a: bf16[16,64]) -> bf16[16,64] {{
  %a = bf16[16,64]{{1,0}} parameter(0)
  %after-all = token[] after-all()
  %send = (bf16[16,64]{{1,0}}, u32[], token[]) send(%a, %after-all), {attributes}
  %recv = (bf16[16,64]{{1,0}}, u32[], token[]) recv(%after-all), {attributes}
  %send-done = token[] send-done(%send), channel_id=6
  %recv-done = (bf16[16,64]{{1,0}}, token[]) recv-done(%recv), channel_id=6
  ROOT %result = bf16[16,64]{{1,0}} get-tuple-element(%recv-done), index=0
}}
"""
    work = read_work(text)
    assert work.collectives == (Collective("all-reduce", 2048, 2, across=True),)
    assert work.by_kind() == {"all-reduce between slices": (1, 2048.0)}
    assert work.sent() == 0 and work.sent(across=True) == 2048


# As the TPU compiler writes a scan over layers: no trip count, one all-gather in three fusions
# (start, a product beside it, done), a reduce-scatter as an all-reduce that is cut, a product as a
# convolution, the stack read slice by slice.
TPU = (pathlib.Path(__file__).parent / "tpu_program.txt").read_text()


@pytest.mark.parametrize("first, step, trips", [(0, 1, 6), (1, 1, 5), (0, 2, 3), (1, 2, 3)])
def test_a_tpu_program(first, step, trips):
    text = TPU.replace("FIRST", str(first)).replace("STEP", str(step))
    assert trip_counts(text) == {"while.1": trips}
    work = read_work(text)
    gathered = 64 * 128 * 2
    assert work.by_kind() == dict.fromkeys(
        ("all-gather", "reduce-scatter"), (trips, trips * gathered * 3 / 4)
    )
    assert work.largest("all-gather") == gathered
    assert work.largest("reduce-scatter") == gathered // 4
    assert work.flops == trips * 2 * 16 * 64 * 64
    # The stack's slice, the product's operands and result, the piece that the reduce-scatter
    # leaves, the counter.
    assert work.traffic == trips * ((64 * 32 + 16 * 64 + 64 * 64 + 16 * 64 + 64 * 32) * 2 + 4 + 12)


@pytest.mark.parametrize(
    "attributes, flops",
    [
        # q [4,192,4096] with k [8,128,4096]: heads as a window of 8 that is slid past the padding
        (
            "window={size=1x8 pad=0_0x7_7 rhs_reversal=0x1}, dim_labels=0bf1_1oi0->0b1f",
            2 * 4 * 192 * 8 * 128 * 4096,
        ),
    ],
)
def test_products_that_tpu_writes_as_convolutions(attributes, flops):
    text = f"""ENTRY %main (a: bf16[4,192,4096,1], b: bf16[8,128,4096,1]) -> bf16[4,192,8,128] {{
  %a = bf16[4,192,4096,1]{{2,1,0,3}} parameter(0)
  %b = bf16[8,128,4096,1]{{2,1,0,3}} parameter(1)
  ROOT %convolution.140 = bf16[4,192,8,128]{{3,1,2,0}} convolution(%a, %b), {attributes}
}}
"""
    assert read_work(text).flops == flops


def test_attention_products_as_convolutions_with_holes():
    attributes = "window={size=4x8 stride=3x7 lhs_dilate=4x8}, dim_labels=0b1f_0o1i->01bf"
    text = f"""ENTRY %main (a: bf16[4,192,8,128], b: bf16[4,192,8,128]) -> f32[4,8,192,192] {{
  %a = bf16[4,192,8,128]{{3,1,2,0}} parameter(0)
  %b = bf16[4,192,8,128]{{3,1,2,0}} parameter(1)
  ROOT %c = f32[4,8,192,192]{{3,2,1,0}} convolution(%a, %b), {attributes}
}}
"""
    assert read_work(text).flops == 2 * 4 * 8 * 192 * 192 * 128


def test_cublas_calls_count():
    attributes = (
        'custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":'
        '{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],'
        '"rhs_contracting_dimensions":["0"]}}}'
    )
    text = f"""ENTRY %main (a: bf16[16,64], b: bf16[64,32]) -> (bf16[16,32], s8[1024]) {{
  %a = bf16[16,64]{{1,0}} parameter(0)
  %b = bf16[64,32]{{1,0}} parameter(1)
  ROOT %gemm = (bf16[16,32]{{1,0}}, s8[1024]{{0}}) custom-call(%a, %b), {attributes}
}}
"""
    assert read_work(text).flops == 2 * 16 * 64 * 32


def test_a_conditional_counts_its_largest_branch():
    def f(x):
        return lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    text = jax.jit(f).lower(jnp.ones((64, 64))).compile().as_text()
    assert read_work(text).flops == 2 * 2 * 64**3


def test_a_module_knows_its_loops_and_calls():
    module = Module(TPU.replace("FIRST", "0").replace("STEP", "1"))
    assert module.entry == "main" and module.computations["body"]["beside"].called == (
        "async_collective_fusion.1",
    )
    assert functools.reduce(lambda n, c: n + len(c), module.computations.values(), 0) > 40


def test_of_an_update_in_place_within_a_fusion_the_rows_count_alone():
    """As XLA's CUDA compiler writes a cache: a scatter into the stack of all layers."""
    text = """HloModule m, is_scheduled=true

%write (p: bf16[32,1024], rows: s32[2,1], new: bf16[2,1024]) -> bf16[32,1024] {
  %p = bf16[32,1024]{1,0} parameter(0)
  %rows = s32[2,1]{1,0} parameter(1)
  %new = bf16[2,1024]{1,0} parameter(2)
  ROOT %scatter.1 = bf16[32,1024]{1,0} scatter(%p, %rows, %new), update_window_dims={1}
}

ENTRY %main (a: bf16[32,1024], rows: s32[2,1], new: bf16[2,1024]) -> bf16[32,1024] {
  %a = bf16[32,1024]{1,0} parameter(0)
  %rows.1 = s32[2,1]{1,0} parameter(1)
  %new.1 = bf16[2,1024]{1,0} parameter(2)
  ROOT %fusion.1 = bf16[32,1024]{1,0} fusion(%a, %rows.1, %new.1), kind=kInput, calls=%write
}
"""
    row = 2 * 1024 * 2
    assert read_work(text).traffic == 2 * row + 8 + row


def test_a_collective_that_is_awaited_at_once_is_exposed():
    text = """HloModule m, is_scheduled=true

ENTRY %main (a: f32[8]) -> (f32[16], f32[16]) {
  %a = f32[8]{0} parameter(0)
  %gather.1 = f32[16]{0} all-gather(%a), replica_groups={{0,1}}, dimensions={0}
  %start.1 = (f32[8]{0}, f32[16]{0}) all-gather-start(%a), replica_groups={{0,1}}, dimensions={0}
  %done.1 = f32[16]{0} all-gather-done(%start.1)
  ROOT %tuple.1 = (f32[16]{0}, f32[16]{0}) tuple(%gather.1, %done.1)
}
"""
    alone, meanwhile = read_work(text).collectives
    assert alone.exposed and not meanwhile.exposed
    assert alone.group == meanwhile.group == (0, 1)
