"""Keras presets that keras-nlp saved, loaded here: logits of its own models, facts, tokenizers."""

import json
import os
import re
import sys

import common
import flax.linen as nn
import ml_dtypes
import numpy as np
import pytest
import tiny
from tiny_tokenizer import CORPUS, write_qwen, write_sentencepiece

from gemma_lora.arch import Arch
from gemma_lora.errors import UserError, extra
from gemma_lora.model import Transformer
from gemma_lora.sharding import tree_shardings
from gemma_lora.tokenizer import Tokenizer
from gemma_lora.weights import hub, keras, mapping

pytestmark = pytest.mark.usefixtures("quick")

if "keras" not in sys.modules:
    os.environ["KERAS_BACKEND"] = "jax"
keras_nlp = common.needs("keras_nlp")

SIZES = {"vocabulary_size": 128, "hidden_dim": 32, "num_query_heads": 4}
GEMMA2 = {
    "use_post_ffw_norm": True,
    "use_post_attention_norm": True,
    "use_sliding_window_attention": True,
    "sliding_window_size": 8,
}
# name: (class of the library, its settings, arch facts that the settings mean)
BACKBONES = {
    "gemma": (
        "GemmaBackbone",
        {"num_layers": 3, "num_key_value_heads": 1, "intermediate_dim": 128, "head_dim": 16},
        {"family": "gemma", "hidden": 64, "query_scale": 16.0, "window": 0},
    ),
    "gemma2": (
        "GemmaBackbone",
        {
            "num_layers": 3,
            "num_key_value_heads": 2,
            "intermediate_dim": 128,
            "head_dim": 16,
            "attention_logit_soft_cap": 50,
            "final_logit_soft_cap": 30,
            **GEMMA2,
        },
        {"family": "gemma2", "hidden": 64, "window": 8, "attn_softcap": 50, "final_softcap": 30},
    ),
    "gemma3": (
        "Gemma3Backbone",
        {
            "num_layers": 7,
            "num_key_value_heads": 2,
            "intermediate_dim": 64,
            "head_dim": 16,
            "image_size": None,
            "global_rope_scaling_factor": 8.0,
            **GEMMA2,
        },
        {"family": "gemma3_text", "hidden": 64, "window": 8, "rope_factor": 8.0, "qk_norm": True},
    ),
    "qwen2": (
        "QwenBackbone",
        {
            "num_layers": 3,
            "num_key_value_heads": 2,
            "intermediate_dim": 64,
            "rope_max_wavelength": 1_000_000,
        },
        {"family": "qwen2", "tied": True, "head_dim": 8, "rope_base": 1e6, "rope_factor": 1.0},
    ),
    "qwen2_untied": (
        "QwenBackbone",
        {
            "num_layers": 3,
            "num_key_value_heads": 1,
            "intermediate_dim": 64,
            "tie_word_embeddings": False,
        },
        {"family": "qwen2", "tied": False, "kv_heads": 1, "rope_base": 1e4},
    ),
}


def backbone(name: str, **more):
    """The library's model with weights that make attention peaked; see tiny.tiny_weights."""
    kind, settings, _ = BACKBONES[name]
    model = getattr(keras_nlp.models, kind)(**SIZES, **settings, **more)
    rng = np.random.default_rng(0)
    for v in model.weights:
        mean = float(name.startswith("qwen") and v.path.endswith("scale"))
        std = 0.3 if v.path.endswith(("scale", "bias")) else 2 / np.sqrt(32)
        v.assign(mean + std * rng.standard_normal(v.shape))
    return model


def load(preset: keras.KerasPreset):
    arch = Arch.from_hf(preset.arch)
    boxed = Transformer(arch).abstract()["params"]
    shardings = tree_shardings(boxed, common.one_device())
    return arch, mapping.load(preset, preset.form, arch, nn.unbox(boxed), shardings)


@pytest.fixture
def saved(tmp_path):
    """A preset of Gemma as the library saves it, and its config.json as a function to change it."""
    backbone("gemma").save_to_preset(str(tmp_path))

    def change(**settings):
        config = json.loads((tmp_path / "config.json").read_text())
        config["config"] |= settings
        (tmp_path / "config.json").write_text(json.dumps(config))
        return keras.KerasPreset(tmp_path)

    return change


@pytest.mark.parametrize("name", BACKBONES)
def test_logits_are_those_of_the_library(name, tmp_path):
    model = backbone(name)
    model.save_to_preset(str(tmp_path))
    tokens = tiny.tokens()  # three times as long as the window
    inputs = {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}
    wanted = np.asarray(model.token_embedding(model(inputs), reverse=True))
    arch, params = load(keras.KerasPreset(tmp_path))
    facts = {k: getattr(arch, k) for k in BACKBONES[name][2]}
    assert facts == BACKBONES[name][2]
    got = common.all_logits(Transformer(arch), params, {}, tokens)
    assert np.ptp(wanted) > 5  # or a wrong mask would not be seen
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4)


def test_queries_are_scaled_as_the_preset_says(saved):
    """Gemma 2 27B says by the width, as its published config. The library's block passes True on,
    whatever the preset says, so its logits are no reference for this."""
    for by_head, scale in ((True, 16), (False, 32 // 4)):
        arch = Arch.from_hf(saved(query_head_dim_normalize=by_head).arch)
        assert arch.query_scale == scale


def test_weights_keep_their_precision(tmp_path):
    model = backbone("gemma", dtype="bfloat16")
    model.save_to_preset(str(tmp_path))
    preset = keras.KerasPreset(tmp_path)
    assert sorted(preset.names()) == sorted(v.path for v in model.weights)
    for v in model.weights:
        x = preset.read(v.path)
        assert x.dtype == ml_dtypes.bfloat16 and x.shape == preset.shape(v.path)
        np.testing.assert_array_equal(x, np.asarray(v.value))


def test_a_named_preset_is_fetched_from_where_the_library_has_it(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(hub, "kaggle", lambda *names: asked.append(names) or tmp_path)
    for name in ("gemma_2b_en", "gemma3_270m", "qwen2.5_0.5b_en"):
        assert keras.fetch(name) == tmp_path
        handle, shown = asked.pop()
        assert handle.split("/")[0::3] == ["keras", name] and shown == f"keras:{name}"
    with pytest.raises(
        UserError, match=r"keras:gemma_2b: no such preset, did you mean .*gemma_2b_en"
    ):
        keras.fetch("gemma_2b")


def test_presets_of_other_maths_are_refused(saved, tmp_path):
    with pytest.raises(UserError, match="use_sliding_window_attention is True, unlike gemma"):
        saved(use_sliding_window_attention=True).arch  # noqa: B018
    preset = saved(use_sliding_window_attention=False)
    weights = tmp_path / "model.weights.h5"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(UserError, match="keras-nlp cannot load "):
        preset.names()
    quantised = {"class_name": "QuantizedDTypePolicy", "config": {"mode": "int8"}}
    policy = {"module": "keras", **quantised, "registered_name": None}
    policy["config"]["source_name"] = "float32"
    with pytest.raises(UserError, match="is quantised"):
        saved(dtype=policy).names()
    file = tmp_path / "config.json"
    for text, message in (
        ('{"class_name": "GemaBackbone", "config": {}}', "did you mean GemmaBackbone"),
        ('{"model_type": "gemma"}', "does not describe a Keras model"),
        ("{", "does not describe a Keras model"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            keras.KerasPreset(tmp_path)
    file.unlink()
    with pytest.raises(UserError, match=r"cannot read .*config\.json: No such file"):
        keras.KerasPreset(tmp_path)


@pytest.mark.parametrize(
    "changed",
    [
        {"use_bidirectional_attention": True},
        {"local_rope_scaling_factor": 2.0},
        {"vision_encoder": {"class_name": "Gemma3VisionEncoder"}},
        {"use_sliding_window_attention": False},
    ],
)
def test_other_uses_of_gemma3_are_refused(changed, tmp_path):
    config = {"class_name": "Gemma3Backbone", "config": {**BACKBONES["gemma3"][1], **changed}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    [name] = changed
    with pytest.raises(UserError, match=rf"{name} is .*, unlike gemma3_text; .*\.\.\._text"):
        keras.KerasPreset(tmp_path).arch  # noqa: B018


def test_what_the_library_needs(saved, monkeypatch):
    keras._library.cache_clear()
    with monkeypatch.context() as m:
        m.setattr(sys.modules["keras"].config, "backend", lambda: "torch")
        with pytest.raises(UserError, match="imported with the backend 'torch', expected 'jax'"):
            saved()
    with monkeypatch.context() as m:
        m.setattr(keras.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(UserError, match=re.escape(extra("keras"))):
            saved()
    assert saved().names()


def test_tokenizers_of_presets(tmp_path):
    spm = write_sentencepiece(tmp_path / "tokenizer.model")
    theirs = keras_nlp.models.GemmaTokenizer(proto=str(spm))
    theirs.save_to_preset(str(tmp_path / "gemma"))
    ours = Tokenizer.from_dir(tmp_path / "gemma")
    texts = [t for t in CORPUS if " " * 4 not in t]  # longer than the longest such piece
    assert [ours.encode(t) for t in texts] == [np.asarray(theirs(t)).tolist() for t in texts]
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.add_bos) == (
        theirs.start_token_id,
        theirs.end_token_id,
        theirs.pad_token_id,
        True,
    )
    special = write_qwen(tmp_path / "files", "vocabulary.json")
    vocabulary = json.loads((tmp_path / "files" / "vocabulary.json").read_text())
    merges = (tmp_path / "files" / "merges.txt").read_text().split("\n")[1:-1]
    theirs = keras_nlp.models.QwenTokenizer(vocabulary, merges, unsplittable_tokens=special)
    theirs.save_to_preset(str(tmp_path / "qwen2"))
    ours = Tokenizer.from_dir(tmp_path / "qwen2")
    texts = [CORPUS[0], "<|im_start|>user\nHi<|im_end|>\n"]  # no number: see Qwen2's own pattern
    assert [ours.encode(t) for t in texts] == [np.asarray(theirs(t)).tolist() for t in texts]
    assert (ours.eos_id, ours.bos_id) == (theirs.end_token_id, None)
