"""Attention: every implementation against the reference, and what compiles for a TPU."""

import functools
from types import SimpleNamespace

import common
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding

from gemma_lora import ahead
from gemma_lora import attention as module
from gemma_lora import model as model_module
from gemma_lora.arch import get_arch
from gemma_lora.attention import (
    BLOCK,
    attention,
    attention_mask,
    block,
    choose,
    chosen,
    reference,
    splash,
)
from gemma_lora.errors import UserError
from gemma_lora.lora import LoRAConfig
from gemma_lora.loss import Sweep
from gemma_lora.sharding import make_mesh, spec
from gemma_lora.step import forward

pytestmark = pytest.mark.usefixtures("quick")


def inputs(length, heads, kv_heads, head_dim, rows=2):
    """q, k, v, a cotangent, and segments: packed rows that end in padding."""
    rng = np.random.default_rng(0)
    shapes = [(rows, length, n, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
    q, k, v, dz = (jnp.asarray(rng.normal(0, 1, s), jnp.float32) for s in shapes)
    segments = np.zeros((rows, length), np.int32)
    for i, row in enumerate(segments):
        first, last = (length // 2, length // 2 + 1) if i % 2 else (length // 3, length - 5)
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


def test_what_rows_of_each_length_take_is_said():
    arch = common.tiny_arch("gemma")
    said = chosen("auto", arch, jnp.float32, (256, 64, 128, 256), None)
    assert said == "reference (rows of 64, 128); block (rows of 256)"
    assert chosen("block", arch, jnp.float32, (64, 256), None) == "block"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("how", ["block", "splash"])
def test_equals_the_reference(how, case, monkeypatch):
    """Outputs and gradients, packed rows, padding; the TPU's kernel interpreted on the CPU."""
    settings = dict(CASES[case])
    back, softcap = settings.pop("back"), settings.pop("softcap")
    monkeypatch.setattr(module, "BLOCK", 64)
    attend = block if how == "block" else functools.partial(splash, mesh=None, interpret=True)
    same(attend, *inputs(**settings), back, softcap)


def test_cudnn_is_asked_for_the_reference(monkeypatch):
    """JAX's own form of the call that cuDNN answers on a GPU."""
    asked = jax.nn.dot_product_attention

    def plain(*args, implementation, **kwargs):
        assert implementation == "cudnn"
        return asked(*args, implementation="xla", **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", plain)

    def attend(q, k, v, segments, back, softcap, dtype):
        return module.cudnn(q, k, v, attention_mask(segments, back), dtype)

    same(attend, *inputs(64, 4, 2, 16), 30, 0.0)


@pytest.mark.parametrize("how", ["reference", "block"])
@pytest.mark.parametrize(("window", "back"), [(63, 63), (64, 64), (0, 64)])
def test_a_window_as_long_as_the_row_or_one_less(how, window, back):
    q, k, v, _, _ = inputs(64, 2, 2, 16)
    segments = jnp.ones((2, 64), jnp.int32)
    want = reference(q, k, v, attention_mask(segments, back), 0.0, jnp.float32)
    settings = dict(window=window, softcap=0.0, dtype=jnp.float32, mesh=None)
    got = attention(how, q, k, v, segments, jnp.array(True), **settings)
    assert np.max(np.abs(got - want)) <= 2e-5 * np.max(np.abs(want))


@pytest.mark.parametrize(("name", "how"), [("gemma2", "block"), ("gemma3", "splash")])
def test_a_model_of_local_and_global_layers(name, how, monkeypatch):
    """Loss and gradients in the scan over layers, where a layer's kind is a traced value."""
    monkeypatch.setattr(module, "BLOCK", 16)
    monkeypatch.setattr(module, "splash", functools.partial(splash, interpret=True))
    tokens = tiny.tokens()
    arch = common.tiny_arch(name)
    assert 0 < arch.window < tokens.shape[1] and len(set(arch.is_local)) == 2
    batch = common.batch_of(tokens, tiny.loss_mask(tokens.shape))
    found = []
    for one in ("reference", how):
        monkeypatch.setattr(model_module, "choose", lambda *_, one=one: (one, ""))
        model, params = common.tiny_model(name, LoRAConfig(4, 8.0, 0.0), remat="matmuls")

        def loss(lora, model=model, params=params):
            stats = forward(model, Sweep(32), params, lora, batch, None)
            return jnp.sum(stats.nll * batch["loss_mask"])

        found.append(jax.jit(jax.value_and_grad(loss))(common.adapter(name)))
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        assert np.max(np.abs(a - b)) <= 2e-5 * np.max(np.abs(b))


SHARDED = """
import functools, jax, test_attention as t
from gemma_lora.attention import splash
from gemma_lora.sharding import make_mesh

mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, jax.devices())
attend = functools.partial(splash, mesh=mesh, interpret=True)
for kv_heads in (1, 2, 3):
    args = t.inputs(130, 6, kv_heads, 64, rows=4)
    t.same(attend, *args, 70, 5.0)
print("equal")
"""


def test_splash_on_a_mesh_equals_the_reference():
    """Rows over two axes, heads over the third: one key head, two, and three that do not divide."""
    common.on_eight_devices(SHARDED)


@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2", "v5p:2x2x1"])
@pytest.mark.parametrize("name", ["gemma_2b", "gemma2_2b", "qwen2_0p5b"])
def test_splash_compiles_for_a_tpu(name, topology):
    """Forward and backward, local and global layers, split over rows and heads; nothing [T,S]."""
    common.needs("libtpu")
    mesh = make_mesh({"data": 1, "fsdp": 2, "tensor": 2}, ahead.devices_of(topology))
    arch, length = get_arch(name), 600
    assert choose("auto", arch, jnp.bfloat16, length, mesh) == ("splash", "")

    def loss(q, k, v, segments, is_local):
        out = attention(
            "splash", q, k, v, segments, is_local, window=200 if arch.window else 0,
            softcap=arch.attn_softcap, dtype=jnp.bfloat16, mesh=mesh,
        )  # fmt: skip
        return jnp.sum(out**2)

    def like(letters, *shape, dtype=jnp.float32):
        sharding = NamedSharding(mesh, spec(tuple(letters), shape, mesh))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    q = like("BTNH", 4, length, arch.heads, arch.head_dim)
    k = like("BTKH", 4, length, arch.kv_heads, arch.head_dim)
    segments = like("BT", 4, length, dtype=jnp.int32)
    is_local = like("", dtype=jnp.bool_)
    step = jax.jit(jax.grad(loss, (0, 1, 2)))
    with common.all_passes():
        text = step.lower(q, k, k, segments, is_local).compile().as_text()
    assert text.count("tpu_custom_call") >= 3
    assert "640,640]" not in text and "600,600]" not in text


def devices_of(platform, tensor=1, **kwargs):
    device = SimpleNamespace(platform=platform, **kwargs)
    return SimpleNamespace(devices=np.array([device]), shape={"tensor": tensor})


def test_the_implementation_is_chosen_by_platform():
    gemma, capped = get_arch("gemma_2b"), get_arch("gemma2_2b")
    tpu, cpu = devices_of("tpu"), devices_of("cpu")
    hopper, ampere, blackwell = (
        devices_of("gpu", compute_capability=c) for c in ("9.0", "8.0", "12.0")
    )
    two = devices_of("gpu", tensor=2, compute_capability="9.0")
    half, single = jnp.bfloat16, jnp.float32
    assert choose("auto", gemma, half, 256, tpu) == ("splash", "")
    assert choose("auto", gemma, half, 256, hopper) == ("cudnn", "")
    assert choose("auto", gemma, half, 128, cpu) == ("reference", "")
    assert choose("auto", gemma, half, 256, cpu) == ("block", "")
    for arch, dtype, length, where, why in (
        (gemma, single, 256, tpu, "not splash: .* float32"),
        (gemma, single, 256, hopper, "not cudnn: .* float32"),
        (capped, half, 256, hopper, "not cudnn: .* soft-cap"),
        (gemma, half, 256, ampere, "not cudnn: .* at most 128 .* 256"),
        (gemma, half, 256, blackwell, "not cudnn: .* at most 128 .* 256"),
        (gemma, half, 127, hopper, "not cudnn: .* even"),
        (gemma, half, 256, two, "not cudnn: .* tensor=2 does not divide the 1 key heads"),
    ):
        how, said = choose("auto", arch, dtype, length, where)
        assert how == ("block" if length > BLOCK else "reference")
        with pytest.raises(UserError, match=why):
            raise UserError(said)
    for name, why in (("splsh", "splash"), ("splash", "TPU kernel.*cpu"), ("cudnn", "GPU.*cpu")):
        with pytest.raises(UserError, match=why):
            choose(name, gemma, half, 256, cpu)
