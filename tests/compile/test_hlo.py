"""HLO text: bytes, loops, collectives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from gecko_jax.compile import hlo
from gecko_jax.parallel import sharding

TEXT = """\
HloModule example

%fused (param_0: f32[8,4], param_1: s32[]) -> f32[1,4] {
  %param_0 = f32[8,4]{1,0} parameter(0)
  %param_1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %row = f32[1,4]{1,0} dynamic-slice(%param_0, %param_1, %zero)
}

%condition (state.1: (s32[], f32[8,4])) -> pred[] {
  %state.1 = (s32[], f32[8,4]{1,0:T(8,128)(2,1)}) parameter(0)
  %index.1 = s32[] get-tuple-element(%state.1), index=0
  %limit = s32[] constant(6)
  ROOT %less = pred[] compare(%index.1, %limit), direction=LT
}

%body (state: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %state = (s32[], f32[8,4]{1,0:T(8,128)(2,1)}) parameter(0)
  %index = s32[] get-tuple-element(%state), index=0
  %rows = f32[8,4]{1,0} get-tuple-element(%state), index=1
  %taken = f32[1,4]{1,0} fusion(%rows, %index), kind=kLoop, calls=%fused
  %sum = f32[8,4]{1,0:S(1)} all-reduce(%rows), to_apply=%add, metadata={op_name="here"}
  ROOT %next = (s32[], f32[8,4]{1,0}) tuple(%index, %sum)
}

ENTRY %main (rows.1: f32[8,4]) -> f32[8,4] {
  %rows.1 = f32[8,4]{1,0} parameter(0)
  %start = s32[] constant(0)
  %all = f32[16,4]{1,0} all-gather(%rows.1), dimensions={0}, metadata={op_name="out"}
  %first = (s32[], f32[8,4]{1,0}) tuple(%start, %rows.1)
  %loop = (s32[], f32[8,4]{1,0}) while(%first), condition=%condition, body=%body, AT
  ROOT %result = f32[8,4]{1,0} get-tuple-element(%loop), index=1
}
""".replace("AT", 'metadata={op_name="a/microbatches/while"}')


def test_collectives_are_multiplied_by_trip_counts():
    assert hlo.Program(TEXT).collectives() == [
        hlo.Collective("all-gather", 256, 1, ()),
        hlo.Collective("all-reduce", 128, 6, ("a/microbatches/while",)),
    ]


def test_a_fusion_that_slices_an_array_reads_only_the_slice():
    # Outside the loop: 128 bytes read, 256 written. Inside, six times: a row of 16
    # bytes read and written, its index, and 128 bytes read for a result in another
    # memory.
    assert hlo.Program(TEXT).memory_bytes() == 384 + 6 * (16 + 16 + 4 + 128)


NESTED = """\
%slice (stack: f32[8,4], which: s32[]) -> f32[4] {
  %stack = f32[8,4]{1,0} parameter(0)
  %which = s32[] parameter(1)
  %nought = s32[] constant(0)
  %one = f32[1,4]{1,0} dynamic-slice(%stack, %which, %nought)
  ROOT %flat = f32[4]{0} bitcast(%one)
}

%same (whole: f32[8,4]) -> f32[32] {
  %whole = f32[8,4]{1,0} parameter(0)
  ROOT %view = f32[32]{0} bitcast(%whole)
}

%fused (param_0: f32[8,4], param_1: s32[]) -> f32[1,4] {
  %param_0 = f32[8,4]{1,0} parameter(0)
  %param_1 = s32[] parameter(1)
  %layer = f32[4]{0} fusion(USED), kind=kLoop, calls=CALLED
  ROOT %row = f32[1,4]{1,0} negate(%layer)
}
"""


@pytest.mark.parametrize(
    ("used", "called", "num_bytes"),
    [("%param_0, %param_1", "%slice", 16 + 4), ("%param_0", "%same", 128)],
)
def test_a_nested_fusion_that_slices_reads_only_the_slice(used, called, num_bytes):
    # XLA compiles a product with one layer's slice of a stacked matrix like this.
    before = TEXT[TEXT.index("%fused (") : TEXT.index("%condition (")]
    nested = NESTED.replace("USED", used).replace("CALLED", called)
    text = TEXT.replace(before, nested + "\n")
    # The loop also writes its row of 16 bytes and reads 128 bytes for its sum.
    assert hlo.Program(text).memory_bytes() == 384 + 6 * (num_bytes + 16 + 128)


@pytest.mark.parametrize(
    "names",
    [
        "branch_computations={%one, %two}",
        "true_computation=%one, false_computation=%two",
    ],
)
def test_every_branch_of_a_conditional_counts(names):
    text = f"""\
%one (x: f32[8]) -> f32[8] {{
  %x = f32[8]{{0}} parameter(0)
  ROOT %y = f32[8]{{0}} negate(%x)
}}

%two (z: f32[8]) -> f32[8] {{
  %z = f32[8]{{0}} parameter(0)
  ROOT %sum = f32[8]{{0}} all-reduce(%z), to_apply=%add
}}

ENTRY %main (p: s32[], a: f32[8]) -> f32[8] {{
  %p = s32[] parameter(0)
  %a = f32[8]{{0}} parameter(1)
  ROOT %c = f32[8]{{0}} conditional(%p, %a, %a), {names}
}}
"""
    program = hlo.Program(text)
    assert program.memory_bytes() == 2 * 64
    assert program.collectives() == [hlo.Collective("all-reduce", 32, 1, ())]


def test_an_asynchronous_copy_or_slice_counts_once():
    # The slice reads 16 bytes into another memory; the copy reads and writes 128.
    ahead = """\
  %some = ((f32[8,4]{1,0}), f32[1,4]{1,0:S(1)}, u32[]{:S(2)}) slice-start(%rows.1), x
  %part = f32[1,4]{1,0:S(1)} slice-done(%some)
  %both = (f32[8,4]{1,0}, f32[8,4]{0,1}, u32[]{:S(2)}) copy-start(%rows.1)
  %copied = f32[8,4]{1,0} copy-done(%both)
"""
    line = next(line for line in TEXT.splitlines() if "%start =" in line)
    more = hlo.Program(TEXT.replace(line, line + "\n" + ahead)).memory_bytes()
    assert more == hlo.Program(TEXT).memory_bytes() + 16 + 2 * 128


def test_the_pieces_of_a_collective_count_once():
    pieces = TEXT.replace("dimensions={0},", 'dimensions={0}, x={chain_id="3"},')
    line = next(line for line in pieces.splitlines() if "%all =" in line)
    twice = pieces.replace(line, line + "\n" + line.replace("%all =", "%all.2 ="))
    found = [(one.kind, one.times) for one in hlo.Program(twice).collectives()]
    assert found == [("all-gather", 1), ("all-reduce", 6)]
    # A collective with all of its pieces in a loop runs as often as the loop.
    inside = twice.replace("to_apply=%add,", 'to_apply=%add, x={chain_id="4"},')
    assert [one.times for one in hlo.Program(inside).collectives()] == [1, 6]


def test_the_text_of_the_installed_xla_is_read():
    mesh = sharding.build_mesh()
    spec = PartitionSpec("data")

    def sum_rows(rows):
        def add(total, row):
            return total + jax.lax.psum(row, "data"), None

        start = jax.lax.pcast(jnp.zeros_like(rows[0]), (), to="varying")
        return jax.lax.scan(add, start, rows)[0]

    compute = jax.shard_map(sum_rows, mesh=mesh, in_specs=spec, out_specs=spec)
    compiled = jax.jit(compute).lower(np.ones((40, 4), np.float32)).compile()
    (one,) = hlo.Program(compiled.as_text()).collectives()
    assert (one.kind, one.num_bytes, one.times) == ("all-reduce", 16, 5)


@pytest.mark.parametrize(
    ("shape", "num_bytes"),
    [("f32[2,3]{1,0}", 24), ("(bf16[4], s32[])", 12), ("pred[]", 1), ("token[]", 0)],
)
def test_bytes_of_a_shape(shape, num_bytes):
    assert hlo.shape_bytes(shape) == num_bytes
