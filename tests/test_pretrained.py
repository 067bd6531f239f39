"""What config.weights may name, and what is said where it names nothing good."""

import dataclasses

import common
import numpy as np
from common import message
from loading import load
from tiny import write_tiny
from tiny_tokenizer import write_tokenizer

from gemma_lora.arch import ARCHS, Arch
from gemma_lora.config import default
from gemma_lora.errors import extra
from gemma_lora.files import sha256
from gemma_lora.model import no_wrap
from gemma_lora.weights import keras
from gemma_lora.weights.pretrained import build_model, open_weights


def test_missing_weights_suggest_the_nearest(tmp_path):
    write_tiny("gemma3", tmp_path / "gemma-tiny")
    text = message(open_weights, str(tmp_path / "gema-tiny"), "auto")
    assert "do not exist" in text and "'demo'" in text and "did you mean gemma-tiny?" in text
    assert "do not exist" in message(open_weights, str(tmp_path / "a" / "b"), "auto")
    for choice in ("hf:ORG/NAME", "kaggle:OWNER/MODEL/flax/VARIATION", ".gguf", "Flax"):
        assert choice in text
    (tmp_path / "empty").mkdir()
    text = message(open_weights, str(tmp_path / "empty"), "auto")
    assert "no weights in" in text and "*.safetensors" in text and "_METADATA" in text
    (tmp_path / "model.bin").write_bytes(b"PK")
    text = message(open_weights, str(tmp_path / "model.bin"), "gemma3_1b")
    assert "model.bin is no weights file: expected .gguf or .safetensors" in text
    directory = write_tiny("gemma3", tmp_path / "bare")
    (directory / "config.json").unlink()
    text = message(open_weights, str(directory), "auto")
    assert "config.json does not say which model this is; give one of gemma_2b" in text


def test_the_model_is_that_of_the_config():
    config = default()
    values = {"remat": "full", "unroll": True, "quantize": "int8", "attention": "block"}
    config.update({"dtype": "float32", **values})
    model = build_model(common.tiny_arch("gemma"), config, no_wrap)
    assert {k: getattr(model, k) for k in values} == values
    assert model.dtype == model.param_dtype == np.float32


def test_sha256(tmp_path):
    directory = write_tiny("gemma3", tmp_path)
    file = directory / "model.safetensors"
    right = sha256(file)
    assert open_weights(str(file), "auto", right.upper()).form == "hf"
    text = message(open_weights, str(file), "auto", "0" * 64)
    assert right in text and "0" * 64 in text
    assert "directory" in message(open_weights, str(directory), "auto", right)


def test_the_arch_must_agree_with_config_json(tmp_path):
    directory = write_tiny("gemma3", tmp_path)
    text = message(open_weights, str(directory), "gemma3_1b")
    assert "not of arch gemma3_1b" in text
    assert "embed is 32, arch says 1152" in text and "layers is 7, arch says 26" in text
    text = message(open_weights, str(directory), "gemma2_2b")
    assert "family is gemma3_text, arch says gemma2" in text
    text = message(open_weights, str(directory), "gemma3_1bb")
    assert "arch 'gemma3_1bb' is unknown, did you mean gemma3_1b" in text
    assert "gemma3_270m" in message(open_weights, "demo", "gemma3_1b")
    for broken, why in (("{", "is not valid JSON"), ("[1]", "holds a JSON list")):
        (directory / "config.json").write_text(broken)
        assert f"config.json {why}" in message(open_weights, str(directory), "auto")
    (directory / "config.json").write_text('{"model_type": "llama"}')
    assert "model_type 'llama' is not supported" in message(open_weights, str(directory), "auto")


def test_the_tokenizer_is_where_the_weights_are_or_where_it_is_said_to_be(tmp_path, monkeypatch):
    directory = write_tiny("gemma3", tmp_path / "model")
    assert "no tokenizer in" in message(open_weights(str(directory), "auto").tokenizer)
    write_tokenizer(tmp_path / "tokenizer")
    other = open_weights(str(directory), "auto", tokenizer=str(tmp_path / "tokenizer"))
    write_tokenizer(directory)
    file = str(tmp_path / "tokenizer" / "tokenizer.json")
    named = open_weights(str(directory), "auto", tokenizer=file)
    monkeypatch.setenv("HOME", str(tmp_path))
    home = open_weights("~/model", "auto", tokenizer="~/tokenizer")
    assert home.base_name == str(directory)
    beside = open_weights(str(directory / "model.safetensors"), "auto")
    for pretrained in (other, named, home, beside):
        tokenizer = pretrained.tokenizer()
        assert tokenizer.add_bos and tokenizer.bos_id == 2
        assert tokenizer.decode(tokenizer.encode("2 + 2\n= 4")) == "2 + 2\n= 4"


def test_qwen_2_5_is_qwen2():
    """config.json of Qwen/Qwen2.5-0.5B."""
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "hidden_act": "silu",
        "hidden_size": 896,
        "initializer_range": 0.02,
        "intermediate_size": 4864,
        "max_position_embeddings": 32768,
        "max_window_layers": 24,
        "model_type": "qwen2",
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.40.1",
        "use_cache": True,
        "use_mrope": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    }
    assert Arch.from_hf(config) == ARCHS["qwen2_0p5b"]


# ---- Keras presets (their contents: test_keras.py) ------------------------------------------


def test_a_preset_needs_its_library(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"class_name": "GemmaBackbone", "config": {}}')
    (tmp_path / "model.weights.h5").touch()
    monkeypatch.setattr(keras.importlib.util, "find_spec", lambda name: None)
    keras._library.cache_clear()
    for weights in (str(tmp_path), "keras:gemma_2b_en"):
        assert extra("keras") in message(open_weights, weights, "auto")


def test_a_preset(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")  # keras reads it when it is first imported
    keras_nlp = common.needs("keras_nlp")
    model = keras_nlp.models.GemmaBackbone(128, 2, 4, 1, 32, 128, 16)
    model.save_to_preset(str(tmp_path))
    opened = open_weights(str(tmp_path), "auto")
    assert (opened.form, opened.arch.family, opened.arch.layers) == ("keras_gemma", "gemma", 2)
    want = model.get_layer("decoder_block_1").gating_ffw.kernel
    np.testing.assert_array_equal(load(opened)["layers/mlp/gate_proj/w"][1], np.asarray(want))
    # A named arch may have more words than the preset.
    wider = dataclasses.replace(opened.arch, vocab=192)
    monkeypatch.setitem(ARCHS, "wider", wider)
    assert open_weights(str(tmp_path), "wider").arch == opened.arch
    assert "embed is 32, arch says 2048" in message(open_weights, str(tmp_path), "gemma_2b")
