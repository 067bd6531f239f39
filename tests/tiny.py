"""Tiny checkpoints in Hugging Face's format, adapters and batches, from numpy alone.

The JAX tests and the torch reference (reference.py) read the same inputs from here, so they can
only differ in what they compute. Everything is a function of its seed. Draws are uniform and
integer: they need no libm, so every platform gets the same bits and the goldens stay valid.
"""

import json
import os
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

# The real rows of the sets, NAME/train.jsonl, which are not ours to keep in the checkout.
DATA = Path(os.environ.get("GEMMA_LORA_DATA") or Path(__file__).parents[2] / "shared" / "data")

_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "vocab_size": 128,
}
_GEMMA = _SIZES | {"head_dim": 16, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
_GEMMA3 = _GEMMA | {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "hidden_activation": "gelu_pytorch_tanh",
    "num_hidden_layers": 7,  # five local, one global, one local
    "query_pre_attn_scalar": 24,
    "rope_local_base_freq": 10_000.0,
    "rope_scaling": None,
    "rope_theta": 1_000_000.0,
    "sliding_window": 8,
    "sliding_window_pattern": 6,
}
_QWEN2 = _SIZES | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "rope_theta": 1_000_000.0,
    "max_window_layers": 1,
    "sliding_window": 8,  # must be ignored
    "use_sliding_window": False,
}

# The facts of config.json, spelled as the files on the Hub spell them.
TINY: dict[str, dict[str, Any]] = {
    "gemma": _GEMMA
    | {
        "architectures": ["GemmaForCausalLM"],
        "model_type": "gemma",
        "hidden_act": "gelu",  # means the tanh form in Gemma 1
        "num_key_value_heads": 1,
        "rope_theta": 10_000.0,
    },
    "gemma2": _GEMMA
    | {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "hidden_activation": "gelu_pytorch_tanh",
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "query_pre_attn_scalar": 24,
        "rope_theta": 10_000.0,
        "sliding_window": 8,
    },
    "gemma3": _GEMMA3,
    "gemma3_rope8": _GEMMA3 | {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
    # As in the real files there is no head_dim: it is hidden_size / num_attention_heads.
    "qwen2": _QWEN2 | {"tie_word_embeddings": True},
    "qwen2_untied": _QWEN2 | {"head_dim": 16, "tie_word_embeddings": False},
}

GEMMA3_270M: dict[str, Any] = _GEMMA3 | {
    "head_dim": 256,
    "hidden_size": 640,
    "intermediate_size": 2048,
    "max_position_embeddings": 32_768,
    "num_hidden_layers": 18,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "sliding_window": 512,
    "vocab_size": 262_144,
}


def linear_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """(out, in) of every linear module that PEFT's 'all-linear' wraps, by Hugging Face name."""
    d, f, n = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    h = config.get("head_dim", d // n)
    k = config["num_key_value_heads"]
    shapes = {
        "self_attn.q_proj": (n * h, d),
        "self_attn.k_proj": (k * h, d),
        "self_attn.v_proj": (k * h, d),
        "self_attn.o_proj": (d, n * h),
        "mlp.gate_proj": (f, d),
        "mlp.up_proj": (f, d),
        "mlp.down_proj": (d, f),
    }
    layers = range(config["num_hidden_layers"])
    return {f"model.layers.{i}.{name}": shape for i in layers for name, shape in shapes.items()}


def tiny_weights(name: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Every tensor of the checkpoint TINY[name], float32, under transformers' names.

    Query and key weights and the embedding are twice the usual size: only then are attention and
    logits peaked enough for a wrong mask, scale, RoPE base or soft-cap to be seen.
    """
    config = TINY[name]
    family, d, v = config["model_type"], config["hidden_size"], config["vocab_size"]
    h = config.get("head_dim", d // config["num_attention_heads"])
    norm_mean = 0.0 if family.startswith("gemma") else 1.0  # Gemma's multiply by 1 + w
    weights: dict[str, np.ndarray] = {}

    def add(key: str, shape: tuple[int, ...], std: float, mean: float = 0.0) -> None:
        weights[key] = mean + _uniform(f"{name}/{seed}/{key}", shape, std)

    add("model.embed_tokens.weight", (v, d), 2 / np.sqrt(d))
    add("model.norm.weight", (d,), 0.3, norm_mean)
    for key, (out, fan_in) in linear_shapes(config).items():
        sharp = 2 if key.endswith(("q_proj", "k_proj")) else 1
        add(f"{key}.weight", (out, fan_in), sharp / np.sqrt(fan_in))
        if family == "qwen2" and key.endswith(("q_proj", "k_proj", "v_proj")):
            add(f"{key}.bias", (out,), 0.5)
    norms = {"input_layernorm": d, "post_attention_layernorm": d}
    if family in ("gemma2", "gemma3_text"):
        norms |= {"pre_feedforward_layernorm": d, "post_feedforward_layernorm": d}
    if family == "gemma3_text":
        norms |= {"self_attn.q_norm": h, "self_attn.k_norm": h}
    for i in range(config["num_hidden_layers"]):
        for norm, size in norms.items():
            add(f"model.layers.{i}.{norm}.weight", (size,), 0.3, norm_mean)
    if not config.get("tie_word_embeddings", True):
        add("lm_head.weight", (v, d), 2 / np.sqrt(d))
    return weights


def write_tiny(name: str, directory: str | Path, seed: int = 0) -> Path:
    """Writes config.json and model.safetensors of TINY[name]; returns the directory."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(TINY[name], indent=2))
    save_file(tiny_weights(name, seed), directory / "model.safetensors", metadata={"format": "pt"})
    return directory


# Adapters as adapter_config.json says what they are (r 4, lora_alpha 8 and all linear modules go
# without saying).
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "patterned": {
        "use_rslora": True,
        "rank_pattern": {"self_attn.v_proj": 6, ".*_proj": 3, "q_proj": 5},  # the first one counts
        "alpha_pattern": {"(down|q)_proj": 3},
    },
}
# Which of them have goldens of their own, on which base.
ADAPTED = [(adapter, base) for adapter in ("dora", "patterned") for base in ("gemma2", "qwen2")]


def settings_of(adapter: str, **more: Any) -> dict[str, Any]:
    """The settings of ADAPTERS[adapter], with what goes without saying."""
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    usual = {"r": 4, "lora_alpha": 8.0, "lora_dropout": 0.0, "target_modules": targets}
    return usual | ADAPTERS[adapter] | more


def init_adapter(
    config: Mapping[str, Any],
    rank: int,
    seed: int = 0,
    zero_b: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    use_dora: bool = False,
    **unused: Any,
) -> dict[str, np.ndarray]:
    """LoRA on all linear modules under the keys of PEFT's file: A [r, in], B [out, r], float32.

    A has PEFT's initial distribution; B is zero, or of a size that changes every layer's output
    by about half of itself at alpha = 2 r. DoRA's magnitudes [out] are about those of tiny_weights.
    """
    adapter: dict[str, np.ndarray] = {}
    for name, (out, fan_in) in linear_shapes(config).items():
        key = f"base_model.model.{name}.lora_"
        matches = (r for p, r in (rank_pattern or {}).items() if re.match(rf"(.*\.)?({p})$", name))
        r = next(matches, rank)
        adapter[f"{key}A.weight"] = _uniform(
            f"{seed}/{name}/A", (r, fan_in), 1 / np.sqrt(3 * fan_in)
        )
        b = np.zeros((out, r), np.float32)
        adapter[f"{key}B.weight"] = b if zero_b else _uniform(f"{seed}/{name}/B", b.shape, 0.2)
        if use_dora:
            sharp = 2 if name.endswith(("q_proj", "k_proj")) else 1
            noise = _uniform(f"{seed}/{name}/m", (out,), 0.3)
            adapter[f"{key}magnitude_vector"] = np.float32(sharp) * (1 + noise)
    return adapter


def tokens(seed: int = 0, rows: int = 2, length: int = 24, vocab: int = 128) -> np.ndarray:
    """Random ids [rows, length]: three times as long as the tiny models' window."""
    return _rng(f"tokens/{seed}").integers(0, vocab, (rows, length), dtype=np.int32)


def loss_mask(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """True where tokens[..., t] is a target (predicted from t - 1): about 3/4, never column 0."""
    mask = _rng(f"mask/{seed}").integers(0, 4, shape) > 0
    mask[..., 0] = False
    return mask


def tiny_batches(
    seed: int = 0, steps: int = 20, rows: int = 4, length: int = 24
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and loss mask [steps, rows, length]. Only 16 ids occur, so there is much to learn."""
    batches = tokens(seed, steps * rows, length, vocab=16).reshape(steps, rows, length) * 7 + 3
    return batches, loss_mask(batches.shape, seed)


def text_batches(
    ids: np.ndarray, seed: int = 0, steps: int = 20, rows: int = 2, length: int = 64
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and loss mask [steps, rows, length]: random windows of `ids`, each after ids[0]."""
    starts = _rng(f"windows/{seed}").integers(1, len(ids) - length + 2, (steps, rows, 1))
    windows = ids[starts + np.arange(length - 1)]
    bos = np.full((steps, rows, 1), ids[0])
    batches = np.concatenate([bos, windows], axis=-1).astype(np.int32)
    return batches, loss_mask(batches.shape, seed)


def checksum(*arrays: np.ndarray) -> int:
    """CRC of the arrays' bytes: a golden stores its inputs' and a test compares them first."""
    crc = 0
    for array in arrays:
        crc = zlib.crc32(np.ascontiguousarray(array).tobytes(), crc)
    return crc


def _rng(key: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(key.encode()))


def _uniform(key: str, shape: tuple[int, ...], std: float) -> np.ndarray:
    bound = std * np.sqrt(3.0)
    return _rng(key).uniform(-bound, bound, shape).astype(np.float32)
