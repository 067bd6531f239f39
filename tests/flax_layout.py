"""Tiny Gemma models in the layout of the official Flax checkpoints, from numpy alone.

test_orbax.py loads them here and make_flax_goldens.py runs the gemma package on them: both start
from the weights of tiny.py, rearranged below without the package's own mapping.
"""

from unittest import mock

import numpy as np
import tiny

_QUERY = {"query_pre_attn_scalar": 8}  # hidden_size / num_attention_heads, as in the 27B models
# Name -> (config.json, is gating_einsum stored [2, F, D]).
CONFIGS = {
    "gemma": (tiny.TINY["gemma"], False),
    "gemma_mha": (tiny.TINY["gemma"] | {"num_key_value_heads": 4}, False),  # as Gemma 7B
    "gemma2": (tiny.TINY["gemma2"] | _QUERY, True),
    "gemma3": (tiny.TINY["gemma3_rope8"] | _QUERY, True),
}

Flat = dict[str, dict[str, np.ndarray]]


def weights(name: str) -> dict[str, np.ndarray]:
    """The tensors under Hugging Face's names."""
    with mock.patch.dict(tiny.TINY, {name: CONFIGS[name][0]}):
        return tiny.tiny_weights(name)


def flat(name: str) -> Flat:
    """The published form: {'transformer/layer_0/attn/q_einsum': {'w': array}}."""
    config, transposed = CONFIGS[name]
    w = weights(name)
    n, h = config["num_attention_heads"], config["head_dim"]
    out = {
        "transformer/embedder": {"input_embedding": w["model.embed_tokens.weight"]},
        "transformer/final_norm": {"scale": w["model.norm.weight"]},
    }
    post = config["model_type"] != "gemma"
    for i in range(config["num_hidden_layers"]):
        theirs, ours = f"model.layers.{i}.", f"transformer/layer_{i}/"

        def heads(x, theirs=theirs):  # [NH, D] -> [N, D, H]
            x = w[f"{theirs}self_attn.{x}_proj.weight"]
            return x.reshape(-1, h, x.shape[-1]).swapaxes(1, 2)

        q, k, v = (heads(x) for x in "qkv")
        if len(q) == len(k):
            out[f"{ours}attn/qkv_einsum"] = {"w": np.stack([q, k, v])}
        else:
            out[f"{ours}attn/q_einsum"] = {"w": q}
            out[f"{ours}attn/kv_einsum"] = {"w": np.stack([k, v])}
        o = w[f"{theirs}self_attn.o_proj.weight"]
        out[f"{ours}attn/attn_vec_einsum"] = {"w": o.T.reshape(n, h, -1)}
        gating = np.stack([w[f"{theirs}mlp.{x}_proj.weight"] for x in ("gate", "up")])
        out[f"{ours}mlp/gating_einsum"] = {"w": gating if transposed else gating.swapaxes(1, 2)}
        out[f"{ours}mlp/linear"] = {"w": w[f"{theirs}mlp.down_proj.weight"].T}
        norms = {"pre_attention_norm": "input_layernorm"}
        if post:
            norms |= {
                "post_attention_norm": "post_attention_layernorm",
                "pre_ffw_norm": "pre_feedforward_layernorm",
                "post_ffw_norm": "post_feedforward_layernorm",
            }
        else:
            norms["pre_ffw_norm"] = "post_attention_layernorm"
        if config["model_type"] == "gemma3_text":
            norms |= {"attn/_query_norm": "self_attn.q_norm", "attn/_key_norm": "self_attn.k_norm"}
        for norm, source in norms.items():
            out[f"{ours}{norm}"] = {"scale": w[f"{theirs}{source}.weight"]}
    return out


def nested(tree: Flat) -> dict:
    """The same as the gemma package saves it: nested, without 'transformer' and the MLP's 'w'."""
    out: dict = {}
    for path, leaves in tree.items():
        *parts, last = path.removeprefix("transformer/").split("/")
        place = out
        for part in parts:
            place = place.setdefault(part, {})
        place[last] = leaves["w"] if parts[-1:] == ["mlp"] else leaves
    return out


def keys(tree: Flat) -> list[str]:
    """'transformer/layer_0/attn/q_einsum/w [4, 32, 16]', sorted."""
    return sorted(
        f"{path}/{leaf} {list(x.shape)}"
        for path, leaves in tree.items()
        for leaf, x in leaves.items()
    )
