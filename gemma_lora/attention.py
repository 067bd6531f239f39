"""Attention: what a position sees, the reference, and the implementations a platform may take.

Letters as in layers.py. All take q [B,T,N,H] (already scaled) and k [B,T,K,H] in float32 and v
[B,T,K,H], with segments [B,T] or the mask [B,T,S] that is made of them, and give
softmax(softcap(q k^T)) v over grouped heads, [B,T,N,H] in float32; cudnn knows no soft-cap.
"""

import collections
import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gemma_lora.arch import Arch
from gemma_lora.errors import UserError, require_name
from gemma_lora.layers import dot
from gemma_lora.sharding import spec

NAMES = ("auto", "reference", "block", "splash", "cudnn")

# Queries of one block. On a CPU, against the reference, forward and backward of Gemma 3 270M's
# attention take 0.85 of the time at 256 tokens, 0.55 at 1,024 and 0.53 at 2,048 (0.32 in a window
# of 512); blocks of 256 and 512 queries take longer.
BLOCK = 128


def choose(
    name: str, arch: Arch, dtype: jnp.dtype, length: int, mesh: Mesh | None
) -> tuple[str, str]:
    """(implementation, why it is a fallback or '') for a config's `attention` and rows of length T.

    Raises UserError for an unknown name, and where the implementation asked for cannot be used.
    """
    require_name("attention", name, NAMES)
    device = (mesh.devices.flat if mesh else jax.devices())[0]
    platform = device.platform
    half = "it multiplies in bfloat16, and dtype is float32" if dtype == jnp.float32 else ""
    against = {
        "reference": "",
        "block": "",
        "splash": f"it is a TPU kernel, and this is {platform}" if platform != "tpu" else half,
        "cudnn": f"it is a GPU kernel, and this is {platform}"
        if platform != "gpu"
        else half or _against_cudnn(arch, length, device, mesh),
    }
    if name != "auto":
        if against[name]:
            raise UserError(f"attention {name!r} cannot be used here: {against[name]}")
        return name, ""
    general = "block" if length > BLOCK else "reference"
    if platform == "cpu":
        return general, ""
    best = "splash" if platform == "tpu" else "cudnn"
    return (general, f"not {best}: {against[best]}") if against[best] else (best, "")


def chosen(
    name: str, arch: Arch, dtype: jnp.dtype, lengths: Iterable[int], mesh: Mesh | None
) -> str:
    """What `choose` gives for rows of these lengths, in words."""
    found = collections.defaultdict(list)
    for length in sorted(set(lengths)):
        found[", ".join(filter(None, choose(name, arch, dtype, length, mesh)))].append(str(length))
    if len(found) == 1:
        return next(iter(found))
    return "; ".join(f"{said} (rows of {', '.join(t)})" for said, t in found.items())


def _against_cudnn(arch: Arch, length: int, device: jax.Device, mesh: Mesh | None) -> str:
    """The limits of jax.nn.dot_product_attention(implementation='cudnn')."""
    capability = str(device.compute_capability)
    if not capability[:1].isdigit():
        return f"it needs an NVIDIA GPU, and this is {capability}"
    # A backward of 256 is certain on Hopper alone: cuDNN brought it to later GPUs late, or not at
    # all, and one that is missing would be found when the program is compiled.
    most = 256 if capability.partition(".")[0] == "9" else 128
    if arch.attn_softcap:
        return "it has no soft-cap"
    if arch.head_dim > most or arch.head_dim % 8:
        return f"its head dim is at most {most} and a multiple of 8, and this is {arch.head_dim}"
    tensor = mesh.shape["tensor"] if mesh else 1
    if arch.kv_heads % tensor:
        return f"mesh tensor={tensor} does not divide the {arch.kv_heads} key heads"
    # One position, as the model's init has it, takes no backward.
    return f"its rows are of even length, and this is {length}" if length % 2 and length > 1 else ""


def attention(
    how: str,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array,
    is_local: jax.Array,
    *,
    window: int,
    softcap: float,
    dtype: jnp.dtype,
    mesh: Mesh | None,
) -> jax.Array:
    """The attention of one layer by the implementation `how`.

    A position sees earlier positions of its own segment and itself; where the layer `is_local`
    (a traced bool), fewer than `window` positions back.
    """
    length = q.shape[1]
    if how in ("reference", "cudnn"):
        back = jnp.where(is_local, window, length) if 0 < window < length else length
        mask = attention_mask(segments, back)
        if how == "cudnn":
            return cudnn(q, k, v, mask, dtype)
        return reference(q, k, v, mask, softcap, dtype)

    def of(back: int):
        if how == "block":
            return functools.partial(block, back=back, softcap=softcap, dtype=dtype)
        return functools.partial(splash, back=back, softcap=softcap, dtype=dtype, mesh=mesh)

    # These skip what the window hides, so it must be static: one branch a kind of layer.
    if 0 < window < length:
        return jax.lax.cond(is_local, of(window), of(length), q, k, v, segments)
    return of(length)(q, k, v, segments)


def attention_mask(
    segments: jax.Array,
    back: int | jax.Array,
    queries: slice = slice(None),
    keys: slice = slice(None),
) -> jax.Array:
    """[B,T] segment ids (0 is padding) -> bool [B,queries,keys]: causal, same segment, and fewer
    than `back` positions back. Every position sees itself, so no row is empty."""
    at = jnp.arange(segments.shape[1])
    i, j = at[queries, None], at[None, keys]
    same = segments[:, queries, None] == segments[:, None, keys]
    return (j <= i) & (j > i - back) & same


def reference(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, softcap: float, dtype: jnp.dtype
) -> jax.Array:
    """The definition, with a mask [B,T,S] of what each position sees."""
    batch, length, heads, head_dim = q.shape
    q = q.reshape(batch, length, k.shape[2], heads // k.shape[2], head_dim)
    logits = dot("BTKGH,BSKH->BKGTS", q, k, dtype, False)
    if softcap:
        logits = jnp.tanh(logits / softcap) * softcap
    logits = jnp.where(mask[:, None, None], logits, jnp.finfo(jnp.float32).min)
    probs = jax.nn.softmax(logits, axis=-1)
    out = dot("BKGTS,BSKH->BTKGH", probs, v, dtype, False)
    return out.reshape(batch, length, heads, head_dim)


def block(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array,
    *,
    back: int,
    softcap: float,
    dtype: jnp.dtype,
) -> jax.Array:
    """The reference for blocks of queries, each with the keys it can reach and no others.

    The backward computes the probabilities of a block again; they are never held for all blocks.
    """

    @functools.partial(jax.checkpoint, static_argnums=(0, 1))
    def part(queries: slice, keys: slice, q, k, v, segments):
        mask = attention_mask(segments, back, queries, keys)
        return reference(q[:, queries], k[:, keys], v[:, keys], mask, softcap, dtype)

    length = q.shape[1]
    size = max(BLOCK, -(-length // 8))  # at most 8 parts, as each is compiled on its own
    parts = []
    for start in range(0, length, size):
        stop = min(start + size, length)
        keys = slice(max(0, start - back + 1), stop)
        parts.append(part(slice(start, stop), keys, q, k, v, segments))
    return jnp.concatenate(parts, axis=1)


def splits_heads(kv_heads: int, tensor: int) -> bool:
    """Does splash split heads over `tensor` devices: where each then has the keys of its own."""
    return kv_heads == 1 or kv_heads % tensor == 0


def splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array,
    *,
    back: int,
    softcap: float,
    dtype: jnp.dtype,
    mesh: Mesh | None,
    interpret: bool = False,
) -> jax.Array:
    """JAX's flash attention for TPU, each device on its own rows and heads.

    It skips blocks of keys that causality or the window hides, and holds no [T,S] array.
    """
    # A quarter of a second, which other platforms need not spend.
    from jax.experimental.pallas.ops.tpu import splash_attention as pallas

    length = q.shape[1]
    lanes = 128  # the kernel's blocks are multiples of it
    whole = -(-length // lanes) * lanes
    # As large as divides the rows: fewer, larger blocks keep the matrix units busier.
    size = next(n for n in (512, 256, lanes) if whole % n == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes = pallas.BlockSizes(**{f"block_{n}": size for n in names})
    mask = (
        pallas.CausalMask((whole, whole))
        if back >= length
        else pallas.LocalMask((whole, whole), (back - 1, 0), 0)
    )

    def local(q, k, v, segments):
        kernel = pallas.make_splash_mha(
            pallas.MultiHeadMask([mask] * q.shape[1]),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            attn_logits_soft_cap=softcap or None,
            interpret=interpret,
        )
        return jax.vmap(kernel)(q, k, v, pallas.SegmentIds(segments, segments))

    # Rows added behind the others are seen by none of them.
    q, k, v = (
        jnp.pad(x.astype(dtype), ((0, 0), (0, whole - length), (0, 0), (0, 0))).swapaxes(1, 2)
        for x in (q, k, v)
    )
    segments = jnp.pad(segments, ((0, 0), (0, whole - length)))
    if mesh is not None and mesh.size > 1:
        split = splits_heads(k.shape[1], mesh.shape["tensor"])
        of_q = spec(("B", "N" if split else None, None, None), q.shape, mesh)
        of_k = spec(("B", "K", None, None), k.shape, mesh) if split else of_q
        rows = spec(("B", None), segments.shape, mesh)
        # The kernel does not say over which axes its results vary, hence check_vma.
        local = jax.shard_map(
            local, mesh=mesh, in_specs=(of_q, of_k, of_k, rows), out_specs=of_q, check_vma=False
        )
    out = local(q, k, v, segments)
    return out.swapaxes(1, 2)[:, :length].astype(jnp.float32)


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """cuDNN's flash attention through JAX; the mask [B,T,S] is held, the logits are not."""
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    out = jax.nn.dot_product_attention(
        q, k, v, mask=mask[:, None], scale=1.0, is_causal=True, implementation="cudnn"
    )
    return out.astype(jnp.float32)
