"""Checkpoints that transformers itself writes, loaded here: the same logits, float32.

Live only: needs torch and transformers. Sequences are three times as long as the tiny windows.
"""

import copy
import warnings

import common
import numpy as np
import pytest
import tiny
from loading import load, logits, same

from gemma_lora.lora import LoRAConfig
from gemma_lora.model import Transformer
from gemma_lora.weights import mapping, peft
from gemma_lora.weights.pretrained import load_base, open_weights


def close(got, want):
    assert np.max(np.abs(got - want)) <= 1e-4
    assert np.max(np.abs(want)) > 3  # they say something


@pytest.mark.parametrize("name", tiny.TINY)
def test_save_pretrained_in_shards(tmp_path, name):
    reference = common.live("reference")
    reference.model(name).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    opened = open_weights(str(tmp_path), "auto")
    assert opened.arch == common.tiny_arch(name)
    close(logits(opened, tiny.tokens()), reference.logits(name, tiny.tokens()))


def torch_logits(model, tokens):
    torch = common.live("reference").torch
    with torch.no_grad():
        return model(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()


def test_bfloat16(tmp_path):
    """Stored in 16 bits, computed in 32 on both sides."""
    reference = common.live("reference")
    float32 = reference.model("gemma2")
    copy.deepcopy(float32).to(reference.torch.bfloat16).save_pretrained(tmp_path)
    opened = open_weights(str(tmp_path), "auto")
    assert opened.tensors.read("model.norm.weight").dtype == "bfloat16"
    again = type(float32).from_pretrained(
        tmp_path, dtype=reference.torch.float32, attn_implementation="eager"
    )
    want = torch_logits(again, tiny.tokens())
    close(logits(opened, tiny.tokens()), want)
    assert np.max(np.abs(want - reference.logits("gemma2", tiny.tokens()))) > 1e-3


def multimodal():
    """Gemma3ForConditionalGeneration round the weights of TINY['gemma3']."""
    text = common.live("reference").model("gemma3")
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Gemma3Config(
        text_config=text.config.to_dict(), vision_config=vision, mm_tokens_per_image=4
    )
    model = Gemma3ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.tie_weights()
    return model


def test_the_text_model_of_multimodal_gemma_3(tmp_path):
    model = multimodal()
    want = torch_logits(model, tiny.tokens())
    model.save_pretrained(tmp_path)
    opened = open_weights(str(tmp_path), "auto")
    assert opened.arch == common.tiny_arch("gemma3")
    close(logits(opened, tiny.tokens()), want)
    count = sum("vision" in n or "projector" in n for n in model.state_dict())
    assert opened.notice == f"Text only: {count} tensors of its image parts are left out"

    # An adapter of it works in PEFT, where the text model is a part of the model.
    from peft import PeftModel

    config = LoRAConfig(rank=4, alpha=8.0)
    lora, adapter = common.adapter("gemma3"), tmp_path / "adapter"
    peft.export(adapter, lora, config, opened.arch, str(tmp_path), opened.inner)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "error", UserWarning
        )  # PEFT only warns about names that it does not know
        tuned = PeftModel.from_pretrained(copy.deepcopy(model), adapter).eval()
    base = load_base(opened, Transformer(opened.arch), common.one_device())
    got = common.all_logits(Transformer(opened.arch, wrap=config), base, lora, tiny.tokens())
    close(got, torch_logits(tuned, tiny.tokens()))
    assert np.max(np.abs(got - want)) > 1
    same(mapping.flatten(peft.read(adapter, opened.arch)[1]), mapping.flatten(lora))

    # The names inside transformers, which some releases wrote as they are.
    inside = {k: v.contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    from safetensors.torch import save_file

    expected = load(opened)
    (path,) = tmp_path.glob("*.safetensors")
    save_file(inside, path)
    assert any(k.startswith("model.language_model.") for k in inside)
    same(load(open_weights(str(tmp_path), "auto")), expected)
