"""Named tensors of a checkpoint -> our parameter tree, exactly or loudly.

Every format holds the same matrices under its own names and in its own axis orders. FORMS is the
only place that knows them; the axes are the letters of layers.py, so a conversion is written
nowhere: it follows from the stored letters and ours.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from gemma_lora.arch import Arch
from gemma_lora.errors import UserError, nearest
from gemma_lora.model import Transformer


class Tensors(Protocol):
    """A checkpoint: names, shapes without reading, and one tensor at a time."""

    def names(self) -> list[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def read(self, name: str) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Stored:
    """How a format holds one of our leaves, one layer of it.

    letters: the stored axes in order. '(NH)D' has N and H flattened to one axis; 'DF|FD' is one or
    the other, as the shape tells.
    """

    name: str  # {i} is the layer
    letters: str
    part: tuple[int, int] | None = None  # (i, n): entry i of a leading axis of n fused matrices
    plus: float = 0.0  # what the format has added to our values


# ---- the formats ----------------------------------------------------------------------------

# our module: (Hugging Face, GGUF, letters of its weight). PyTorch's order: a matrix is [out, in].
_TORCH: dict[str, tuple[str, str, str]] = {
    "embed": ("model.embed_tokens", "token_embd", "VD"),
    "head": ("lm_head", "output", "VD"),
    "final_norm": ("model.norm", "output_norm", "D"),
    **{
        f"layers/{ours}": (f"model.layers.{{i}}.{hf}", f"blk.{{i}}.{gguf}", letters)
        for ours, hf, gguf, letters in (
            ("attn/q_proj", "self_attn.q_proj", "attn_q", "(NH)D"),
            ("attn/k_proj", "self_attn.k_proj", "attn_k", "(KH)D"),
            ("attn/v_proj", "self_attn.v_proj", "attn_v", "(KH)D"),
            ("attn/o_proj", "self_attn.o_proj", "attn_output", "D(NH)"),
            ("attn/q_norm", "self_attn.q_norm", "attn_q_norm", "H"),
            ("attn/k_norm", "self_attn.k_norm", "attn_k_norm", "H"),
            ("mlp/gate_proj", "mlp.gate_proj", "ffn_gate", "FD"),
            ("mlp/up_proj", "mlp.up_proj", "ffn_up", "FD"),
            ("mlp/down_proj", "mlp.down_proj", "ffn_down", "DF"),
            ("pre_attn_norm", "input_layernorm", "attn_norm", "D"),
            ("post_attn_norm", "post_attention_layernorm", "post_attention_norm", "D"),
            ("pre_mlp_norm", "pre_feedforward_layernorm", "ffn_norm", "D"),
            ("post_mlp_norm", "post_feedforward_layernorm", "post_ffw_norm", "D"),
        )
    },
}


def _torch(column: int) -> dict[str, Stored]:
    rows = {}
    for module, (*names, letters) in _TORCH.items():
        rows[f"{module}/w"] = Stored(f"{names[column]}.weight", letters)
        rows[f"{module}/scale"] = rows[f"{module}/w"]
        if letters.startswith("("):
            rows[f"{module}/b"] = Stored(f"{names[column]}.bias", letters.split(")")[0] + ")")
    return rows


def _hf(arch: Arch) -> dict[str, Stored]:
    rows = _torch(0)
    if not arch.post_norms:  # then post_attention_layernorm is the norm before the MLP
        rows["layers/pre_mlp_norm/scale"] = rows["layers/post_attn_norm/scale"]
    return rows


def _gguf(arch: Arch) -> dict[str, Stored]:
    one = float(arch.norm_plus_one)  # GGUF stores 1 + w where the model multiplies by that
    return {
        ours: dataclasses.replace(row, plus=one) if ours.endswith("/scale") else row
        for ours, row in _torch(1).items()
    }


def _flax(arch: Arch) -> dict[str, Stored]:
    """Official Gemma checkpoints; names as orbax.py normalises them.

    Source: gm/nn/_modules.py of the gemma package, and its config.transpose_gating_einsum.
    """
    at = "layer_{i}/"
    if arch.heads == arch.kv_heads:
        q, k, v = (
            Stored(f"{at}attn/qkv_einsum/w", letters, (j, 3))
            for j, letters in enumerate(("NDH", "KDH", "KDH"))
        )
    else:
        q = Stored(f"{at}attn/q_einsum/w", "NDH")
        k, v = (Stored(f"{at}attn/kv_einsum/w", "KDH", (j, 2)) for j in range(2))
    gate, up = (Stored(f"{at}mlp/gating_einsum/w", "DF|FD", (j, 2)) for j in range(2))
    return {
        "embed/w": Stored("embedder/input_embedding", "VD"),
        "final_norm/scale": Stored("final_norm/scale", "D"),
        "layers/attn/q_proj/w": q,
        "layers/attn/k_proj/w": k,
        "layers/attn/v_proj/w": v,
        "layers/attn/o_proj/w": Stored(f"{at}attn/attn_vec_einsum/w", "NHD"),
        "layers/attn/q_norm/scale": Stored(f"{at}attn/_query_norm/scale", "H"),
        "layers/attn/k_norm/scale": Stored(f"{at}attn/_key_norm/scale", "H"),
        "layers/mlp/gate_proj/w": gate,
        "layers/mlp/up_proj/w": up,
        "layers/mlp/down_proj/w": Stored(f"{at}mlp/linear/w", "FD"),
        "layers/pre_attn_norm/scale": Stored(f"{at}pre_attention_norm/scale", "D"),
        "layers/post_attn_norm/scale": Stored(f"{at}post_attention_norm/scale", "D"),
        "layers/pre_mlp_norm/scale": Stored(f"{at}pre_ffw_norm/scale", "D"),
        "layers/post_mlp_norm/scale": Stored(f"{at}post_ffw_norm/scale", "D"),
    }


# our module: (name, letters of its kernel) in keras-nlp's GemmaBackbone and Gemma3Backbone.
_KERAS_GEMMA = {
    "attn/q_proj": ("attention/query", "NDH"),
    "attn/k_proj": ("attention/key", "KDH"),
    "attn/v_proj": ("attention/value", "KDH"),
    "attn/o_proj": ("attention/attention_output", "NHD"),
    "attn/q_norm": ("attention/query_norm", "H"),
    "attn/k_norm": ("attention/key_norm", "H"),
    "mlp/gate_proj": ("ffw_gating", "DF"),
    "mlp/up_proj": ("ffw_gating_2", "DF"),
    "mlp/down_proj": ("ffw_linear", "FD"),
    "pre_attn_norm": ("pre_attention_norm", "D"),
    "post_attn_norm": ("post_attention_norm", "D"),
    "pre_mlp_norm": ("pre_ffw_norm", "D"),
    "post_mlp_norm": ("post_ffw_norm", "D"),
}
# The same in its QwenBackbone.
_KERAS_QWEN = {
    "attn/q_proj": ("self_attention/query", "DNH"),
    "attn/k_proj": ("self_attention/key", "DKH"),
    "attn/v_proj": ("self_attention/value", "DKH"),
    "attn/o_proj": ("self_attention/attention_output", "NHD"),
    "mlp/gate_proj": ("feedforward_gate_dense", "DF"),
    "mlp/up_proj": ("feedforward_intermediate_dense", "DF"),
    "mlp/down_proj": ("feedforward_output_dense", "FD"),
    "pre_attn_norm": ("self_attention_layernorm", "D"),
    "pre_mlp_norm": ("feedforward_layernorm", "D"),
}


def _keras(block: str, table: dict[str, tuple[str, str]], final: str) -> dict[str, Stored]:
    rows = {
        "embed/w": Stored("token_embedding/embeddings", "VD"),
        "head/w": Stored("token_embedding/reverse_embeddings", "DV"),
        "final_norm/scale": Stored(f"{final}/scale", "D"),
    }
    for module, (name, letters) in table.items():
        at = f"{block}_{{i}}/{name}"
        rows[f"layers/{module}/w"] = Stored(f"{at}/kernel", letters)
        rows[f"layers/{module}/b"] = Stored(f"{at}/bias", letters.replace("D", ""))
        rows[f"layers/{module}/scale"] = Stored(f"{at}/scale", letters)
    return rows


FORMS: dict[str, Callable[[Arch], dict[str, Stored]]] = {
    "hf": _hf,
    "gguf": _gguf,
    "flax": _flax,
    "keras_gemma": lambda _: _keras("decoder_block", _KERAS_GEMMA, "final_normalization"),
    "keras_qwen": lambda _: _keras("transformer_layer", _KERAS_QWEN, "sequence_output_layernorm"),
}


# ---- from letters to conversions ------------------------------------------------------------


@functools.cache
def leaves(arch: Arch) -> dict[str, tuple[str, tuple[int, ...]]]:
    """our path -> (axis letters, shape) of every leaf of the base model, not quantised."""
    boxed = Transformer(arch).abstract()["params"]
    found = jax.tree_util.tree_leaves_with_path(
        boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)
    )
    return {
        "/".join(k.key for k in path): ("".join(leaf.names), leaf.value.shape)
        for path, leaf in found
    }


@functools.cache
def stored(arch: Arch, form: str) -> dict[str, Stored]:
    """our path -> how the format holds it, for every leaf of the arch."""
    rows, ours = FORMS[form](arch), leaves(arch)
    if missing := ours.keys() - rows.keys():
        raise UserError(f"form {form!r} has no place for {_some(sorted(missing))} of this arch")
    return {path: rows[path] for path in ours}


def names(arch: Arch, form: str) -> dict[str, str]:
    """our path -> the format's name pattern."""
    return {ours: row.name for ours, row in stored(arch, form).items()}


def _axes(letters: str) -> list[str]:
    """'(NH)D' -> ['NH', 'D']."""
    return [group or single for group, single in re.findall(r"\((\w+)\)|(\w)", letters)]


def _shapes(row: Stored, size: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Each way in which the format may order the axes -> the shape of the stored tensor."""
    lead = row.part[1:] if row.part else ()
    return {
        way: (*lead, *(math.prod(size[c] for c in axis) for axis in _axes(way)))
        for way in row.letters.split("|")
    }


def _to_ours(x: np.ndarray, row: Stored, ours: str, size: dict[str, int]) -> np.ndarray:
    """A stored tensor -> axes `ours`; a view where nothing is added, so only used pages load."""
    stored_axes = next(way for way, shape in _shapes(row, size).items() if shape == x.shape)
    flat = "".join(_axes(stored_axes))
    x = (x[row.part[0]] if row.part else x).reshape([size[c] for c in flat])
    x = x.transpose([flat.index(c) for c in ours])
    return x - np.float32(row.plus) if row.plus else x


def _place(arch: Arch, ours: str) -> tuple[str, dict[str, int]]:
    """(our letters without L, size of each letter) of a leaf."""
    letters, shape = leaves(arch)[ours]
    return letters.removeprefix("L"), dict(zip(letters, shape, strict=True))


def read_leaf(tensors: Tensors, form: str, arch: Arch, ours: str, layer: int | None) -> np.ndarray:
    """One leaf (of one layer, where it has layers) in our shape without L, in the stored dtype."""
    row = stored(arch, form)[ours]
    return _to_ours(tensors.read(row.name.format(i=layer)), row, *_place(arch, ours))


def hf_tensor(
    arch: Arch, ours: str, array: np.ndarray, layer: int | None
) -> tuple[str, np.ndarray]:
    """(Hugging Face's name, its array) of our leaf without L: the inverse of `read_leaf`."""
    row, (letters, size) = stored(arch, "hf")[ours], _place(arch, ours)
    array = array.transpose([letters.index(c) for c in "".join(_axes(row.letters))])
    return row.name.format(i=layer), array.reshape(_shapes(row, size)[row.letters])


def flatten(tree: dict[str, Any]) -> dict[str, Any]:
    """{'layers': {'attn': {...}}} -> {'layers/attn/q_proj/w': leaf}."""
    return {
        "/".join(k.key for k in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def quantize_int8(w: np.ndarray, in_axes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(int8 of w's shape, float32 scale of the other axes): w is about q * scale.

    scale is the largest |w| over the input axes / 127, or 1 where all of them are 0.
    """
    w = w.astype(np.float32)
    largest = np.max(np.abs(w), axis=in_axes)
    scale = np.where(largest > 0, largest / np.float32(127), np.float32(1))
    return np.rint(w / np.expand_dims(scale, in_axes)).astype(np.int8), scale


# ---- loading --------------------------------------------------------------------------------


def load(
    tensors: Tensors, form: str, arch: Arch, shapes: dict[str, Any], shardings: dict[str, Any]
) -> dict[str, Any]:
    """Puts a checkpoint on the devices, layer by layer, reading only what this host needs.

    shapes: tree of ShapeDtypeStruct (the dtype is the one to store; an int8 'w' is quantised here,
    with its 'w_scale' beside it); shardings: the same tree. Beyond the model, one tensor of one
    layer at a time is in memory. Raises UserError for unknown, missing or misshapen tensors, before
    anything is read, and for one to be quantised that is not finite.
    """
    flat, where = flatten(shapes), flatten(shardings)
    table = stored(arch, form)
    _check(tensors, form, arch)
    _check_tied(tensors, form, arch)
    # One device after another asks for its slice, and fused matrices share a tensor.
    read = functools.lru_cache(maxsize=1)(tensors.read)

    def values(ours: str, i: int | None) -> dict[str, np.ndarray]:
        """The leaf and, where it is quantised, its scale."""
        row = table[ours]
        x = _to_ours(read(row.name.format(i=i)), row, *_place(arch, ours))
        if flat[ours].dtype != jnp.int8:
            return {ours: x}
        if not np.isfinite(x).all():
            raise UserError(
                f"{row.name.format(i=i)}: got a NaN or an infinity, expected finite weights to "
                "store as int8; the file may be damaged"
            )
        inputs = tuple(range(x.ndim + 1 - flat[f"{ours}_scale"].ndim))
        return dict(zip((ours, f"{ours}_scale"), quantize_int8(x, inputs), strict=True))

    out = {}
    for path, leaf in flat.items():
        if path.startswith("layers/"):
            out[path] = jnp.zeros(leaf.shape, leaf.dtype, device=where[path])
        else:
            out[path] = _put(values(path, None)[path], leaf.dtype, where[path])
    stacked = [path for path in table if path.startswith("layers/")]
    stacked.sort(key=lambda path: table[path].name)
    for i in range(arch.layers):
        for path, x in (pair for ours in stacked for pair in values(ours, i).items()):
            of_layer = NamedSharding(where[path].mesh, PartitionSpec(*where[path].spec[1:]))
            layer = _put(x, flat[path].dtype, of_layer)
            out[path] = _writer(where[path])(out[path], layer, i)
        jax.block_until_ready(out)  # or the host would run ahead of the devices, layer upon layer
    return jax.tree.unflatten(jax.tree.structure(shapes), out.values())


def _put(x: np.ndarray, dtype: Any, sharding: NamedSharding) -> jax.Array:
    """x on the devices. On a CPU it may stay where it is; a mapped file is copied, because someone
    may write to it."""
    copy = isinstance(x, np.memmap)
    return jax.make_array_from_callback(
        x.shape, sharding, lambda index: x[index].astype(dtype, copy=copy)
    )


@functools.cache
def _writer(sharding: NamedSharding) -> Callable[[jax.Array, jax.Array, int], jax.Array]:
    """(stacked [L, ...], one layer [...], i) -> stacked with layer i written in place."""
    return jax.jit(
        lambda stacked, layer, i: jax.lax.dynamic_update_index_in_dim(stacked, layer, i, 0),
        donate_argnums=0,
        out_shardings=sharding,
    )


def _check(tensors: Tensors, form: str, arch: Arch) -> None:
    expected = {}
    for ours, row in stored(arch, form).items():
        shapes = tuple(_shapes(row, _place(arch, ours)[1]).values())
        for i in range(arch.layers) if ours.startswith("layers/") else (None,):
            expected[row.name.format(i=i)] = shapes
    got = tensors.names()
    if len(set(got)) != len(got):
        twice = sorted({n for n in got if got.count(n) > 1})
        raise UserError(f"the checkpoint holds tensors twice: {_some(twice)}")
    extra = set(got) - expected.keys()
    if arch.tied and "head/w" in (rows := FORMS[form](arch)):
        # A tied head may be written out as well: _check_tied.
        extra.discard(rows["head/w"].name)
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
        f"{name} is {list(tensors.shape(name))}, expected {' or '.join(str(list(s)) for s in want)}"
        for name, want in expected.items()
        if tuple(tensors.shape(name)) not in want
    ]
    if wrong:
        raise UserError(
            f"{len(wrong)} tensors of the checkpoint have a wrong shape: {_some(wrong)}"
        )


def _check_tied(tensors: Tensors, form: str, arch: Arch) -> None:
    """A tied head that is written out must be the embedding table again."""
    rows = FORMS[form](arch)
    if not arch.tied or "head/w" not in rows or rows["head/w"].name not in tensors.names():
        return
    table, head = (rows[k] for k in ("embed/w", "head/w"))
    letters, size = _place(arch, "embed/w")
    if tuple(tensors.shape(head.name)) in _shapes(head, size).values():
        both = [_to_ours(tensors.read(row.name), row, letters, size) for row in (table, head)]
        parts = range(0, size["V"], 4096)
        if all(np.array_equal(*(x[i : i + 4096] for x in both)) for i in parts):
            return
    raise UserError(
        f"{head.name} is not {table.name}, and the model's config says that they are one "
        "(tie_word_embeddings): expected false there, or no such tensor"
    )


def _some(items: list[str]) -> str:
    return ", ".join(items[:4]) + (", ..." if len(items) > 4 else "") if items else "none"
