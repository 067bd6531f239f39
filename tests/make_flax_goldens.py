"""Makes goldens/flax_*.npz: logits that Google's gemma package computes from its own layout.

    python -m venv /tmp/gemma && /tmp/gemma/bin/pip install gemma safetensors
    cd tests && /tmp/gemma/bin/python make_flax_goldens.py

A golden holds the logits [B, T, V] (every fourth position) of flax_layout.CONFIGS[name] on
tiny.tokens(), float32; the parameters' names and shapes as the package flattens them for its
published checkpoints; a checksum of the inputs; and the package's version.
"""

import pathlib
from importlib.metadata import version

import flax_layout
import jax
import jax.numpy as jnp
import numpy as np
import tiny
from gemma import gm
from gemma.gm.ckpts import _compat
from gemma.gm.nn import _config, _modules

GOLDENS = pathlib.Path(__file__).parent / "goldens"


def model(name: str) -> gm.nn.Transformer:
    c, transposed = flax_layout.CONFIGS[name]
    kind = _modules.AttentionType
    family = c["model_type"]
    post = family != "gemma"
    pattern = {"gemma": "G", "gemma2": "LG", "gemma3_text": "LLLLLG"}[family]
    types = [kind.LOCAL_SLIDING if p == "L" else kind.GLOBAL for p in pattern]
    scale = _config.QueryPreAttentionNormalisation
    config = _config.TransformerConfig(
        num_embed=c["vocab_size"],
        embed_dim=c["hidden_size"],
        hidden_dim=c["intermediate_size"],
        num_heads=c["num_attention_heads"],
        head_dim=c["head_dim"],
        num_kv_heads=c["num_key_value_heads"],
        final_logit_softcap=c.get("final_logit_softcapping"),
        attn_logits_soft_cap=c.get("attn_logit_softcapping"),
        use_post_attn_norm=post,
        use_post_ffw_norm=post,
        use_qk_norm=family == "gemma3_text",
        attention_types=_config.make_attention_layers_types(
            tuple(types), num_layers=c["num_hidden_layers"]
        ),
        query_pre_attn_norm=scale.BY_ONE_OVER_SQRT_EMBED_DIM_DIV_NUM_HEADS
        if post
        else scale.BY_ONE_OVER_SQRT_HEAD_DIM,
        sliding_window_size=c.get("sliding_window"),
        transpose_gating_einsum=transposed,
        local_base_frequency=10_000,
        global_base_frequency=int(c["rope_theta"]),
        global_scale_factor=8.0 if c.get("rope_scaling") else 1.0,
    )
    return gm.nn.Transformer(config=config, dtype=jnp.float32)


def golden(name: str) -> dict[str, np.ndarray]:
    flat = flax_layout.flat(name)
    params = jax.tree.map(jnp.asarray, flax_layout.nested(flat))
    tokens = tiny.tokens()
    rows, length = tokens.shape
    mask = np.broadcast_to(np.tri(length, dtype=bool), (rows, length, length))
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    net = model(name)
    inputs = {"positions": jnp.asarray(positions), "attention_mask": jnp.asarray(mask)}
    made = jax.eval_shape(
        lambda: net.init(jax.random.key(0), jnp.asarray(tokens), **inputs)["params"]
    )
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, params)
    with jax.default_matmul_precision("highest"):
        out = net.apply({"params": params}, jnp.asarray(tokens), **inputs)
    names = {f"transformer/{k}": v for k, v in _compat.flatten_and_remap_params(made).items()}
    leaves = [x for leaves in flat.values() for x in leaves.values()]
    return {
        "logits": np.asarray(out.logits)[:, ::4],
        "keys": np.array(flax_layout.keys(names)),
        "checksum": np.array(tiny.checksum(tokens, *leaves)),
        "versions": np.array([f"gemma=={version('gemma')}", f"jax=={version('jax')}"]),
    }


if __name__ == "__main__":
    for name in flax_layout.CONFIGS:
        np.savez_compressed(GOLDENS / f"flax_{name}.npz", **golden(name))
        print(name)
