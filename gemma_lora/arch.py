"""Every fact about every model, as data.

No model's name stands in the maths, which reads the fields of `Arch`; weights/, vocabulary.py and
chat.py know names of published files. Sources of the numbers: the `config.json` of each published
checkpoint and the reports of Gemma (arXiv:2403.08295, 2408.00118, 2503.19786) and Qwen2
(arXiv:2407.10671).
"""

import dataclasses
from typing import Any

from gemma_lora.errors import UserError, nearest, require_name


@dataclasses.dataclass(frozen=True)
class Arch:
    """Shapes and switches of one decoder. Letters as everywhere: V, D, L, N, K, H, F."""

    vocab: int  # V
    embed: int  # D
    layers: int  # L
    heads: int  # N
    kv_heads: int  # K
    head_dim: int  # H
    hidden: int  # F
    family: str  # Hugging Face's model_type, written back on export
    query_scale: float  # attention logits are multiplied by query_scale ** -0.5
    rope_base: float  # of global layers
    rope_local_base: float  # of local layers
    norm_plus_one: bool  # RMSNorm multiplies by (1 + w), before the downcast
    gelu: bool  # tanh-GELU; SiLU otherwise
    scale_embed: bool  # embeddings are multiplied by sqrt(D)
    rope_factor: float = 1.0  # positions of global layers are divided by this (linear scaling)
    window: int = 0  # a local layer sees keys j with i - window < j <= i; 0: no local layers
    local: tuple[bool, ...] = (False,)  # is the layer local; repeated to length L
    post_norms: bool = False  # norms after attention and after the MLP, too
    qk_norm: bool = False
    qkv_bias: bool = False
    attn_softcap: float = 0.0  # 0: none
    final_softcap: float = 0.0
    tied: bool = True  # the head is the embedding table
    eps: float = 1e-6

    @property
    def is_local(self) -> tuple[bool, ...]:
        """One flag a layer: does it see only the sliding window."""
        return tuple(self.local[i % len(self.local)] for i in range(self.layers))

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "Arch":
        """From the contents of a Hugging Face config.json, with transformers' silent defaults.

        Raises UserError for an unknown model_type or a setting that would change the maths.
        """
        if (inner := config.get("text_config")) is not None:
            outer = config.get("model_type", "gemma3")
            if outer not in ("gemma3", *FAMILIES):  # PaliGemma's rows see their whole prompt
                raise UserError(
                    f"config.json: model_type {outer!r} around a text model is not supported "
                    "(expected gemma3)"
                )
            # The outer config ties the head, if it says so.
            ties = config.get("tie_word_embeddings")
            config = inner | ({} if ties is None else {"tie_word_embeddings": ties})
        family = config.get("model_type", "")
        if family not in FAMILIES:
            raise UserError(
                f"config.json: model_type {family!r} is not supported, " + nearest(family, FAMILIES)
            )
        fields = dict(FAMILIES[family], family=family)
        fields |= {ours: config[theirs] for ours, theirs in _HF_SIZES.items() if config.get(theirs)}
        missing = [theirs for ours, theirs in _HF_SIZES.items() if ours not in fields]
        if missing:
            raise UserError(f"config.json of a {family} model lacks {', '.join(missing)}")
        heads, embed = fields["heads"], fields["embed"]
        fields["kv_heads"] = config.get("num_key_value_heads") or fields.get("kv_heads", heads)
        fields["head_dim"] = config.get("head_dim") or fields.get("head_dim") or embed // heads
        fields["query_scale"] = float(
            config.get("query_pre_attn_scalar") or fields.get("query_scale") or fields["head_dim"]
        )
        fields["eps"] = config.get("rms_norm_eps", 1e-6)
        if config.get("tie_word_embeddings") is not None:
            fields["tied"] = config["tie_word_embeddings"]
        if config.get("use_bidirectional_attention"):
            raise UserError("config.json: use_bidirectional_attention is true, expected false")
        for key, allowed in _HF_ACTIVATIONS[fields["gelu"]].items():
            if config.get(key) not in (None, *allowed):
                raise UserError(
                    f"config.json: {key} of a {family} model is {config[key]!r}, expected "
                    f"{allowed[0]!r}"
                )
        for ours, theirs in _HF_SOFTCAPS.items():
            if theirs in config:
                fields[ours] = config[theirs] or 0.0
        fields |= _hf_rope(config, fields)
        fields |= _hf_window(config, fields)
        return cls(**fields)

    def to_hf(self) -> dict[str, Any]:
        """A config.json that from_hf reads back as this arch, in the older spellings.

        transformers 4 and 5 both read them; where one release wants a key and another ignores it,
        both are there.
        """
        class_name = self.family.removesuffix("_text").capitalize()
        act = "gelu_pytorch_tanh" if self.gelu else "silu"
        scale = self.query_scale
        config = {
            "architectures": [f"{class_name}ForCausalLM"],
            "model_type": self.family,
            **{theirs: getattr(self, ours) for ours, theirs in _HF_SIZES.items()},
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": act,
            "hidden_activation": act,
            # transformers 5 refuses a float here.
            "query_pre_attn_scalar": int(scale) if scale == int(scale) else scale,
            "rms_norm_eps": self.eps,
            "tie_word_embeddings": self.tied,
            **{theirs: getattr(self, ours) or None for ours, theirs in _HF_SOFTCAPS.items()},
            "rope_theta": self.rope_base,
            "rope_scaling": None,
        }
        if self.rope_factor != 1:
            config["rope_scaling"] = {"rope_type": "linear", "factor": self.rope_factor}
        if self.window:
            kinds = {True: "sliding_attention", False: "full_attention"}
            config["sliding_window"] = self.window
            config["rope_local_base_freq"] = self.rope_local_base
            config["layer_types"] = [kinds[local] for local in self.is_local]
            if all(self.local[:-1]) and not self.local[-1]:  # before there were layer_types
                config["sliding_window_pattern"] = len(self.local)
        return config


_HF_SIZES = {
    "vocab": "vocab_size",
    "embed": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "hidden": "intermediate_size",
}
# Arch.gelu -> key -> what it may say. Old files of Gemma 1 say gelu and mean the tanh form.
_HF_ACTIVATIONS = {
    True: {
        "hidden_activation": ("gelu_pytorch_tanh",),
        "hidden_act": ("gelu_pytorch_tanh", "gelu"),
    },
    False: {"hidden_act": ("silu",), "hidden_activation": ("silu",)},
}
_HF_SOFTCAPS = {
    "attn_softcap": "attn_logit_softcapping",
    "final_softcap": "final_logit_softcapping",
}


def _hf_rope(config: dict[str, Any], fields: dict[str, Any]) -> dict[str, float]:
    """RoPE bases and factor: rope_theta and rope_scaling, or rope_parameters of transformers 5."""
    nested = config.get("rope_parameters") or {}
    everywhere = {
        "rope_theta": config.get("rope_theta") or nested.get("rope_theta") or fields["rope_base"],
        **(config.get("rope_scaling") or {}),
    }
    if not {"full_attention", "sliding_attention"} & nested.keys():
        everywhere |= nested
    full = nested.get("full_attention") or everywhere
    sliding = nested.get("sliding_attention") or {}
    kind = full.get("rope_type", full.get("type", "default"))
    if kind not in ("default", "linear"):
        raise UserError(
            f"config.json: RoPE type {kind!r} is not supported (valid: default, linear)"
        )
    base = full.get("rope_theta") or everywhere["rope_theta"]
    if (own := sliding.get("rope_type", sliding.get("type", "default"))) != "default":
        raise UserError(
            f"config.json: RoPE type {own!r} of the local layers is not supported (valid: default)"
        )
    factor = full.get("factor", 1.0) if kind == "linear" else 1.0
    if factor != 1 and fields.get("window") and "rope_local_base" not in fields:
        raise UserError(
            f"config.json: RoPE factor {factor} on the local layers of {fields['family']} is not "
            "supported (expected none)"
        )
    # Where a family does not tell the two apart, local layers have the base of the others.
    local = config.get("rope_local_base_freq") or fields.get("rope_local_base", base)
    return {
        "rope_base": float(base),
        "rope_factor": float(factor),
        "rope_local_base": float(sliding.get("rope_theta", local)),
    }


def _hf_window(config: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    if not fields.get("window"):
        if config.get("use_sliding_window"):
            raise UserError("config.json: use_sliding_window is true, which is not supported here")
        return {}
    local = fields["local"]
    if config.get("layer_types"):
        local = tuple(t == "sliding_attention" for t in config["layer_types"])
    else:
        period = config.get("sliding_window_pattern", config.get("_sliding_window_pattern"))
        if period:
            local = (True,) * (period - 1) + (False,)
    shortest = next(
        p for p in range(1, len(local) + 1) if all(x == local[i % p] for i, x in enumerate(local))
    )
    return {"window": config.get("sliding_window") or fields["window"], "local": local[:shortest]}


_GEMMA = {"norm_plus_one": True, "gelu": True, "scale_embed": True, "head_dim": 256}
# What every size of a family shares; also the defaults that its config.json may leave unsaid.
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma": _GEMMA | {"tied": True, "rope_base": 10_000.0},
    "gemma2": _GEMMA
    | {
        "query_scale": 256.0,
        "tied": True,
        "rope_base": 10_000.0,
        "window": 4096,
        "local": (True, False),
        "post_norms": True,
        "attn_softcap": 50.0,
        "final_softcap": 30.0,
    },
    "gemma3_text": _GEMMA
    | {
        "vocab": 262_208,
        "heads": 8,
        "kv_heads": 4,
        "query_scale": 256.0,
        "tied": True,
        "rope_base": 1_000_000.0,
        "rope_local_base": 10_000.0,
        "window": 4096,
        "local": (True,) * 5 + (False,),
        "post_norms": True,
        "qk_norm": True,
    },
    "qwen2": {
        "tied": False,
        "rope_base": 10_000.0,
        "norm_plus_one": False,
        "qkv_bias": True,
        "gelu": False,
        "scale_embed": False,
    },
}


def _size(family: str, vdlnkhf: tuple[int, ...], **more: Any) -> Arch:
    names = ("vocab", "embed", "layers", "heads", "kv_heads", "head_dim", "hidden")
    fields = {**FAMILIES[family], **dict(zip(names, vdlnkhf, strict=True)), **more}
    fields.setdefault("query_scale", float(fields["head_dim"]))
    fields.setdefault("rope_local_base", fields["rope_base"])
    return Arch(family=family, **fields)


#                                V        D     L   N   K   H    F
ARCHS: dict[str, Arch] = {
    "gemma_2b": _size("gemma", (256_000, 2048, 18, 8, 1, 256, 16_384)),
    "gemma_7b": _size("gemma", (256_000, 3072, 28, 16, 16, 256, 24_576)),
    "gemma2_2b": _size("gemma2", (256_000, 2304, 26, 8, 4, 256, 9216)),
    "gemma2_9b": _size("gemma2", (256_000, 3584, 42, 16, 8, 256, 14_336)),
    "gemma2_27b": _size("gemma2", (256_000, 4608, 46, 32, 16, 128, 36_864), query_scale=144.0),
    "gemma3_270m": _size("gemma3_text", (262_144, 640, 18, 4, 1, 256, 2048), window=512),
    "gemma3_1b": _size("gemma3_text", (262_144, 1152, 26, 4, 1, 256, 6912), window=512),
    "gemma3_4b": _size(
        "gemma3_text", (262_208, 2560, 34, 8, 4, 256, 10_240), window=1024, rope_factor=8.0
    ),
    "gemma3_12b": _size(
        "gemma3_text", (262_208, 3840, 48, 16, 8, 256, 15_360), window=1024, rope_factor=8.0
    ),
    "gemma3_27b": _size(
        "gemma3_text",
        (262_208, 5376, 62, 32, 16, 128, 21_504),
        window=1024,
        rope_factor=8.0,
        query_scale=168.0,
    ),
    "qwen2_0p5b": _size("qwen2", (151_936, 896, 24, 14, 2, 64, 4864), rope_base=1e6, tied=True),
    "qwen2_1p5b": _size("qwen2", (151_936, 1536, 28, 12, 2, 128, 8960), rope_base=1e6, tied=True),
    "qwen2_7b": _size("qwen2", (152_064, 3584, 28, 28, 4, 128, 18_944), rope_base=1e6),
}


def get_arch(name: str) -> Arch:
    """The entry of ARCHS called `name`; raises UserError with the nearest names."""
    require_name("arch", name, ARCHS)
    return ARCHS[name]
