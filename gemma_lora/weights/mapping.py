"""Named tensors of a checkpoint -> our parameter tree, exactly or loudly.

Every checkpoint format names the same matrices; NAMES is the only place that knows the names. A
linear weight is stored [out, in] by Hugging Face and GGUF; ours is [in..., out...], which is
`source.T.reshape(ours)` for every projection.
"""

import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np

from gemma_lora.arch import Arch
from gemma_lora.errors import UserError, nearest


class Tensors(Protocol):
    """A checkpoint: names, shapes without reading, and one tensor at a time."""

    def names(self) -> list[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def read(self, name: str) -> np.ndarray: ...


# our path: (Hugging Face name, GGUF name); {i} is the layer.
NAMES: dict[str, tuple[str, str]] = {
    "embed/w": ("model.embed_tokens.weight", "token_embd.weight"),
    "head/w": ("lm_head.weight", "output.weight"),
    "final_norm/scale": ("model.norm.weight", "output_norm.weight"),
    **{
        f"layers/{module}/{ours}_proj/{leaf}": (
            f"model.layers.{{i}}.{theirs}.{ours}_proj.{suffix}",
            f"blk.{{i}}.{gguf}.{suffix}",
        )
        for module, theirs, ours, gguf in (
            ("attn", "self_attn", "q", "attn_q"),
            ("attn", "self_attn", "k", "attn_k"),
            ("attn", "self_attn", "v", "attn_v"),
            ("attn", "self_attn", "o", "attn_output"),
            ("mlp", "mlp", "gate", "ffn_gate"),
            ("mlp", "mlp", "up", "ffn_up"),
            ("mlp", "mlp", "down", "ffn_down"),
        )
        for leaf, suffix in (("w", "weight"), ("b", "bias"))
    },
    "layers/attn/q_norm/scale": (
        "model.layers.{i}.self_attn.q_norm.weight",
        "blk.{i}.attn_q_norm.weight",
    ),
    "layers/attn/k_norm/scale": (
        "model.layers.{i}.self_attn.k_norm.weight",
        "blk.{i}.attn_k_norm.weight",
    ),
    "layers/pre_attn_norm/scale": (
        "model.layers.{i}.input_layernorm.weight",
        "blk.{i}.attn_norm.weight",
    ),
    "layers/pre_mlp_norm/scale": (
        "model.layers.{i}.post_attention_layernorm.weight",
        "blk.{i}.ffn_norm.weight",
    ),
}
# Where there are norms after each half, the name post_attention_layernorm means one of those.
NAMES_POST_NORMS: dict[str, tuple[str, str]] = NAMES | {
    "layers/post_attn_norm/scale": (
        "model.layers.{i}.post_attention_layernorm.weight",
        "blk.{i}.post_attention_norm.weight",
    ),
    "layers/pre_mlp_norm/scale": (
        "model.layers.{i}.pre_feedforward_layernorm.weight",
        "blk.{i}.ffn_norm.weight",
    ),
    "layers/post_mlp_norm/scale": (
        "model.layers.{i}.post_feedforward_layernorm.weight",
        "blk.{i}.post_ffw_norm.weight",
    ),
}
FORMATS = ("hf", "gguf")


def names(arch: Arch, form: str) -> dict[str, str]:
    """our path -> the format's name pattern, for an arch."""
    table = NAMES_POST_NORMS if arch.post_norms else NAMES
    return {ours: theirs[FORMATS.index(form)] for ours, theirs in table.items()}


def flatten(tree: dict[str, Any]) -> dict[str, Any]:
    """{'layers': {'attn': {...}}} -> {'layers/attn/q_proj/w': leaf}."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(k.key for k in path): leaf for path, leaf in leaves}


def load(
    tensors: Tensors, form: str, arch: Arch, shapes: dict[str, Any], shardings: dict[str, Any]
) -> dict[str, Any]:
    """Puts a checkpoint on the devices, leaf by leaf, reading only what this host needs.

    shapes: tree of ShapeDtypeStruct (the dtype is the one to store); shardings: the same tree.
    Raises UserError naming every unknown, missing or misshapen tensor before anything is read.
    """
    flat = flatten(shapes)
    table = {ours: name for ours, name in names(arch, form).items() if ours in flat}
    assert table.keys() == flat.keys(), f"NAMES lacks {flat.keys() - table.keys()}"
    _check(tensors, table, flat, arch)
    plus_one = form == "gguf" and arch.norm_plus_one  # GGUF stores 1 + w
    # One device after another asks for its slice of the embedding, which GGUF dequantises whole.
    read = functools.lru_cache(maxsize=1)(tensors.read)

    def leaf(ours: str, name: str, shape: jax.ShapeDtypeStruct, sharding) -> jax.Array:
        convert = _converter(ours, plus_one)

        def block(index: tuple[slice, ...]) -> np.ndarray:
            if "{i}" not in name:
                return convert(read(name), shape.shape)[index].astype(shape.dtype)
            extent = [len(range(*s.indices(n))) for s, n in zip(index, shape.shape, strict=True)]
            out = np.empty(extent, shape.dtype)
            for row, i in zip(out, range(*index[0].indices(shape.shape[0])), strict=True):
                row[...] = convert(read(name.format(i=i)), shape.shape[1:])[index[1:]]
            return out

        return jax.make_array_from_callback(shape.shape, sharding, block, dtype=shape.dtype)

    leaves = [
        leaf(ours, table[ours], shape, sharding)
        for (ours, shape), sharding in zip(flat.items(), jax.tree.leaves(shardings), strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def _converter(ours: str, plus_one: bool) -> Callable[[np.ndarray, tuple[int, ...]], np.ndarray]:
    """A stored tensor -> one of our shape; views where possible, so that only used pages load."""
    if ours.startswith("layers/") and ours.endswith("_proj/w"):
        return lambda x, shape: x.T.reshape(shape)
    if ours.endswith("/scale") and plus_one:
        return lambda x, shape: x - np.float32(1)
    return lambda x, shape: x.reshape(shape)


def _stored_shape(ours: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in which a checkpoint holds one layer of our leaf."""
    if not ours.startswith("layers/"):
        return shape
    shape = shape[1:]
    if ours.endswith("_proj/b"):
        return (int(np.prod(shape)),)
    if not ours.endswith("_proj/w"):
        return shape
    if ours.endswith("o_proj/w"):
        return (shape[-1], int(np.prod(shape[:-1])))
    return (int(np.prod(shape[1:])), shape[0])


def _check(tensors: Tensors, table: dict[str, str], flat: dict[str, Any], arch: Arch) -> None:
    expected = {}
    for ours, name in table.items():
        stored = _stored_shape(ours, flat[ours].shape)
        for i in range(arch.layers) if "{i}" in name else (None,):
            expected[name.format(i=i)] = stored
    got = tensors.names()
    if len(set(got)) != len(got):
        twice = sorted({n for n in got if got.count(n) > 1})
        raise UserError(f"the checkpoint holds tensors twice: {_some(twice)}")
    # A tied head may be written out as well; it is the embedding table again.
    extra = (
        set(got) - expected.keys() - ({"lm_head.weight", "output.weight"} if arch.tied else set())
    )
    missing = expected.keys() - set(got)
    if missing or extra:
        hint = ""
        if missing and extra:
            hint = f"; the first missing one: {nearest(min(missing), extra)}"
        raise UserError(
            f"the checkpoint is not this model: {len(missing)} tensors missing "
            f"({_some(sorted(missing))}), {len(extra)} unknown ({_some(sorted(extra))}){hint}"
        )
    wrong = [
        f"{n} is {list(tensors.shape(n))}, expected {list(shape)}"
        for n, shape in expected.items()
        if tuple(tensors.shape(n)) != tuple(shape)
    ]
    if wrong:
        raise UserError(
            f"{len(wrong)} tensors of the checkpoint have a wrong shape: {_some(wrong)}"
        )


def _some(items: list[str]) -> str:
    return ", ".join(items[:4]) + (", ..." if len(items) > 4 else "") if items else "none"
