"""The adapters: hand-written modules round a layers.Einsum, and how their matrices start.

Source: Hugging Face PEFT 0.21, in meaning and in detail.
LoRA (arXiv:2106.09685): y = W x + b + s B(A(drop(x))), s = alpha / r, or alpha / sqrt(r) with rank
stabilisation (arXiv:2312.03732); dropout on A's input only, with an independent mask for each
module, in training only; A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0; A and B in float32.
DoRA (arXiv:2402.09353): y = b + m (W x + s B(A(x))) / ||W + s B A||, the norm of each output
channel taken as a constant by the backward.
PiSSA (arXiv:2404.02948): A and B start as the r largest singular directions of W, which leave W.

For a base of weight letters (in..., out...) A is [in..., R], B is [R, out...], m is [out...];
leaves 'a', 'b', 'm' of collection 'lora', at the path of the base in 'params'.
"""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from gemma_lora.errors import UserError
from gemma_lora.layers import dequantized, dot

Leaves = dict[str, jax.Array]


class LoRA(nn.Module):
    """base(x) + scale * B(A(drop(x)))."""

    base: nn.Module
    rank: int
    scale: float
    dropout: float

    def setup(self):
        # The base keeps its own path in 'params'; the adapter has the same path in 'lora'.
        nn.share_scope(self, self.base)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        a, b = self.pair()
        return self.base(x) + self.update(self.dropped(x), a, b)

    @staticmethod
    def merge(w: jax.Array, leaves: Leaves, scale: float) -> jax.Array:
        """The one matrix that does the same: W + scale A B, [in..., out...] float32."""
        return w + scale * _product(leaves["a"], leaves["b"])

    # (W [in..., out...] float32, leaves, scale) of one layer -> leaves of step 0; None: as made.
    start = None

    def pair(self) -> tuple[jax.Array, jax.Array]:
        """A and B."""
        w_in, w_out = self.sides()
        size = dict(zip(w_in + w_out, self.base.shape, strict=True))
        a = self.leaf("a", _uniform(math.prod(size[c] for c in w_in)), w_in + "R")
        return a, self.leaf("b", nn.initializers.zeros, "R" + w_out)

    def update(self, x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        """scale * B(A(x))."""
        x_letters, w, out = self.base.letters
        w_in, w_out = self.sides()
        batch = "".join(c for c in x_letters if c not in w)
        h = dot(f"{x_letters},{w_in}R->{batch}R", x, a, self.base.dtype, False)
        h = checkpoint_name(h.astype(self.base.dtype), "inner")
        y = dot(f"{batch}R,R{w_out}->{out}", h, b, self.base.dtype, False)
        # In the products' dtype: beside the base's product a float32 one would be the largest array
        # of a layer, which nothing can add up in place.
        return (y * self.scale).astype(self.base.dtype)

    def dropped(self, x: jax.Array) -> jax.Array:
        """x, with dropout where the model is given a 'dropout' rng."""
        if self.dropout and self.has_rng("dropout"):
            return _drop(self.make_rng("dropout"), x, self.dropout)
        return x

    def leaf(self, name: str, init: Callable, letters: str) -> jax.Array:
        """A float32 variable of the collection 'lora'."""
        size = dict(zip(self.base.letters[1], self.base.shape, strict=True), R=self.rank)
        shape = tuple(size[c] for c in letters)
        init = nn.with_logical_partitioning(init, tuple(letters))
        # The rng is asked for only when the variable is made.
        make = lambda: init(self.make_rng("params"), shape, jnp.float32)  # noqa: E731
        return self.variable("lora", name, make).value

    def sides(self) -> tuple[str, str]:
        """The weight's input letters and its output letters."""
        _, w, out = self.base.letters
        return "".join(c for c in w if c not in out), "".join(c for c in w if c in out)


class DoRA(LoRA):
    """b + m / ||W + s B A|| * (W x + s B A x), where dropout leaves one W x whole, as in PEFT."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        a, b = self.pair()
        # Only from_base knows the real value; until then nothing computed with it is finite.
        m = self.leaf("m", nn.initializers.constant(jnp.nan), self.sides()[1])
        norm = _norm(dequantized(self.base.leaves), a, b, self.scale)
        gain = _gain(m, jax.lax.stop_gradient(norm))
        y = of_dropped = self.base.product(x)
        dropped = self.dropped(x)
        if dropped is not x:
            of_dropped = self.base.product(dropped)
        y = y + (gain - 1) * of_dropped + gain * self.update(dropped, a, b)
        return self.base.plus_bias(y)

    @staticmethod
    def merge(w: jax.Array, leaves: Leaves, scale: float) -> jax.Array:
        norm = _norm(w, leaves["a"], leaves["b"], scale)
        return LoRA.merge(w, leaves, scale) * _gain(leaves["m"], norm)

    @staticmethod
    def start(w: jax.Array, leaves: Leaves, scale: float) -> Leaves:
        return {**leaves, "m": _norm(w, leaves["a"], leaves["b"], scale)}


VARIANTS: dict[str, type[LoRA]] = {"lora": LoRA, "dora": DoRA}


def _product(a: jax.Array, b: jax.Array, axes: int = 1) -> jax.Array:
    return jnp.tensordot(a, b, axes, precision=jax.lax.Precision.HIGHEST)


def _gain(m: jax.Array, norm: jax.Array) -> jax.Array:
    """m / norm; a channel of zeros, as pruning leaves them, stays one."""
    return m / jnp.where(norm == 0, 1, norm)


def _norm(w: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """||W + scale A B|| over the input axes, [out...] float32, without a matrix of W's size.

    The square is ||W||^2 + 2 s <W, AB> + s^2 ||AB||^2; both products go through [R, out...].
    """
    inputs = tuple(range(a.ndim - 1))
    flat = a.reshape(-1, a.shape[-1]).T  # [R, in]
    w_of_a = _product(flat, w.reshape(-1, *w.shape[len(inputs) :]))
    a_of_a = _product(flat, flat.T)
    cross = jnp.sum(b * (2 * scale * w_of_a + scale**2 * _product(a_of_a, b)), axis=0)
    return jnp.sqrt(jnp.sum(jnp.square(w), inputs) + cross)


def _drop(key: jax.Array, x: jax.Array, rate: float) -> jax.Array:
    """x with elements zeroed at `rate`, the rest scaled so that the mean is kept.

    An element's bits are a hash of its index and the key: a dozen integer operations that fuse
    into the product's operand, where threefry's bits were a sixth of a CPU's step and stood whole
    in a TPU's memory. Equal on every mesh. The mixing is that of MurmurHash3's finalizer, with a
    key before each half.
    """
    first, second = jax.random.bits(key, (2,), jnp.uint32)
    h = first  # here and not last: whatever is free of the key, compilers keep as whole arrays
    for axis in range(x.ndim):
        stride = jnp.uint32(math.prod(x.shape[axis + 1 :]) % 2**32)
        h = h + stride * jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B) + second
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    h = h ^ (h >> 16)
    # In float32: 1 / 0.9 rounded to bfloat16 would move the mean.
    return jnp.where(h >= jnp.uint32(rate * 2**32), x.astype(jnp.float32) * (1 / (1 - rate)), 0)


def _uniform(fan_in: int):
    """PEFT's kaiming_uniform(a=sqrt(5)): U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    bound = fan_in**-0.5

    def init(key, shape, dtype):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def _pissa(w: jax.Array, leaves: Leaves, scale: float) -> tuple[jax.Array, Leaves]:
    """W [in..., out...] float32 -> (W - s A B, A and B of its largest singular values)."""
    a, b = leaves["a"], leaves["b"]
    rank = b.shape[0]
    flat = w.reshape(-1, b[0].size)
    if rank > min(flat.shape):
        size = " x ".join(map(str, flat.shape))
        raise UserError(
            f"lora.init 'pissa' with rank {rank}: a matrix of {size} has {min(flat.shape)} "
            f"singular values, expected at most that as the rank of its module"
        )
    # Singular directions of the shorter side from its Gram matrix: an SVD of the whole takes ten
    # times as long. What is left of W is exactly orthogonal to them either way.
    short = flat if flat.shape[0] <= flat.shape[1] else flat.T
    u = jnp.linalg.eigh(_product(short, short.T))[1][:, ::-1][:, :rank]
    sv = _product(u.T, short)  # singular values times directions of the longer side
    s = jnp.linalg.norm(sv, axis=1, keepdims=True)
    root = jnp.sqrt(s / scale)
    one, other = u * root.T, jnp.where(s > 0, sv / jnp.where(s > 0, s, 1), 0) * root
    left, right = (one, other) if short is flat else (other.T, one.T)
    start = {"a": left.reshape(a.shape), "b": right.reshape(b.shape)}
    return LoRA.merge(w, start, -scale), {**leaves, **start}


# How A and B start: (W, leaves, scale) of one layer -> (W, leaves); None: as LoRA.pair makes them.
INITS: dict[str, Callable | None] = {"kaiming": None, "pissa": _pissa}
