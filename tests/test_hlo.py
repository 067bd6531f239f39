"""What is read from the text of a program, against what is known of the program."""

import functools

import common
import jax
import jax.numpy as jnp
import pytest

from gemma_lora import hlo

# A loop of 3 that takes a slice of w and gathers it, in pieces that two fusions share.
LOOP = """HloModule loop

%slice (p0: bf16[4,8,16], p1: s32[]) -> bf16[1,8,16] {
  %p0 = bf16[4,8,16]{2,1,0} parameter(0)
  %p1 = s32[]{:S(2)} parameter(1)
  ROOT %part = bf16[1,8,16]{2,1,0} dynamic-slice(%p0, %p1, %p1, %p1), dynamic_slice_sizes={1,8,16}
}

%nested (p0.1: bf16[4,8,16], p1.1: s32[]) -> f32[1,8,16] {
  %p0.1 = bf16[4,8,16]{2,1,0} parameter(0)
  %p1.1 = s32[]{:S(2)} parameter(1)
  %inner = bf16[1,8,16]{2,1,0} fusion(%p0.1, %p1.1), kind=kLoop, calls=%slice
  ROOT %wide = f32[1,8,16]{2,1,0} convert(%inner)
}

%start (s: bf16[1,8,16]) -> (bf16[1,8,16], bf16[4,8,16]) {
  %s = bf16[1,8,16]{2,1,0} parameter(0)
  %all-gather.1 = bf16[4,8,16]{2,1,0} all-gather(%s), channel_id=7, replica_groups={{0,1,2,3}}
  ROOT %both = (bf16[1,8,16]{2,1,0}, bf16[4,8,16]{2,1,0}) tuple(%s, %all-gather.1)
}

%done (d: bf16[1,8,16]) -> bf16[4,8,16] {
  %d = bf16[1,8,16]{2,1,0} parameter(0)
  ROOT %all-gather.2 = bf16[4,8,16]{2,1,0:S(1)} all-gather(%d), channel_id=7, replica_groups=[1,4]
}

%body (x: (s32[], bf16[4,8,16])) -> (s32[], bf16[4,8,16]) {
  %x = (s32[]{:S(2)}, bf16[4,8,16]{2,1,0}) parameter(0)
  %i = s32[]{:S(2)} get-tuple-element(%x), index=0
  %w = bf16[4,8,16]{2,1,0} get-tuple-element(%x), index=1
  %f = f32[1,8,16]{2,1,0} fusion(%w, %i), kind=kLoop, calls=%nested
  %h = bf16[1,8,16]{2,1,0:S(1)} convert(%f)
  %g = (bf16[1,8,16]{2,1,0}, bf16[4,8,16]{2,1,0}) fusion(%h), kind=kCustom, calls=%start
  %k = bf16[4,8,16]{2,1,0} fusion(%h), kind=kCustom, calls=%done
  %one = s32[]{:S(2)} constant(1)
  %next = s32[]{:S(2)} add(%i, %one)
  ROOT %out = (s32[]{:S(2)}, bf16[4,8,16]{2,1,0}) tuple(%next, %w)
}

%less (y: (s32[], bf16[4,8,16])) -> pred[] {
  %y = (s32[], bf16[4,8,16]{2,1,0}) parameter(0)
  %j = s32[] get-tuple-element(%y), index=0
  %limit = s32[] constant(3)
  ROOT %lt = pred[] compare(%j, %limit), direction=LT
}

ENTRY %main (a: (s32[], bf16[4,8,16])) -> (s32[], bf16[4,8,16]) {
  %a = (s32[], bf16[4,8,16]{2,1,0}) parameter(0)
  ROOT %loop = (s32[], bf16[4,8,16]{2,1,0}) while(%a), condition=%less, body=%body
}
"""


def test_a_loop_of_slices_that_are_gathered():
    program = hlo.parse(LOOP)
    assert program.unknown == 0
    (one,) = hlo.collectives(program)
    assert (one.kind, one.ways, one.times) == ("all-gather", 4, 3)
    assert one.bytes == 3 * 3 / 4 * 4 * 8 * 16 * 2  # three times three quarters of [4,8,16]
    # A slice in bfloat16 is read, and written in float32; that is read again; what is gathered
    # is written, once, and the rest is on the chip.
    part = 8 * 16
    assert hlo.traffic(program) == 3 * (2 * part + 4 * part + 4 * part + 4 * 2 * part)


def test_a_loop_that_starts_later_runs_less_often():
    """As a compiler leaves it that took the first turn out of the loop."""
    start = """  %from = s32[] constant(1)
  %at = s32[] copy(%from)
  %w.0 = bf16[4,8,16]{2,1,0} get-tuple-element(%a), index=1
  %t = (s32[], bf16[4,8,16]{2,1,0}) tuple(%at, %w.0)
  ROOT %loop"""
    text = LOOP.replace("  ROOT %loop", start).replace("while(%a)", "while(%t)")
    assert [c.times for c in hlo.collectives(hlo.parse(text))] == [2]


@pytest.mark.parametrize(("sizes", "rows"), [((8, 32), 20), ((8, 16, 32), 32)])
def test_of_two_branches_each_runs_half_the_times_of_more_the_last(sizes, rows):
    """As a layer is local or global; and as the head takes ever more tokens."""

    def branch(n, x):
        return jnp.pad(x[:n] @ jnp.cos(x), ((0, 32 - n), (0, 0)))

    branches = [functools.partial(branch, n) for n in sizes]
    run = jax.jit(lambda i, x: jax.lax.switch(i, branches, x))
    program = hlo.parse(run.lower(1, jnp.ones((32, 32))).compile().as_text())
    assert sum(hlo.products(program, {}).values()) == 2 * rows * 32 * 32


def test_a_loop_of_unknown_length_counts_once_and_is_told():
    program = hlo.parse(LOOP.replace("s32[] constant(3)", "s32[] get-tuple-element(%y), index=0"))
    assert program.unknown == 1
    assert [c.times for c in hlo.collectives(program)] == [1]


@pytest.mark.parametrize(
    ("kind", "ways", "part"),
    [
        ("all-gather", 4, 3 / 4),
        ("all-reduce", 4, 2 * 3 / 4),
        ("reduce-scatter", 4, 3),
        ("all-to-all", 8, 7 / 8),
        ("collective-permute", 2, 1),
    ],
)
def test_bytes_on_a_ring(kind, ways, part):
    x = hlo.Array("f32", (16, 2))
    assert hlo.Collective(kind, (x, x), ways, 5, "").bytes == pytest.approx(5 * 2 * 128 * part)


COMPILED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
from gemma_lora import hlo
from gemma_lora.sharding import make_mesh

mesh = make_mesh({"data": 1, "fsdp": 4, "tensor": 2})

def local(x, w):
    def step(x, w):
        whole = jax.lax.all_gather(w, "fsdp", axis=0, tiled=True)  # [64,64]
        y = jnp.einsum("BD,DF->BF", x, whole)
        return jax.lax.psum(y, "tensor"), None
    x, _ = jax.lax.scan(step, x, w)
    return jax.lax.ppermute(x, "fsdp", [(i, (i + 1) % 4) for i in range(4)])

f = jax.shard_map(local, mesh=mesh, in_specs=(P("fsdp"), P(None, "fsdp")), out_specs=P("fsdp"),
                  check_vma=False)
text = jax.jit(f).lower(jnp.ones((32, 64)), jnp.ones((5, 64, 64))).compile().as_text()
program = hlo.parse(text)
assert program.unknown == 0
flops = hlo.products(program, {})
assert list(flops.values()) == [5 * 2 * 8 * 64 * 64], flops
sent = {c.kind: (c.ways, c.times, c.bytes) for c in hlo.collectives(program)}
assert sent == {
    "all-gather": (4, 5, 5 * 3 / 4 * 64 * 64 * 4),
    "all-reduce": (2, 5, 5 * 2 / 2 * 8 * 64 * 4),
    "collective-permute": (2, 1, 8 * 64 * 4),
}, sent
print("equal")
"""


def test_products_and_collectives_of_a_program_compiled_for_cpus():
    common.on_eight_devices(COMPILED)


@pytest.mark.parametrize(
    "dtype, shape, layout, held",
    (
        ("bf16", (24, 14, 64, 224), "{3,2,1,0:T(8,128)(2,1)}", 24 * 14 * 64 * 256 * 2),
        ("bf16", (24, 224, 4864), "{2,1,0:T(8,128)(2,1)}", 24 * 224 * 4864 * 2),
        ("f32", (24, 225, 8), "{1,2,0:T(8,128)}", 24 * 256 * 8 * 4),
        ("f32", (224,), "{0:T(256)S(1)}", 1024),
        ("f32", (3, 5), "{1,0}", 60),
        ("s32", (3, 5), "", 60),
        ("s32", (), "{:T(128)}", 512),
        ("s32", (), "{}", 4),
    ),
)
def test_bytes_held_in_tiles(dtype, shape, layout, held):
    """The layout names the innermost dimension first, its tile last."""
    assert hlo.Array(dtype, shape, layout).held == held
