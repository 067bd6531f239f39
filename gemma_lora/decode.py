"""Decoding: prompts continued token by token by the same layers and weights, with a KV cache.

Letters as in layers.py; here S counts the slots of the cache. A row's prompt fills its first slots,
padding after it up to the longest of the batch; a new token of all rows then takes the same slot,
so that a slot's place says nothing of the token's position, which the cache holds beside it.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from gemma_lora.attention import reference
from gemma_lora.errors import UserError
from gemma_lora.model import Block, Transformer, head_weight, logits
from gemma_lora.sharding import spec

WIDTH = 64  # prompts are padded to a multiple of it: few widths are few programs


class Sampling(NamedTuple):
    """How a token is chosen: temperature 0 takes the likeliest, else one is drawn.

    top_p: of the likeliest tokens that together have this probability (arXiv:1904.09751).
    """

    temperature: float = 0.0
    top_p: float = 1.0


class Cache(NamedTuple):
    """Keys (rotated) and values [L,B,S,K,H] in the model's dtype; positions [B,S], -1: empty."""

    k: jax.Array
    v: jax.Array
    positions: jax.Array


class _CachedBlock(Block):
    """A layer whose positions see those of the cache, in which they are first put."""

    @nn.compact
    def __call__(self, carry, layer, is_local, rope, positions, cached, start):
        x, k_all, v_all = carry

        def attend(q, k, v):
            nonlocal k_all, v_all
            at = (layer, 0, start, 0, 0)
            k_all = jax.lax.dynamic_update_slice(k_all, k[None].astype(k_all.dtype), at)
            v_all = jax.lax.dynamic_update_slice(v_all, v[None].astype(v_all.dtype), at)
            k, v = (jax.lax.dynamic_index_in_dim(c, layer, 0, False) for c in (k_all, v_all))
            i, j = positions[:, :, None], cached[:, None, :]
            mask = (j >= 0) & (j <= i)
            if self.arch.window:
                mask &= ~is_local | (j > i - self.arch.window)
            return reference(q, k, v, mask, self.arch.attn_softcap, self.dtype)

        x = self.layer(x, is_local, rope, attend)
        return (x, k_all, v_all), None


class _Decoder(Transformer):
    """tokens [B,T], their positions (-1: padding), the cache, their first slot -> hidden, cache."""

    @nn.compact
    def __call__(self, tokens, positions, cache: Cache, start):
        x, rope = self.start(tokens, positions)
        cached = jax.lax.dynamic_update_slice(cache.positions, positions, (0, start))
        layers = self.stack(_CachedBlock, "", (0, 0, *(nn.broadcast,) * 4))
        each = jnp.arange(self.arch.layers), jnp.asarray(self.arch.is_local)
        carry, _ = layers((x, cache.k, cache.v), *each, rope, positions, cached, start)
        x, k, v = carry
        return self.end(x), Cache(k, v, cached)

    def empty(self, rows: int, slots: int) -> Cache:
        """A cache with nothing in it, its rows and heads on the mesh as those of a batch."""
        a = self.arch
        shape = (a.layers, rows, slots, a.kv_heads, a.head_dim)
        zeros = jnp.zeros(shape, self.dtype)
        if self.mesh is not None and self.mesh.size > 1:
            split = NamedSharding(self.mesh, spec((None, "B", None, "K", None), shape, self.mesh))
            zeros = jax.lax.with_sharding_constraint(zeros, split)
        return Cache(zeros, zeros, jnp.full((rows, slots), -1, jnp.int32))


def require_usable(new: int, sampling: Sampling) -> None:
    """UserError for settings that are out of range."""
    if new < 1 or not 0 <= sampling.temperature < math.inf or not 0 < sampling.top_p <= 1:
        raise UserError(
            f"got {new} new tokens, temperature {sampling.temperature:g}, top_p "
            f"{sampling.top_p:g}; expected at least 1 token, a temperature of 0 or more and top_p "
            "in (0, 1]"
        )


def sampled(z: jax.Array, keys: jax.Array, sampling: Sampling) -> jax.Array:
    """logits [B,V] float32, a key for each row -> tokens [B]."""
    if not sampling.temperature:
        return z.argmax(-1).astype(jnp.int32)
    z = z / sampling.temperature
    if sampling.top_p < 1:
        best = jnp.sort(z, axis=-1, descending=True)
        p = jax.nn.softmax(best, axis=-1)
        # A token stays if those before it have not reached top_p: the first always does.
        kept = jnp.where(jnp.cumsum(p, axis=-1) - p < sampling.top_p, best, jnp.inf)
        z = jnp.where(z < kept.min(-1, keepdims=True), -jnp.inf, z)
    return jax.vmap(jax.random.categorical)(keys, z).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("model", "new", "sampling"))
def _continued(
    model: _Decoder,
    base: Any,
    lora: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    keys: jax.Array,
    stops: jax.Array,
    new: int,
    sampling: Sampling,
) -> jax.Array:
    """tokens [B,P], whose first `lengths` [B] are the prompts -> [B,new]; -1 after a stop."""
    width = tokens.shape[1]
    table = head_weight(base, model.arch)

    def run(tokens, positions, cache, start):
        return model.apply({"params": base, "lora": lora}, tokens, positions, cache, start)

    def choose(hidden, i):
        z = logits(hidden[:, None], table, model.arch, model.dtype)[:, 0]
        return sampled(z, jax.vmap(jax.random.fold_in, (0, None))(keys, i), sampling)

    def more(carry):
        i, _, done, *_ = carry
        return (i < new) & ~done.all()

    def body(carry):
        i, token, done, out, cache = carry
        positions = (lengths + i - 1)[:, None]
        hidden, cache = run(token[:, None], positions, cache, width + i - 1)
        token = choose(hidden[:, 0], i)
        out = out.at[:, i].set(jnp.where(done, -1, token))
        return i + 1, token, done | jnp.isin(token, stops), out, cache

    at = jnp.arange(width)
    positions = jnp.where(at < lengths[:, None], at, -1)
    hidden, cache = run(tokens, positions, model.empty(len(tokens), width + new - 1), 0)
    last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
    token = choose(last, 0)
    out = jnp.full((len(tokens), new), -1, jnp.int32).at[:, 0].set(token)
    return jax.lax.while_loop(more, body, (1, token, jnp.isin(token, stops), out, cache))[3]


def continuations(
    model: Transformer,
    base: Any,
    lora: Any,
    prompts: Sequence[np.ndarray],
    stops: Sequence[int],
    *,
    rows: int,
    new: int,
    sampling: Sampling = Sampling(),  # noqa: B008  a tuple
    seed: int = 0,
) -> Iterator[tuple[int, np.ndarray]]:
    """(index of the prompt, its new tokens) for each of the prompts, the shortest first.

    prompts: token ids, as a row of training begins; base, lora: the trees of the model, `lora` {}
    where it has no adapters. At most `new` tokens, the last of which is one of `stops` if one was
    chosen. `rows` prompts at a time, a multiple of the devices that share the rows of a batch.
    What is drawn for a prompt depends on the seed and the prompt's place, not on its batch.

    Raises UserError for an empty prompt and for settings out of range.
    """
    require_usable(new, sampling)
    fields = {k: getattr(model, k) for k in model.__dataclass_fields__ if k not in _LINEN}
    decoder = _Decoder(**fields)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), rows):
        places = order[start : start + rows]
        # The last batch is filled up with its last prompt.
        chosen = places + [places[-1]] * (rows - len(places))
        lengths = np.array([len(prompts[i]) for i in chosen], np.int32)
        if not lengths.min():
            raise UserError(f"prompt {places[int(lengths.argmin())]} is empty: expected a token")
        tokens = np.zeros((rows, -(-lengths.max() // WIDTH) * WIDTH), np.int32)
        for row, i in zip(tokens, chosen, strict=True):
            row[: len(prompts[i])] = prompts[i]
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), np.array(chosen))
        given = (tokens, lengths, keys, np.asarray(stops, np.int32))
        out = jax.device_get(_continued(decoder, base, lora, *given, new=new, sampling=sampling))
        for i, row in zip(places, out, strict=False):
            yield i, row[row >= 0]


_LINEN = ("parent", "name")  # a module's own fields beside these
