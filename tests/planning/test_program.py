"""Compiled programs read as text: known small programs, and the compiler's own counts."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dinojax import sharding
from dinojax.planning import hlo, program, work

LAYERS, WIDTH, ROWS = 5, 32, 64


@pytest.fixture(scope="module")
def scanned() -> tuple[program.Program, float]:
    """A scan of LAYERS products with weights split over eight devices, forward and backward."""
    mesh = sharding.make_mesh(fsdp=8)
    weights = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))

    def loss(w, x):
        def layer(x, w):
            x = jax.lax.with_sharding_constraint(x, rows)
            w = jax.lax.with_sharding_constraint(w, NamedSharding(mesh, PartitionSpec()))
            return jnp.tanh(x @ w), None

        return jax.lax.scan(layer, x, w)[0].sum()

    w = jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.float32, sharding=weights)
    x = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32, sharding=rows)
    compiled = jax.jit(loss).lower(w, x).compile()
    return program.read(compiled.as_text()), compiled.cost_analysis()["flops"]


def test_flops_of_a_scan(scanned):
    found, counted = scanned
    once = 2 * ROWS / 8 * WIDTH**2
    assert found.flops_loops_once == once
    assert found.flops == LAYERS * once
    assert found.unknown_loops == 0
    # The compiler counts the loop's body once, and element-wise work as well.
    assert once < counted < 1.3 * once


def test_collectives_of_a_scan(scanned):
    (gather, total) = sorted(scanned[0].collectives, key=lambda c: c.kind)
    assert (gather.kind, gather.runs, len(gather.members)) == ("all-gather", LAYERS, 8)
    assert gather.operand_bytes == 4 * WIDTH**2 // 8
    assert gather.received(8) == LAYERS * 4 * WIDTH**2 * 7 / 8
    assert (total.kind, total.runs, total.operand_bytes) == ("all-reduce", 1, 4)
    assert total.received(8) == 2 * 4 * 7 / 8


@pytest.mark.parametrize(
    ("kind", "received"),
    [
        ("all-gather", 3 * 300.0),
        ("reduce-scatter", 3 / 4 * 300.0),
        ("all-reduce", 2 * 3 / 4 * 300.0),
        ("all-to-all", 3 / 4 * 300.0),
        ("collective-permute", 300.0),
    ],
)
def test_bytes_into_a_device(kind, received):
    assert program.Collective(kind, 3, 100, (0, 2, 4, 6)).received(8) == pytest.approx(received)
    if kind != "collective-permute":  # without a group, everyone
        everyone = program.Collective(kind, 3, 100, ()).received(4)
        assert everyone == pytest.approx(received)


@pytest.mark.parametrize(
    ("attributes", "found"),
    [
        ("replica_groups={{0,2},{1,3}}, x=1", (0, 2)),
        ("replica_groups=[2,4]<=[8], x=1", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x=1", (0, 4)),
        ("replica_groups=mesh['axis_0'=16] {'axis_0'}, x=1", tuple(range(16))),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}, x=1", (0, 1)),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, x=1", (0, 2, 4, 6)),
        ("replica_groups=mesh['axis_0'=8] {'axis_0':(2)2}, x=1", (0, 2)),
        ("channel_id=2, source_target_pairs={{3,1},{1,3}}", (3, 1)),
        ("replica_groups={}, x=1", ()),
        ("channel_id=2", ()),
    ],
)
def test_members(attributes, found):
    assert program.members(attributes) == found


# As the TPU compiler writes: loops without their length, tiles and memory spaces in layouts, an
# operand in on-chip memory, one gather spread over two fusions, attributes over several lines.
TPU = """HloModule jit_f, is_scheduled=true

%pieces (p0: bf16[8,64], p1: s32[]) -> bf16[64,64] {
  %p0 = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  ROOT %all-gather.1 = bf16[64,64]{1,0:T(8,128)(2,1)} all-gather(%p0), channel_id=7, replica_groups=mesh['axis_0'=8] {'axis_0'}, dimensions={0}
}

%pieces.2 (q0: bf16[8,64]) -> bf16[64,64] {
  %q0 = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.2 = bf16[64,64]{1,0:T(8,128)(2,1)} all-gather(%q0), channel_id=7, replica_groups=mesh['axis_0'=8] {'axis_0'}, dimensions={0}
}

%slice_of (s0: f32[5,100], s1: s32[]) -> f32[1,100] {
  %s0 = f32[5,100]{1,0:T(8,128)} parameter(0)
  %s1 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %slice = f32[1,100]{1,0:T(8,128)} dynamic-slice(%s0, %s1, %zero), dynamic_slice_sizes={1,100}
}

%scatter (r0: f32[80]) -> f32[10] {
  %r0 = f32[80]{0:T(128)} parameter(0)
  %sum = f32[80]{0:T(128)} all-reduce(%r0), channel_id=9, replica_groups=mesh['axis_0'=8] {'axis_0'}, to_apply=%add
  %start = s32[]{:T(128)} constant(0)
  ROOT %part = f32[10]{0:T(128)} dynamic-slice(%sum, %start), dynamic_slice_sizes={10}
}

%cond (c: (s32[], f32[5,100])) -> pred[] {
  %bound = s32[]{:T(128)} constant(7)
  %c = (s32[]{:T(128)}, f32[5,100]{1,0:T(8,128)}) parameter(0)
  %count = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %less = pred[]{:T(512)} compare(%count, %bound), direction=LT
}

%body (b: (s32[], f32[5,100])) -> (s32[], f32[5,100]) {
  %b = (s32[]{:T(128)}, f32[5,100]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%b), index=0
  %table = f32[5,100]{1,0:T(8,128)} get-tuple-element(%b), index=1
  %step = s32[]{:T(128)} constant(2)
  %row = f32[1,100]{1,0:T(8,128)S(1)} fusion(%table, %i), kind=kLoop, calls=%slice_of
  %next = s32[]{:T(128)S(6)} add(%i, %step)
  ROOT %both = (s32[]{:T(128)}, f32[5,100]{1,0:T(8,128)}) tuple(%next, %table)
}

ENTRY %main (x: bf16[8,64], y: f32[80], z: f32[5,100]) -> f32[10] {
  %x = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(0)
  %y = f32[80]{0:T(128)} parameter(1)
  %z = f32[5,100]{1,0:T(8,128)} parameter(2)
  %one = s32[]{:T(128)} constant(1)
  %started = bf16[64,64]{1,0:T(8,128)(2,1)S(1)} fusion(%x, %one), kind=kCustom, calls=%pieces
  %ended = bf16[64,64]{1,0:T(8,128)(2,1)S(1)} fusion(%x), kind=kCustom, calls=%pieces.2
  %given = (s32[]{:T(128)}, f32[5,100]{1,0:T(8,128)}) tuple(%one, %z)
  %loop = (s32[]{:T(128)}, f32[5,100]{1,0:T(8,128)}) while(%given), condition=%cond, body=%body
  %q = bf16[2,3,8,4]{3,2,1,0:T(8,128)(2,1)} iota(), iota_dimension=0
  %splash_mha_fwd.1 = (f32[128,128]{1,0:T(8,128)}, bf16[2,3,8,4]{3,2,1,0:T(8,128)(2,1)}) custom-call(%x, %q), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"block":"128"
}}, metadata={op_name="splash"}
  ROOT %scattered = f32[10]{0:T(128)} fusion(%y), kind=kCustom, calls=%scatter
}
"""  # noqa: E501


def test_as_tpu_programs_are_written():
    found = program.read(TPU)
    gather, scatter = sorted(found.collectives, key=lambda c: c.kind)
    assert (gather.kind, gather.runs, gather.operand_bytes) == ("all-gather", 1, 8 * 64 * 2)
    assert (scatter.kind, scatter.runs, scatter.operand_bytes) == ("reduce-scatter", 1, 320)
    parsed, entry = hlo.parse(TPU)
    assert entry == "main"
    # From 1 to below 7 by 2: three times, each reading one row into on-chip memory.
    runs, unknown, fused = hlo.visits(parsed, entry)
    assert (runs["body"], runs["slice_of"], unknown) == (3, 3, 0)
    assert "slice_of" in fused and "body" not in fused
    row = parsed["body"]["row"]
    assert work.moved_bytes(row, parsed["body"], parsed) == 400 + 4  # the row and its number
    # A product in a kernel that is not known is named, the others of the compiler's own are not.
    lines = TPU.replace("splash_mha_fwd.1", "unknown.1").replace(
        "  %one = s32", '  %no = () custom-call(), custom_call_target="ConcatBitcast"\n  %one = s32'
    )
    assert program.read(lines).kernels == (("tpu_custom_call", 1),)
    # Attention's kernel, opaque to the compiler: two products of six heads, 8 tokens of 4.
    assert found.flops == 2 * 2 * 6 * 8 * 8 * 4 and found.kernels == ()


def test_not_a_program():
    with pytest.raises(ValueError, match="no ENTRY"):
        program.read("hello")


@pytest.mark.parametrize(
    "options",
    [
        {"padding": "SAME"},
        {"padding": "VALID", "window_strides": (2, 3)},
        {"padding": [(2, 1), (0, 3)], "lhs_dilation": (2, 1)},
        {"padding": "SAME", "rhs_dilation": (1, 2)},
        {"padding": "SAME", "feature_group_count": 4},
        {"padding": "SAME", "batch_group_count": 2},
    ],
)
def test_convolutions_against_the_compilers_count(options):
    groups = options.get("feature_group_count", 1)
    x = jax.ShapeDtypeStruct((4, 12, 10, 8), jnp.float32)
    kernel = jax.ShapeDtypeStruct((3, 5, 8 // groups, 16), jnp.float32)
    options = {"window_strides": (1, 1), **options}

    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options
        )

    lowered = jax.jit(convolve).lower(x, kernel)
    found = program.read(lowered.as_text(dialect="hlo"))
    assert found.flops == lowered.cost_analysis()["flops"]
