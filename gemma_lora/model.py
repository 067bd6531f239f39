"""The decoder: one homogeneous scan over layers, adapters attached through `wrap`.

Letters as in layers.py. Variable collections: 'params' holds the base weights, 'lora' what `wrap`
adds, two trees with the same paths; every leaf under layers/ is stacked on a leading L axis.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gemma_lora.arch import Arch
from gemma_lora.attention import attention, choose
from gemma_lora.errors import require_name
from gemma_lora.layers import (
    MLP,
    QUANTIZE,
    Attend,
    Attention,
    Einsum,
    RMSNorm,
    rope_table,
)
from gemma_lora.sharding import split_rows

Wrap = Callable[[Einsum, str], nn.Module]

# What the backward finds saved from the forward. 'matmuls' saves the result of every base matrix
# product that the backward needs and what an adapter has between its two, so that none runs twice
# (but DoRA's products of dropped inputs); attention, which multiplies activations alone, runs
# again, and so does all element-wise work.
# 'offload' saves the same and keeps one of the two widest in the host's memory: a third to a half
# of all that is saved, for rows that cannot be cut into micro-batches and a fast way to the host.
REMAT: dict[str, Any] = {
    "none": None,
    "matmuls": jax.checkpoint_policies.save_only_these_names(
        "q", "k", "v", "o", "gate", "up", "down", "inner"
    ),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=["q", "k", "v", "o", "gate", "down", "inner"],
        names_which_can_be_offloaded=["up"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def no_wrap(einsum: Einsum, path: str) -> nn.Module:
    """The base model: no adapter anywhere."""
    return einsum


class Block(nn.Module):
    """One decoder layer: x [B,T,D] -> x [B,T,D], both in `dtype`."""

    arch: Arch
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    wrap: Wrap
    quantize: str
    mesh: Mesh | None
    attention: str

    @nn.compact
    def __call__(self, x, is_local, rope, segments):
        attend = functools.partial(
            attention,
            self.attention,
            segments=segments,
            is_local=is_local,
            window=self.arch.window,
            softcap=self.arch.attn_softcap,
            dtype=self.dtype,
            mesh=self.mesh,
        )
        return self.layer(x, is_local, rope, attend), None

    def layer(self, x: jax.Array, is_local: jax.Array, rope: jax.Array, attend: Attend):
        """The layer, whichever way its positions attend; called within a compact method."""
        a = self.arch

        def norm(name, y):
            return RMSNorm("D", a.embed, a.eps, a.norm_plus_one, name=name)(y)

        # Local and global layers differ in RoPE and in what a position sees.
        rope = jnp.where(is_local, rope[0], rope[1]) if a.window else rope[1]
        common = (a, self.dtype, self.param_dtype, self.wrap, self.quantize, self.mesh)
        y = Attention(*common, name="attn")(norm("pre_attn_norm", x), rope, attend)
        if a.post_norms:
            y = norm("post_attn_norm", y)
        x = split_rows((x + y).astype(self.dtype), self.mesh)
        y = MLP(*common, name="mlp")(norm("pre_mlp_norm", x))
        if a.post_norms:
            y = norm("post_mlp_norm", y)
        return split_rows((x + y).astype(self.dtype), self.mesh)


class Transformer(nn.Module):
    """tokens, segments, positions [B,T] int32 -> final hidden states [B,T,D] in `dtype`.

    Segment 0 is padding; a position sees only its own segment. Dropout of adapters is on exactly
    when `apply` is given a 'dropout' rng.
    """

    arch: Arch
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    wrap: Wrap = no_wrap
    remat: str = "none"
    unroll: bool = False
    quantize: str = ""  # a name of layers.QUANTIZE: base matrices in fewer bits
    mesh: Mesh | None = None  # the devices that share the rows of a batch; None: one
    attention: str = "auto"  # a name of attention.NAMES

    @nn.compact
    def __call__(self, tokens: jax.Array, segments: jax.Array, positions: jax.Array) -> jax.Array:
        require_name("remat", self.remat, REMAT)
        require_name("quantize", self.quantize, ("", *QUANTIZE))
        x, rope = self.start(tokens, positions)
        how, _ = choose(self.attention, self.arch, self.dtype, tokens.shape[1], self.mesh)
        block = Block
        if self.remat != "none":
            block = nn.remat(block, policy=REMAT[self.remat], prevent_cse=self.unroll)
        layers = self.stack(block, how, (0, nn.broadcast, nn.broadcast))
        x, _ = layers(x, jnp.asarray(self.arch.is_local), rope, segments)
        return self.end(x)

    def start(self, tokens: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What the first layer takes: x [B,T,D], and RoPE's tables of local and global layers."""
        a = self.arch
        table = self.embedding("embed")
        x = jnp.take(jax.lax.stop_gradient(table), tokens, axis=0).astype(self.dtype)
        x = split_rows(x, self.mesh)
        if a.scale_embed:
            # Hugging Face rounds sqrt(D) to the weights' dtype before multiplying.
            x = x * jnp.asarray(a.embed**0.5, self.dtype)
        if not a.tied:
            self.embedding("head")  # read by head_weight(), declared here for init
        rope = jnp.stack(
            [
                rope_table(positions, a.head_dim, a.rope_local_base, 1.0),
                rope_table(positions, a.head_dim, a.rope_base, a.rope_factor),
            ]
        )
        return x, rope

    def stack(self, block: type[nn.Module], attention: str, in_axes: tuple[Any, ...]) -> nn.Module:
        """All layers as one scan of `block`, whose arguments behind the carry have these axes."""
        a = self.arch
        scanned = nn.scan(
            block,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=in_axes,
            length=a.layers,
            unroll=a.layers if self.unroll else 1,
            metadata_params={nn.PARTITION_NAME: "L"},
        )
        common = (a, self.dtype, self.param_dtype, self.wrap, self.quantize, self.mesh)
        return scanned(*common, attention, name="layers")

    def end(self, x: jax.Array) -> jax.Array:
        """The last layer's x [B,T,D] -> final hidden states in `dtype`."""
        a = self.arch
        x = RMSNorm("D", a.embed, a.eps, a.norm_plus_one, name="final_norm")(x)
        return x.astype(self.dtype)

    def embedding(self, name: str) -> jax.Array:
        """A [V,D] table, random at a scale that keeps the logits of a random model near 1."""
        shape = (self.arch.vocab, self.arch.embed)
        init = nn.initializers.normal(self.arch.embed**-0.5)
        init = nn.with_logical_partitioning(init, ("V", "D"))
        return Table(shape, init, self.param_dtype, name=name)()

    def abstract(self) -> dict[str, Any]:
        """Shapes, dtypes and axis names of every variable, without allocating anything."""
        return _abstract(self)


class Table(nn.Module):
    """One [V,D] array named 'w'."""

    shape: tuple[int, int]
    init_fn: Callable
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self) -> jax.Array:
        return self.param("w", self.init_fn, self.shape, self.param_dtype)


@functools.lru_cache(8)  # a start asks several times, of one or two models
def _abstract(model: Transformer) -> dict[str, Any]:
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), token, token, token)


def head_weight(params: dict[str, Any], arch: Arch) -> jax.Array:
    """The [V,D] matrix that turns hidden states into logits."""
    return params["embed" if arch.tied else "head"]["w"]


def logits(hidden: jax.Array, head: jax.Array, arch: Arch, dtype: jnp.dtype) -> jax.Array:
    """[B,T,D], [V,D] -> [B,T,V] float32, soft-capped where the model is.

    For tests, verification and short prompts; training and evaluation use loss.token_stats, which
    never holds this array.
    """
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    z = jnp.einsum(
        "BTD,VD->BTV",
        hidden.astype(dtype),
        head.astype(dtype),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    return jnp.tanh(z / arch.final_softcap) * arch.final_softcap if arch.final_softcap else z
