"""token_stats: the one definition of loss, token and correct.

The logits of a batch are never held: the head runs over vocabulary chunks with an online
logsumexp, as flash attention does with K = V = the embedding table. When a gradient is wanted, the
same pass also accumulates the expected embedding, so that the backward is one scaling.

Letters: B rows, C positions of a row that carry loss, D embed, V vocab.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp


class TokenStats(NamedTuple):
    """Per predicted token, [B,C] float32 each; garbage where the position carries no loss."""

    nll: jax.Array  # -log p[target], after the final soft-cap
    margin: jax.Array  # target logit - largest other logit; > 0: the greedy token is right
    other_p2: jax.Array  # sum of p^2 over the tokens that are not the target

    @property
    def correct(self) -> jax.Array:
        """1.0 where every other token has a smaller logit (equal logits predict nothing)."""
        return (self.margin > 0).astype(jnp.float32)

    @property
    def el2n(self) -> jax.Array:
        """|p - onehot(target)|_2 (arXiv:2107.07075): sqrt((1 - p[target])^2 + other_p2)."""
        return jnp.sqrt(jnp.square(jnp.expm1(-self.nll)) + self.other_p2)


class _Running(NamedTuple):
    """What one pass over the vocabulary carries, [B,C] float32 (pull: [B,C,D])."""

    top: jax.Array  # largest logit so far
    total: jax.Array  # sum exp(l - top)
    total2: jax.Array  # sum exp(2 (l - top)) over tokens that are not the target
    other: jax.Array  # largest logit of a token that is not the target
    target: jax.Array  # the target's logit
    slope: jax.Array  # d soft-capped logit / d raw logit at the target
    pull: jax.Array  # sum exp(l - top) * slope * E, [B,C,D], or [] when no gradient is wanted


def token_stats(
    hidden: jax.Array, targets: jax.Array, head: jax.Array, softcap: float, chunk: int
) -> TokenStats:
    """hidden [B,C,D], targets [B,C] int32, head [V,D] (frozen) -> TokenStats [B,C].

    Products take operands in hidden's dtype and accumulate in float32. `softcap` is the model's
    final soft-cap (0: none), `chunk` the vocabulary entries per step. Only `nll` has a gradient,
    with respect to `hidden` alone.
    """
    nll, rest = _stats(softcap, chunk, hidden, targets, head)
    return TokenStats(nll, *jax.lax.stop_gradient(rest))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _stats(softcap, chunk, hidden, targets, head):
    return _pass(softcap, chunk, hidden, targets, head, False)[0]


def _stats_fwd(softcap, chunk, hidden, targets, head):
    out, dx = _pass(softcap, chunk, hidden, targets, head, True)
    return out, dx


def _stats_bwd(softcap, chunk, dx, cotangents):
    d_nll, _ = cotangents
    return (d_nll[..., None] * dx.astype(jnp.float32)).astype(dx.dtype), None, None


_stats.defvjp(_stats_fwd, _stats_bwd)


def _pass(softcap, chunk, hidden, targets, head, want_grad):
    """((nll, (margin, other_p2)), d nll / d hidden [B,C,D] or None) in one sweep."""
    vocab, embed = head.shape
    chunk = min(chunk, vocab)
    steps = -(-vocab // chunk)
    dtype = hidden.dtype
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    einsum = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
    low = jnp.finfo(jnp.float32).min

    def step(run: _Running, i: jax.Array):
        # The last chunk is moved back to end at V; the entries it shares with the one before
        # are masked, so any vocabulary size takes any chunk.
        first = i * chunk
        start = jnp.minimum(first, vocab - chunk)
        rows = jax.lax.dynamic_slice(head, (start, 0), (chunk, embed)).astype(dtype)
        ids = start + jnp.arange(chunk)
        z = einsum("BCD,VD->BCV", hidden, rows)
        slope = jnp.ones_like(z)
        if softcap:
            z = jnp.tanh(z / softcap)
            slope, z = 1 - jnp.square(z), z * softcap
        if vocab % chunk:
            z = jnp.where(ids >= first, z, low)
        hit = ids == targets[..., None]
        other = jnp.maximum(run.other, jnp.max(jnp.where(hit, low, z), -1))
        target = run.target + jnp.sum(jnp.where(hit, z, 0), -1)
        top = jnp.maximum(run.top, jnp.max(z, -1))
        scale, p = jnp.exp(run.top - top), jnp.exp(z - top[..., None])
        total = run.total * scale + jnp.sum(p, -1)
        total2 = run.total2 * jnp.square(scale) + jnp.sum(jnp.square(jnp.where(hit, 0, p)), -1)
        pull, at_target = run.pull, run.slope
        if want_grad:
            at_target = at_target + jnp.sum(jnp.where(hit, slope, 0), -1)
            p = (p * slope).astype(dtype)
            pull = run.pull * scale[..., None] + einsum("BCV,VD->BCD", p, rows)
        return _Running(top, total, total2, other, target, at_target, pull), None

    zero = jnp.zeros(targets.shape, jnp.float32)
    pull = jnp.zeros(hidden.shape if want_grad else (), jnp.float32)
    start = _Running(zero + low, zero, zero, zero + low, zero, zero, pull)
    run, _ = jax.lax.scan(step, start, jnp.arange(steps))
    nll = run.top + jnp.log(run.total) - run.target
    out = nll, (run.target - run.other, run.total2 / jnp.square(run.total))
    if not want_grad:
        return out, None
    own = jnp.take(head, targets, axis=0).astype(jnp.float32) * run.slope[..., None]
    return out, (run.pull / run.total[..., None] - own).astype(dtype)
