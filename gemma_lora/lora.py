"""Adapters: hand-written modules round anything with `.letters`, `.shape`, `.dtype`.

Source: LoRA (arXiv:2106.09685) in the form of Hugging Face PEFT: y = W x + b + s B(A(drop(x))),
s = alpha / r, or alpha / sqrt(r) with rank stabilisation (arXiv:2312.03732); dropout on A's input
only, with an independent mask for each module, in training only; A ~ U(-1/sqrt(in), 1/sqrt(in)),
B = 0; A and B in float32.
"""

import dataclasses
import math
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gemma_lora.errors import UserError
from gemma_lora.layers import dot

# Names for common target sets; anything else is a regular expression.
TARGETS = {
    "all-linear": "(q|k|v|o|gate|up|down)_proj",
    "qv": "(q|v)_proj",  # PEFT's default for these models
}


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """What to adapt and how; called as the model's `wrap`."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.1
    targets: str = "all-linear"
    rslora: bool = False

    def __post_init__(self):
        if self.rank < 1:
            raise UserError(f"lora.rank is {self.rank}, expected at least 1")
        if not 0 < self.alpha < math.inf:
            raise UserError(f"lora.alpha is {self.alpha}, expected a positive number")
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"lora.dropout is {self.dropout}, expected 0 <= dropout < 1")
        try:
            re.compile(self.pattern)
        except re.error as e:
            raise UserError(f"lora.targets {self.targets!r} is no regular expression: {e}") from e

    @property
    def pattern(self) -> str:
        return TARGETS.get(self.targets, self.targets)

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def matches(self, path: str) -> bool:
        """Does 'attn/q_proj' match, as a whole path or by its last name?"""
        names = (path, path.rsplit("/", 1)[-1])
        return any(re.fullmatch(self.pattern, n) for n in names)

    def __call__(self, base: nn.Module, path: str) -> nn.Module:
        if not self.matches(path):
            return base
        return LoRA(base, self.rank, self.scale, self.dropout)


class LoRA(nn.Module):
    """Adds scale * B(A(drop(x))) to `base(x)`; variables 'a' and 'b' in collection 'lora'.

    For a base of weight letters (in..., out...) A is [in..., R] and B is [R, out...], float32.
    """

    base: nn.Module
    rank: int
    scale: float
    dropout: float

    def setup(self):
        # The base keeps its own path in 'params'; the adapter has the same path in 'lora'.
        nn.share_scope(self, self.base)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x_letters, w, out = self.base.letters
        w_in = "".join(c for c in w if c not in out)
        w_out = "".join(c for c in w if c in out)
        batch = "".join(c for c in x_letters if c not in w)
        size = dict(zip(w, self.base.shape, strict=True))
        a = self._matrix("a", _uniform(math.prod(size[c] for c in w_in)), w_in + "R", size)
        b = self._matrix("b", nn.initializers.zeros, "R" + w_out, size)
        y = self.base(x)
        if self.dropout and self.has_rng("dropout"):
            x = _drop(self.make_rng("dropout"), x, self.dropout)
        dtype = self.base.dtype
        h = dot(f"{x_letters},{w_in}R->{batch}R", x, a, dtype, False)
        return y + dot(f"{batch}R,R{w_out}->{out}", h, b, dtype, False) * self.scale

    def _matrix(self, name, init, letters, size):
        shape = tuple({**size, "R": self.rank}[c] for c in letters)
        init = nn.with_logical_partitioning(init, tuple(letters))
        # The rng is asked for only when the variable is made.
        make = lambda: init(self.make_rng("params"), shape, jnp.float32)  # noqa: E731
        value = self.variable("lora", name, make).value
        return value


def _drop(key: jax.Array, x: jax.Array, rate: float) -> jax.Array:
    """x with elements zeroed at `rate` (to 1/65536), the rest scaled so that the mean is kept.

    Each 32-bit draw serves two elements: on a CPU the random bits are a large part of the step.
    """
    cut = round(rate * 2**16)
    bits = jax.random.bits(key, (*x.shape[:-1], -(-x.shape[-1] // 2)), jnp.uint32)
    halves = jnp.concatenate([bits & 0xFFFF, bits >> 16], axis=-1)[..., : x.shape[-1]]
    return jnp.where(halves >= cut, x / (1 - cut / 2**16), 0)


def _uniform(fan_in: int):
    """PEFT's kaiming_uniform(a=sqrt(5)): U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    bound = fan_in**-0.5

    def init(key, shape, dtype):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def check_targets(config: LoRAConfig, params: dict[str, Any]) -> list[str]:
    """The adapted paths of a base tree; raises UserError, listing all, when nothing matches."""
    paths = [
        f"{module}/{name}"
        for module, leaves in params["layers"].items()
        for name, leaf in leaves.items()
        if isinstance(leaf, dict) and "w" in leaf
    ]
    found = [p for p in paths if config.matches(p)]
    if not found:
        raise UserError(
            f"lora.targets {config.targets!r} matches no module. "
            f"Names: {', '.join(sorted(paths))}; named sets: {', '.join(TARGETS)}"
        )
    return found


def count(tree: Any) -> int:
    """Number of elements in a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def merge(params: dict[str, Any], lora: dict[str, Any], scale: float) -> dict[str, Any]:
    """params with W + scale * A B in the adapted places, summed in float32 and cast once.

    Both trees stacked over L: W [L, in..., out...], A [L, in..., R], B [L, R, out...].
    """

    def join(w, adapter):
        a, b = adapter["a"], adapter["b"]
        layers, rank = b.shape[:2]
        delta = jnp.einsum(
            "lir,lro->lio",
            a.reshape(layers, -1, rank),
            b.reshape(layers, rank, -1),
            precision=jax.lax.Precision.HIGHEST,
        )
        return (w.astype(jnp.float32) + scale * delta.reshape(w.shape)).astype(w.dtype)

    def walk(base, adapter):
        if "a" in adapter:
            return {**base, "w": join(base["w"], adapter)}
        return {**base, **{k: walk(base[k], adapter[k]) for k in adapter}}

    return walk(params, lora)
