"""Keras presets of Gemma 1, 2, 3 (text) and Qwen2, loaded by keras-nlp itself on its JAX backend.

keras-nlp is keras-hub under its first name. A preset is a directory: config.json (the settings of a
class), the weights, and assets/tokenizer.
"""

import functools
import importlib.util
import inspect
import json
import os
import pathlib
import sys
from types import ModuleType
from typing import Any

import jax
import numpy as np

from gemma_lora.errors import UserError, extra, nearest
from gemma_lora.weights import hub

# The library's classes that we have the maths of -> (the form of their variables in mapping.FORMS,
# Hugging Face's model_type without and with norms after each half of a block, how many matrices the
# width of the MLP counts: one class counts the gate's together with the values').
BACKBONES: dict[str, tuple[str, str, str, int]] = {
    "GemmaBackbone": ("keras_gemma", "gemma", "gemma2", 2),
    "Gemma3Backbone": ("keras_gemma", "gemma3_text", "gemma3_text", 1),
    "QwenBackbone": ("keras_qwen", "qwen2", "qwen2", 1),
}
# Hugging Face's key -> the library's setting, where the class has it.
_SETTINGS = {
    "vocab_size": "vocabulary_size",
    "hidden_size": "hidden_dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_query_heads",
    "num_key_value_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "intermediate_size": "intermediate_dim",
    "rms_norm_eps": "layer_norm_epsilon",
    "attn_logit_softcapping": "attention_logit_soft_cap",
    "final_logit_softcapping": "final_logit_soft_cap",
    "sliding_window": "sliding_window_size",
    "rope_theta": "rope_max_wavelength",
    "tie_word_embeddings": "tie_word_embeddings",
}
# model_type -> the settings that its maths implies.
_IMPLIED: dict[str, dict[str, Any]] = {
    "gemma": {"use_sliding_window_attention": False},
    "gemma2": {"use_sliding_window_attention": True},
    "gemma3_text": {
        "use_sliding_window_attention": True,
        "use_bidirectional_attention": False,
        "is_embedding_model": False,
        "local_rope_scaling_factor": 1.0,
        "vision_encoder": None,
    },
    "qwen2": {"use_sliding_window_attention": False},
}


@functools.cache
def _library() -> ModuleType:
    """keras_nlp on the JAX backend; keras takes its backend once, when it is first imported."""
    if importlib.util.find_spec("keras_nlp") is None:
        raise UserError(f"a Keras preset needs keras-nlp; run: {extra('keras')}")
    if "keras" not in sys.modules:
        os.environ["KERAS_BACKEND"] = "jax"
    import keras

    if keras.config.backend() != "jax":
        raise UserError(
            f"keras was imported with the backend {keras.config.backend()!r}, expected 'jax'; set "
            "KERAS_BACKEND=jax before anything imports it"
        )
    import keras_nlp

    return keras_nlp


def fetch(name: str) -> pathlib.Path:
    """'gemma_2b_en' -> the directory of the preset's local copy, from where the library has it."""
    presets: dict[str, Any] = {}
    for backbone in BACKBONES:
        presets |= getattr(_library().models, backbone).presets
    if name not in presets:
        raise UserError(f"keras:{name}: no such preset, {nearest(name, presets)}")
    handle = presets[name]["kaggle_handle"].removeprefix("kaggle://")
    return hub.kaggle(handle, f"keras:{name}")


class KerasPreset:
    """The variables of a preset's backbone, under the paths that the library gives them.

    `form` is their form in mapping.FORMS. Opening reads config.json alone; the first look at a
    variable makes the library load them all, into host memory and in the stored precision. Raises
    UserError for a preset that is damaged, or of a model that has other maths.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = pathlib.Path(path)
        file = self.path / "config.json"
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
            kind, stated = config["class_name"], dict(config["config"])
        except OSError as e:
            raise UserError(
                f"cannot read {file}: {e.strerror}; give a preset's directory"
            ) from None
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(f"{file} does not describe a Keras model ({e!r})") from None
        if kind not in BACKBONES:
            raise UserError(f"{file} is of the class {kind!r}, {nearest(kind, BACKBONES)}")
        self.form, *families, self._counted = BACKBONES[kind]
        parameters = inspect.signature(getattr(_library().models, kind)).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        self._settings = defaults | stated
        self._family = families[bool(self._settings.get("use_post_ffw_norm"))]

    @property
    def arch(self) -> dict[str, Any]:
        """The settings in the terms of Hugging Face's config.json, for Arch.from_hf."""
        s, family = self._settings, self._family
        wrong = [f"{k} is {s[k]!r}" for k, v in _IMPLIED[family].items() if s.get(k, v) != v]
        if wrong:
            raise UserError(
                f"{self.path / 'config.json'}: {', '.join(wrong)}, unlike {family}; of a preset "
                "with image parts there is one with its text parts alone, named ..._text"
            )
        found = {theirs: s[key] for theirs, key in _SETTINGS.items() if key in s}
        found["model_type"] = family
        found["intermediate_size"] //= self._counted
        if "query_head_dim_normalize" in s:
            by_width = s["hidden_dim"] // s["num_query_heads"]
            scale = s["head_dim"] if s["query_head_dim_normalize"] else by_width
            found["query_pre_attn_scalar"] = scale
        factor = s.get("global_rope_scaling_factor", s.get("rope_scaling_factor", 1.0))
        return found | {"rope_scaling": {"rope_type": "linear", "factor": factor}}

    @functools.cached_property
    def _variables(self) -> dict[str, Any]:
        """path -> variable, of the loaded backbone."""
        keras_nlp = _library()
        import keras

        try:
            policy = keras.dtype_policies.get(self._settings.get("dtype") or "float32")
            if policy.quantization_mode:
                raise UserError(
                    f"{self.path} is quantised ({policy.name}); use the preset it was made from"
                )
            # Never on an accelerator: the base goes there leaf by leaf, in its own sharding.
            with jax.default_device(jax.local_devices(backend="cpu")[0]):
                backbone = keras_nlp.models.Backbone.from_preset(
                    str(self.path), dtype=policy.variable_dtype
                )
        except UserError:
            raise
        except Exception as e:  # the library has no common base of its errors
            text = " ".join(str(e).split())[:300]
            raise UserError(f"keras-nlp cannot load {self.path}: {text}") from e
        return {v.path: v for v in backbone.weights}

    def names(self) -> list[str]:
        """The variables' paths, such as decoder_block_0/attention/query/kernel."""
        return list(self._variables)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._variables[name].shape)

    def read(self, name: str) -> np.ndarray:
        return np.asarray(self._variables[name].value)
