"""The maths: the einsum seam, RMSNorm, RoPE, the projections round attention, MLP.

Axis letters: B batch, T query position, S key position, D embed, F hidden, N heads, K kv heads,
G heads per kv head, H head dim, V vocab, L layer, R rank. Einsum letters are the axis names.

Dtype policy, in one place: matrix products take operands in `dtype` (bfloat16 or float32) and
accumulate and return float32; everything element-wise (norms, RoPE, softmax, GELU) is float32; what
is kept between layers is `dtype`.
"""

import functools
import math
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from gemma_lora.arch import Arch
from gemma_lora.sharding import gathered


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3, 4))
def dot(eqn: str, x: jax.Array, y: jax.Array, dtype: jnp.dtype, frozen: bool) -> jax.Array:
    """einsum(eqn, x, y) with operands in `dtype`, accumulated and returned in float32.

    The backward casts the cotangent to `dtype` as well (the default transpose would run a float32
    product). `frozen` says that y takes no gradient: its product is then never computed.
    """
    # A float32 product must be a float32 product on TPU as well (its default is bfloat16).
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    return jnp.einsum(
        eqn,
        x.astype(dtype),
        y.astype(dtype),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def _dot_fwd(eqn, x, y, dtype, frozen):
    # The residual of x is kept in `dtype`: that is all the backward uses of it.
    kept = None if frozen else x.astype(dtype)
    return dot(eqn, x, y, dtype, frozen), (kept, y, jnp.zeros((), x.dtype))


def _dot_bwd(eqn, dtype, frozen, residual, dz):
    x, y, like = residual
    operands, z = eqn.split("->")
    xs, ys = operands.split(",")
    dz = dz.astype(dtype)
    dx = dot(f"{z},{ys}->{xs}", dz, y, dtype, True).astype(like.dtype)
    if frozen:
        return dx, None
    if set(xs) & set(z) & set(ys):
        dy = dot(f"{xs},{z}->{ys}", x, dz, dtype, True)
        return dx, dy.astype(y.dtype)
    # A product over the leading axes of both operands transposes the first on a CPU: let that be
    # the smaller one, which beside an adapter's matrix is its inner state or that one's cotangent.
    # einsum and XLA would both swap them back to spare the transposition of the result (and not
    # every CPU has that form in bfloat16), hence the order of letters and the barrier.
    (ls, left), (rs, right) = sorted(((xs, x), (z, dz)), key=lambda pair: pair[1].size)
    found = "".join(sorted(ys, key=lambda c: (c in rs, ys.index(c))))
    dy = jax.lax.optimization_barrier(dot(f"{ls},{rs}->{found}", left, right, dtype, True))
    return dx, jnp.einsum(f"{found}->{ys}", dy).astype(y.dtype)


dot.defvjp(_dot_fwd, _dot_bwd)


# Ways to store a base matrix in fewer bits -> the dtype of the stored numbers.
QUANTIZE: dict[str, jnp.dtype] = {"int8": jnp.dtype(jnp.int8)}


def dequantized(leaves: Mapping[str, jax.Array]) -> jax.Array:
    """The matrix that an Einsum's leaves of one layer mean, float32: 'w', times any 'w_scale'."""
    w = leaves["w"].astype(jnp.float32)
    return w * leaves["w_scale"] if "w_scale" in leaves else w


class Einsum(nn.Module):
    """The one place where a base weight meets an activation: y = einsum(eqn, x, w) (+ b).

    `eqn` contracts the leading letters of the weight, e.g. 'BTD,DNH->BTNH'; the weight's letters
    are its logical axis names. Input in any float dtype, output float32. The weight is frozen: it
    takes no gradient here, by construction. Quantised, it is `w` in 8 bits times `w_scale`, one
    float32 number for each output channel, which multiplies the product.
    """

    eqn: str
    shape: tuple[int, ...]
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    bias: bool = False
    quantize: str = ""
    mesh: Mesh | None = None

    @property
    def letters(self) -> tuple[str, str, str]:
        """(input, weight, output) letters of eqn."""
        operands, out = self.eqn.split("->")
        x, w = operands.split(",")
        return x, w, out

    def setup(self):
        _, letters, out = self.letters
        size = dict(zip(letters, self.shape, strict=True))
        inputs = "".join(c for c in letters if c not in out)
        outputs = "".join(c for c in letters if c in out)
        std = math.prod(size[c] for c in inputs) ** -0.5

        def param(name, init, letters, dtype):
            init = nn.with_logical_partitioning(init, tuple(letters))
            return self.param(name, init, tuple(size[c] for c in letters), dtype)

        leaves = {}
        if self.quantize:
            leaves["w"] = param("w", _integers, letters, QUANTIZE[self.quantize])
            init = nn.initializers.constant(std * 3**0.5 / 127)  # the integers are uniform
            leaves["w_scale"] = param("w_scale", init, outputs, jnp.float32)
        else:
            leaves["w"] = param("w", nn.initializers.normal(std), letters, self.param_dtype)
        if self.bias:
            leaves["b"] = param("b", nn.initializers.zeros, outputs, self.param_dtype)
        self.leaves = leaves

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.plus_bias(self.product(x))

    def product(self, x: jax.Array) -> jax.Array:
        """einsum(eqn, x, w) without the bias."""
        w = gathered(self.leaves["w"], self.letters[1], self.mesh)
        y = dot(self.eqn, x, w, self.dtype, True)
        if "w_scale" in self.leaves:
            y = y * jax.lax.stop_gradient(self.leaves["w_scale"])
        return y

    def plus_bias(self, y: jax.Array) -> jax.Array:
        if "b" in self.leaves:
            y = y + jax.lax.stop_gradient(self.leaves["b"]).astype(jnp.float32)
        return y


def _integers(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    return jax.random.randint(key, shape, -127, 128, dtype)


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + scale), or * scale, over the last axis. Input any float, output float32."""

    axis: str
    size: int
    eps: float
    plus_one: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.zeros if self.plus_one else nn.initializers.ones
        init = nn.with_logical_partitioning(init, (self.axis,))
        scale = jax.lax.stop_gradient(self.param("scale", init, (self.size,), jnp.float32))
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + self.eps)
        return x * (1 + scale if self.plus_one else scale)


def rope_table(positions: jax.Array, head_dim: int, base: float, factor: float) -> jax.Array:
    """cos and sin of RoPE (arXiv:2104.09864) for positions [B,T] -> [2,B,T,1,H/2], float32."""
    inverse = 1.0 / base ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = positions.astype(jnp.float32)[..., None, None] * (inverse / factor)
    return jnp.stack([jnp.cos(angle), jnp.sin(angle)])


def apply_rope(x: jax.Array, table: jax.Array) -> jax.Array:
    """Rotates the two halves of the last axis of x [B,T,N,H] (float32) by the table's angles."""
    cos, sin = table
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


class Projections(nn.Module):
    """Makes the named Einsums of a block; `wrap(einsum, path)` may put an adapter round each."""

    arch: Arch
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    wrap: Callable[[Einsum, str], nn.Module]
    quantize: str = ""
    mesh: Mesh | None = None

    def proj(self, name: str, eqn: str, bias: bool = False) -> nn.Module:
        a = self.arch
        sizes = {
            "D": a.embed, "N": a.heads, "K": a.kv_heads, "H": a.head_dim, "F": a.hidden
        }  # fmt: skip
        shape = tuple(sizes[c] for c in eqn.split(",")[1].split("->")[0])
        dtypes = self.dtype, self.param_dtype
        base = Einsum(eqn, shape, *dtypes, bias, self.quantize, self.mesh, name=name)
        return self.wrap(base, f"{self.name}/{name}")

    def norm(self, name: str, axis: str, size: int) -> RMSNorm:
        return RMSNorm(axis, size, self.arch.eps, self.arch.norm_plus_one, name=name)


# (q [B,T,N,H], k, v [B,T,K,H]) -> [B,T,N,H] float32: attention.attention of one layer.
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class Attention(Projections):
    """[B,T,D] -> [B,T,D] in `dtype`; `attend` is the attention of this layer's positions."""

    @nn.compact
    def __call__(self, x: jax.Array, rope: jax.Array, attend: Attend) -> jax.Array:
        a = self.arch
        q = self.proj("q_proj", "BTD,DNH->BTNH", a.qkv_bias)(x)
        k = self.proj("k_proj", "BTD,DKH->BTKH", a.qkv_bias)(x)
        v = self.proj("v_proj", "BTD,DKH->BTKH", a.qkv_bias)(x)
        v = checkpoint_name(v.astype(self.dtype), "v")
        q = checkpoint_name(q.astype(self.dtype), "q")
        k = checkpoint_name(k.astype(self.dtype), "k")
        if a.qk_norm:
            q = self.norm("q_norm", "H", a.head_dim)(q)
            k = self.norm("k_norm", "H", a.head_dim)(k)
        q = apply_rope(q.astype(jnp.float32), rope) * a.query_scale**-0.5
        k = apply_rope(k.astype(jnp.float32), rope)
        out = attend(q, k, v).astype(self.dtype)
        out = self.proj("o_proj", "BTNH,NHD->BTD")(out)
        return checkpoint_name(out.astype(self.dtype), "o")


@jax.custom_vjp
def _gradients_once(*xs: jax.Array) -> tuple[jax.Array, ...]:
    """xs, whose cotangents are computed together, before any product reads one of them.

    XLA for TPU would else compute the gradient of GELU again inside some of the six products that
    read it, three of up's and three of gate's, which then wait for it.
    """
    return xs


_gradients_once.defvjp(lambda *xs: (xs, None), lambda _, gs: jax.lax.optimization_barrier(gs))


class MLP(Projections):
    """[B,T,D] -> [B,T,D] in `dtype`: down(act(gate(x)) * up(x))."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gate = self.proj("gate_proj", "BTD,DF->BTF")(x)
        up = self.proj("up_proj", "BTD,DF->BTF")(x)
        gate, up = _gradients_once(gate.astype(self.dtype), up.astype(self.dtype))
        gate = checkpoint_name(gate, "gate").astype(jnp.float32)
        up = checkpoint_name(up, "up").astype(jnp.float32)
        act = nn.gelu(gate, approximate=True) if self.arch.gelu else nn.silu(gate)
        out = self.proj("down_proj", "BTF,FD->BTD")((act * up).astype(self.dtype))
        return checkpoint_name(out.astype(self.dtype), "down")
