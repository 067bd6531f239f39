"""Attention: every implementation against the reference, and what compiles for a TPU."""

import dataclasses
import functools
import importlib.util
import os

import common
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_lora import attention as module
from gemma_lora.arch import ARCHS
from gemma_lora.attention import attention_mask, block, choose, reference, splash
from gemma_lora.errors import UserError


def inputs(length, heads, kv_heads, head_dim, rows=2):
    """q, k, v, a cotangent, and segments: packed rows that end in padding."""
    rng = np.random.default_rng(0)
    shapes = [(rows, length, n, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
    q, k, v, dz = (jnp.asarray(rng.normal(0, 1, s), jnp.float32) for s in shapes)
    ends = [[length // 3, length - 5], [length // 2, length // 2 + 1]]
    segments = np.zeros((rows, length), np.int32)
    for row, (first, last) in zip(segments, ends, strict=True):
        row[:first], row[first:last] = 1, 2
    return q * head_dim**-0.5, k, v, dz, jnp.asarray(segments)


def out_and_grads(attend, q, k, v, dz):
    """The attention, and the gradients of its product with dz."""
    out, pull = jax.vjp(attend, q, k, v)
    return (out, *pull(dz))


def same(attend, q, k, v, dz, segments, back, softcap):
    want = functools.partial(
        reference, mask=attention_mask(segments, back), softcap=softcap, dtype=jnp.float32
    )
    got = functools.partial(
        attend, segments=segments, back=back, softcap=softcap, dtype=jnp.float32
    )
    pairs = zip(
        jax.jit(functools.partial(out_and_grads, got))(q, k, v, dz),
        jax.jit(functools.partial(out_and_grads, want))(q, k, v, dz),
        ("out", "dq", "dk", "dv"),
        strict=True,
    )
    for a, b, name in pairs:
        assert np.max(np.abs(a - b)) <= 2e-5 * np.max(np.abs(b)), name


CASES = {
    "causal": dict(length=256, heads=2, kv_heads=2, head_dim=128, back=256, softcap=0.0),
    "window": dict(length=256, heads=2, kv_heads=2, head_dim=128, back=70, softcap=0.0),
    "soft-cap, grouped heads": dict(
        length=256, heads=4, kv_heads=2, head_dim=128, back=100, softcap=3.0
    ),
    "one key head": dict(length=200, heads=4, kv_heads=1, head_dim=256, back=200, softcap=0.0),
    "head dim 64, odd length": dict(
        length=301, heads=4, kv_heads=2, head_dim=64, back=128, softcap=0.0
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("how", ["block", "splash"])
def test_equals_the_reference(how, case, monkeypatch):
    """Outputs and gradients, packed rows, padding; the TPU's kernel interpreted on the CPU."""
    settings = dict(CASES[case])
    back, softcap = settings.pop("back"), settings.pop("softcap")
    monkeypatch.setattr(module, "BLOCK", 64)
    attend = block if how == "block" else functools.partial(splash, mesh=None, interpret=True)
    same(attend, *inputs(**settings), back, softcap)
