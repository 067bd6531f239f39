"""Official Gemma checkpoints in Flax's layout, read leaf by leaf through orbax.

The published directories hold a flat dictionary ('transformer/layer_0/attn/q_einsum' -> 'w'); the
gemma package saves the nested tree of the same names without 'transformer'. Both become one set of
names, 'layer_0/attn/q_einsum/w'. Source: gm/ckpts/_checkpoint.py and _compat.py of that package.
"""

import pathlib
import re
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from gemma_lora.errors import UserError

_METADATA = "_METADATA"
_EMBEDDING = "embedder/input_embedding"
_VISION = ("SigLiPFromPatches_0/", "vision_encoder/", "embedder/mm_")


def find(directory: pathlib.Path) -> pathlib.Path:
    """The checkpoint: the directory itself, or the one in it (Kaggle: beside tokenizer.model)."""
    found = [p.parent for p in (*directory.glob(_METADATA), *directory.glob(f"*/{_METADATA}"))]
    if len(found) != 1:
        there = ", ".join(sorted(p.name for p in found)) or "none"
        raise UserError(f"{directory}: expected one orbax checkpoint, found {there}")
    return found[0]


class Orbax:
    """Tensors of one checkpoint; `read` restores a single leaf. Names as in mapping's form 'flax'.

    `vision` counts the tensors of image parts, which are left out. Raises UserError for a directory
    that orbax cannot read.
    """

    def __init__(self, directory: pathlib.Path):
        self._directory = directory.absolute()
        self._rows: int | None = None
        self.vision = 0
        try:
            tree = ocp.PyTreeCheckpointer().metadata(self._directory).item_metadata.tree
            leaves = jax.tree_util.tree_leaves_with_path(tree)
            self._where = {}
            for path, leaf in leaves:
                keys = tuple(k.key for k in path)
                name = "/".join(keys).removeprefix("transformer/")
                name = re.sub("(mlp/(linear|gating_einsum))$", r"\1/w", name)
                if name.startswith(_VISION):
                    self.vision += 1
                else:
                    self._where[name] = (keys, tuple(leaf.shape))
        except (AttributeError, KeyError, OSError, TypeError, ValueError) as e:
            raise UserError(f"{directory} is no readable orbax checkpoint: {e}") from e

    def names(self) -> list[str]:
        return list(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        shape = self._where[name][1]
        return (self._rows, *shape[1:]) if name == _EMBEDDING and self._rows else shape

    def read(self, name: str) -> np.ndarray:
        keys, _ = self._where[name]
        item: Any = 0
        how: Any = ocp.RestoreArgs(restore_type=np.ndarray)
        for key in reversed(keys):
            item, how = {key: item}, {key: how}
        args = ocp.args.PyTreeRestore(item=item, restore_args=how, partial_restore=True)
        try:
            found = ocp.PyTreeCheckpointer().restore(self._directory, args=args)
        except (OSError, ValueError) as e:
            raise UserError(f"{self._directory}: {name} cannot be read: {e}") from e
        (leaf,) = jax.tree.leaves(found)
        return leaf[: self._rows] if name == _EMBEDDING else leaf

    def keep_rows(self, rows: int) -> int:
        """Shows the embedding's first `rows` rows; the number that there are, if they are fewer.

        The published tables of Gemma 1 and 2 have 128 rows after the last word; those of Gemma 3
        lack the 64 that transformers adds for images.
        """
        self._rows = min(rows, self._where[_EMBEDDING][1][0])
        return self._rows

    def facts(self) -> dict[str, Any]:
        """The fields of Arch that the names and shapes tell.

        Raises UserError where the tensors are not those of a Gemma model.
        """
        try:
            heads, head_dim, embed = self._where["layer_0/attn/attn_vec_einsum/w"][1]
            hidden, _ = self._where["layer_0/mlp/linear/w"][1]
            fused = self._where.get("layer_0/attn/qkv_einsum/w")
            kv_heads = heads if fused else self._where["layer_0/attn/kv_einsum/w"][1][1]
            self._where[_EMBEDDING]
        except (KeyError, ValueError) as e:
            raise UserError(
                f"{self._directory} is no Gemma checkpoint: expected {e} among its tensors, "
                f"got {', '.join(sorted(self._where)[:4])}, ..."
            ) from None
        layers = {n.split("/")[0] for n in self._where if n.startswith("layer_")}
        return {
            "layers": len(layers),
            "embed": embed,
            "hidden": hidden,
            "heads": heads,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "post_norms": "layer_0/post_attention_norm/scale" in self._where,
            "qk_norm": "layer_0/attn/_query_norm/scale" in self._where,
        }
