"""token_stats: the one definition of loss, token and correct.

The logits of a batch are never held: the head runs over vocabulary chunks with an online
logsumexp, as flash attention does with K = V = the embedding table. When a gradient is wanted, the
same pass also accumulates the expected embedding, so that the backward is one scaling. Shapes are
fixed, the work is not: of several programs the least runs that has room for the positions that
carry loss. On a mesh each device sweeps its own words for its own tokens; what then crosses devices
are a few numbers a token and the sum of the expected embeddings, never a logit.

Letters: B rows, C places of a row for positions that carry loss, D embed, V vocab, N = B x C
tokens.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from gemma_lora.errors import UserError
from gemma_lora.sharding import AXES, spec


class TokenStats(NamedTuple):
    """Per predicted token, [B,C] float32 each; 0 where the position carries no loss."""

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


class Sweep(NamedTuple):
    """How token_stats goes through the vocabulary."""

    chunk: int = 2048  # vocabulary entries a step of the sweep
    # Where every probability of a token in a chunk is certainly below this, the backward takes the
    # chunk's mean embedding for all of its words, instead of a product; 0: never.
    floor: float = 0.0


class _Running(NamedTuple):
    """What one pass over the words that are not the target carries, [N] float32 (pull: [N,D])."""

    top: jax.Array  # a number no smaller than any logit so far, nor than the target's
    total: jax.Array  # sum exp(l - top)
    total2: jax.Array  # sum exp(2 (l - top))
    other: jax.Array  # largest logit so far
    pull: jax.Array  # sum exp(l - top) * slope * E, [N,D], or [] when no gradient is wanted


def token_stats(
    hidden: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    table: jax.Array,
    softcap: float,
    sweep: Sweep,
    mesh: Mesh | None = None,
) -> TokenStats:
    """hidden [B,C,D], targets and mask [B,C], table [V,D] (frozen) -> TokenStats [B,C].

    mask is other than 0 where a position carries loss: the fewer do, the less there is to do.
    Products take operands in hidden's dtype and accumulate in float32. `softcap` is the model's
    final soft-cap (0: none). Only `nll` has a gradient, with respect to `hidden` alone. With
    sweep.floor > 0 that gradient is off by at most
    sum p_v |E_v - mean E| over the words v of the chunks that were not multiplied out, each of
    probability p_v < floor; the values themselves are exact either way.
    """
    nll, rest = _stats(softcap, sweep, mesh, hidden, targets, mask, table)
    return TokenStats(nll, *jax.lax.stop_gradient(rest))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _stats(softcap, sweep, mesh, *arrays):
    return _sharded(softcap, sweep, mesh, False, *arrays)[0]


def _stats_fwd(softcap, sweep, mesh, *arrays):
    return _sharded(softcap, sweep, mesh, True, *arrays)


def _stats_bwd(softcap, sweep, mesh, dx, cotangents):
    d_nll, _ = cotangents
    return (d_nll[..., None] * dx.astype(jnp.float32)).astype(dx.dtype), None, None, None


_stats.defvjp(_stats_fwd, _stats_bwd)


def _sharded(softcap, sweep, mesh: Mesh | None, want_grad: bool, hidden, targets, mask, table):
    """((nll, (margin, other_p2)) [B,C], d nll / d hidden [B,C,D] or None), on the mesh."""
    rows, slots, embed = hidden.shape
    if mesh is None or mesh.size == 1:
        run, ways = functools.partial(_loaded, softcap, sweep, want_grad, (), ()), 1
    else:
        own = spec(("V", "D"), table.shape, mesh)
        if {"data", "fsdp"} & set(_axes(own[0])):
            raise UserError(
                f"sharding.RULES splits V over {own[0]}, expected tensor or nothing: the tokens of "
                "a batch are split over data and fsdp"
            )
        by_token, ways = PartitionSpec(("data", "fsdp")), mesh.shape["data"] * mesh.shape["fsdp"]
        run = jax.shard_map(
            functools.partial(_loaded, softcap, sweep, want_grad, *(_axes(part) for part in own)),
            mesh=mesh,
            in_specs=(by_token, by_token, by_token, own),
            out_specs=by_token,
            # The merged numbers are equal on all devices of 'tensor', which it cannot see.
            check_vma=False,
        )
    # Rows that the devices cannot share evenly are filled up: the fillers carry no loss.
    more = -rows % ways
    hidden = jnp.pad(hidden, ((0, more), (0, 0), (0, 0))).reshape(-1, embed)
    targets, mask = (jnp.pad(x, ((0, more), (0, 0))).reshape(-1) for x in (targets, mask != 0))
    out = run(hidden, targets, mask, table)
    out = jax.tree.map(lambda x: x.reshape(-1, slots, *x.shape[1:])[:rows], out)
    return out if want_grad else (out[0], None)


def _axes(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (part,) if isinstance(part, str) else tuple(part or ())


_SIZES, _FEWEST = 8, 256  # how many programs, where a device has at least so many positions


def _loaded(softcap, sweep: Sweep, want_grad, v_axes, d_axes, hidden, targets, mask, table):
    """_sweep of the tokens where mask [N] is True, by the least program that has room for them; 0
    for the others. A switch around the sweep: one inside it would copy its sums at every chunk."""
    n = len(mask)
    step = n if n < _FEWEST else 16 * -(-n // (16 * _SIZES))
    order = jnp.nonzero(mask, size=n, fill_value=n)[0]
    tokens = [jnp.take(x, order, axis=0, mode="fill", fill_value=0) for x in (hidden, targets)]
    run = functools.partial(_sweep, softcap, sweep, want_grad, v_axes, d_axes)

    def some(size: int, hidden, targets, table):
        out = run(hidden[:size], targets[:size], table)
        return jax.tree.map(lambda x: jnp.pad(x, [(0, n - size)] + [(0, 0)] * (x.ndim - 1)), out)

    # Devices that exchange parts of the sweep must run the same program. That all of the mesh do
    # costs nothing: a step waits for the slowest anyway.
    loaded = jax.lax.pmax(jnp.sum(mask), AXES) if v_axes or d_axes else jnp.sum(mask)
    branches = [functools.partial(some, min(end, n)) for end in range(step, n + step, step)]
    out = jax.lax.switch((loaded - 1) // step, branches, *tokens, table)
    place = jnp.cumsum(mask) - 1  # in `order`, of each token with loss

    def back(x: jax.Array) -> jax.Array:
        return jnp.where(mask.reshape(-1, *[1] * (x.ndim - 1)), jnp.take(x, place, axis=0), 0)

    return jax.tree.map(back, out)


def _sweep(softcap, sweep: Sweep, want_grad, v_axes, d_axes, hidden, targets, table):
    """One device's tokens [N,D], [N] and its part of the table, split over the named mesh axes.

    Returns ((nll, (margin, other_p2)) [N], d nll / d hidden [N,D] or ()).
    """
    vocab = len(table)
    chunk = min(sweep.chunk, vocab)
    dtype = hidden.dtype
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    dot = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
    low = jnp.finfo(jnp.float32).min
    # From here on a target of another device's words is a number that no word here has.
    targets = targets - (jax.lax.axis_index(v_axes) * vocab if v_axes else 0)

    def whole(rows: jax.Array) -> jax.Array:
        """Rows of the table with all of D, in the products' dtype."""
        rows = rows.astype(dtype)
        return jax.lax.all_gather(rows, d_axes, axis=1, tiled=True) if d_axes else rows

    def capped(z: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(logits, d logit / d raw logit)."""
        if not softcap:
            return z, jnp.ones_like(z)
        z = jnp.tanh(z / softcap)
        return z * softcap, 1 - jnp.square(z)

    here = (targets >= 0) & (targets < vocab)
    # The targets' own embeddings [N,D], zero where they are another device's. Each device has some
    # columns for the tokens of all, and needs all columns for its own.
    index = jnp.clip(targets, 0, vocab - 1)
    if d_axes:
        index = jax.lax.all_gather(index, d_axes, tiled=True)
    own = jnp.take(table, index, axis=0).astype(dtype)
    if d_axes:
        own = jax.lax.all_to_all(own, d_axes, split_axis=0, concat_axis=1, tiled=True)
    own = own * here[:, None]
    if v_axes:
        own = jax.lax.psum(own, v_axes)
    # The target's logit, and d soft-capped logit / d raw logit there; the sweep leaves it out.
    products = hidden.astype(jnp.float32) * own.astype(jnp.float32)
    target, at_target = capped(jnp.sum(products, -1))

    def begins(i: jax.Array) -> jax.Array:
        # The last chunk is moved back to end at V; the entries it shares with the one before
        # are masked, so any vocabulary size takes any chunk.
        return jnp.minimum(i * chunk, vocab - chunk)

    def chunk_of(i: jax.Array) -> jax.Array:
        return whole(jax.lax.dynamic_slice_in_dim(table, begins(i), chunk))

    def step(carry: tuple[_Running, jax.Array | None], i: jax.Array):
        run, rows = carry
        if not d_axes:
            return (swept(run, chunk_of(i), i), None), None
        # Gathered from other devices, the next chunk is on its way while this one is multiplied;
        # the last turn gathers its own again, which nobody reads.
        following = chunk_of(i + 1)
        return (swept(run, rows, i), following), None

    def swept(run: _Running, rows: jax.Array, i: jax.Array) -> _Running:
        first, start = i * chunk, begins(i)
        ids = start + jnp.arange(chunk)
        z, slope = capped(dot("ND,VD->NV", hidden, rows))
        mask = ids == targets[:, None]
        z = jnp.where((mask | (ids < first)) if vocab % chunk else mask, low, z)
        most = jnp.max(z, -1)
        top = jnp.maximum(run.top, most)
        scale, p = jnp.exp(run.top - top), jnp.exp(z - top[:, None])
        new = _Running(
            top,
            run.total * scale + jnp.sum(p, -1),
            run.total2 * jnp.square(scale) + jnp.sum(jnp.square(p), -1),
            jnp.maximum(run.other, most),
            run.pull * scale[:, None] if want_grad else run.pull,
        )
        if not want_grad:
            return new
        if not sweep.floor:
            pull = new.pull + dot("NV,VD->ND", (p * slope).astype(dtype), rows)
            return new._replace(pull=pull)
        # The logsumexp is no smaller than that of the words so far and the target.
        bound = top + jnp.log(new.total + jnp.exp(target - top))
        active = most > bound + math.log(sweep.floor)
        mass = jnp.where(active, 0, jnp.sum(p * slope, -1))
        pull = new.pull + mass[:, None] * jnp.mean(rows.astype(jnp.float32), 0)
        return new._replace(pull=_add_active(active, p, slope, rows, pull, dot))

    zero = jnp.zeros(targets.shape, jnp.float32)
    pull = jnp.zeros(hidden.shape if want_grad else (), jnp.float32)
    run = _Running(target, zero, zero, zero + low, pull)
    first = chunk_of(0) if d_axes else None
    (run, _), _ = jax.lax.scan(step, (run, first), jnp.arange(-(-vocab // chunk)))
    run = _merge(run, v_axes) if v_axes else run
    total = run.total + jnp.exp(target - run.top)
    nll = run.top - target + jnp.log(total)
    out = nll, (target - run.other, run.total2 / jnp.square(total))
    if not want_grad:
        return out, ()
    # d nll / d target logit = p[target] - 1 = -(sum of the others' p), without the cancellation.
    push = (run.total * at_target)[:, None] * own.astype(jnp.float32)
    return out, ((run.pull - push) / total[:, None]).astype(dtype)


_GROUP = 128  # tokens a product of _add_active takes at a time


def _add_active(active, p, slope, rows, pull, dot):
    """pull + (p * slope) rows for the active tokens alone: as many groups as there are tokens."""
    tokens = len(active)
    size = -(-tokens // _GROUP) * _GROUP
    index = jnp.nonzero(active, size=size, fill_value=tokens)[0]

    def group(i, pull):
        at = jax.lax.dynamic_slice_in_dim(index, i * _GROUP, _GROUP)
        take = functools.partial(jnp.take, indices=at, axis=0, mode="fill", fill_value=0)
        weights = (take(p) * take(slope)).astype(rows.dtype)
        return pull.at[at].add(dot("NV,VD->ND", weights, rows), mode="drop")

    return jax.lax.fori_loop(0, -(-jnp.sum(active) // _GROUP), group, pull)


def _merge(run: _Running, axes: tuple[str, ...]) -> _Running:
    """The sweep over all words, from those over each device's."""
    top = jax.lax.pmax(run.top, axes)
    scale = jnp.exp(run.top - top)
    add = functools.partial(jax.lax.psum, axis_name=axes)
    return _Running(
        top,
        add(run.total * scale),
        add(run.total2 * jnp.square(scale)),
        jax.lax.pmax(run.other, axes),
        add(run.pull * scale[:, None]) if run.pull.ndim else run.pull,
    )
