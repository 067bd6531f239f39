"""PEFT's files without PEFT: what its settings mean, and what is refused by name."""

import json
import re

import common
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tiny

from gemma_lora.errors import UserError
from gemma_lora.lora import merge, modules
from gemma_lora.weights import peft
from gemma_lora.weights.mapping import hf_tensor

NAME = "qwen2"
ARCH = common.tiny_arch(NAME)
# Keys as PEFT looks them up, in their order, and what they come to in each layer's q_proj.
LAYERED = {
    "rank_pattern": {"layers.1.self_attn.q_proj": 6, "^model.layers.2.*q_proj": 2, "up_proj": 3},
    "alpha_pattern": {"layers.2.self_attn.q_proj": 1.0, "q_proj": 9},
}
Q_PROJ = [(4, 9), (6, 9), (2, 1)]


def adapter(**settings):
    """(settings, tensors) of all linear modules."""
    settings = tiny.settings_of("lora", **settings)
    return settings, tiny.init_adapter(tiny.TINY[NAME], settings["r"], **settings)


def write(directory, settings, tensors):
    config = json.dumps({"peft_type": "LORA", "bias": "none", **settings})
    (directory / "adapter_config.json").write_text(config)
    safetensors.numpy.save_file(tensors, directory / "adapter_model.safetensors")


@pytest.mark.parametrize("inner", ["language_model.model.", "model.language_model."])
def test_adapters_of_a_multimodal_base(inner):
    """By transformers 4.50 and 4.51, and by those since."""
    settings, tensors = adapter()
    config, lora = peft.from_tensors(tensors, settings, ARCH)
    renamed = {k.replace(".model.layers.", f".{inner}layers."): x for k, x in tensors.items()}
    assert not renamed.keys() & tensors.keys()
    again, same = peft.from_tensors(renamed, settings, ARCH)
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, same, lora)


@pytest.mark.parametrize("rslora", [False, True])
def test_layers_of_other_ranks_and_scales(rslora):
    """Each layer adds alpha / r B A, or alpha / sqrt(r) B A, with its own r and alpha."""
    settings, tensors = adapter(**LAYERED, use_rslora=rslora)
    config, lora = peft.from_tensors(tensors, settings, ARCH)
    assert config.rank_of("attn/q_proj") == 6 and config.alpha_of("attn/q_proj") == 9
    assert config.rank_of("mlp/up_proj") == 3 and config.rank_of("mlp/down_proj") == 4
    params = common.tiny_params(NAME)
    after = merge(params, lora, config)
    for i, (rank, alpha) in enumerate(Q_PROJ):
        name = f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_"
        scale = alpha / (rank**0.5 if rslora else rank)
        want = scale * tensors[f"{name}B.weight"] @ tensors[f"{name}A.weight"]
        new, old = (np.asarray(p["layers"]["attn"]["q_proj"]["w"][i]) for p in (after, params))
        _, got = hf_tensor(ARCH, "layers/attn/q_proj/w", new - old, i)
        assert np.max(np.abs(got - want)) < 1e-6
    # The padding is zero on both sides, and stays so: neither side has a gradient there.
    leaves = lora["layers"]["attn"]["q_proj"]
    assert not np.any(leaves["a"][2, ..., 2:]) and not np.any(leaves["b"][2, 2:])
    assert np.all(leaves["a"][1]) and np.all(leaves["b"][1])


def test_of_what_all_layers_share_nothing_is_changed():
    """Bitwise, in the order of PEFT's own matrices."""
    settings, tensors = adapter(use_dora=True, rank_pattern={"v_proj": 2})
    config, lora = peft.from_tensors(tensors, settings, ARCH)
    assert config.variant == "dora" and config.scale_of("attn/v_proj") == 8 / 2
    back = peft.to_tensors(lora, ARCH)
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[k], v) for k, v in tensors.items())


@pytest.mark.parametrize(
    ("settings", "adapted"),
    [
        ({"layers_to_transform": 1}, {1}),
        ({"layers_to_transform": [0, 2], "layers_pattern": ["h", "layers"]}, {0, 2}),
        ({"exclude_modules": "model.layers.0.*"}, {1, 2}),
        ({"exclude_modules": ["layers.1.self_attn.q_proj"]}, {0, 2}),
        ({"target_modules": "model.layers.[01].self_attn.q_proj"}, {0, 1}),
        ({"target_modules": ["model.layers.2.self_attn.q_proj"], "layers_to_transform": 0}, {2}),
    ],
)
def test_layers_that_are_left_out_are_zero(settings, adapted):
    settings, tensors = adapter(**{"target_modules": ["q_proj"], **settings})
    keep = {
        k: v
        for k, v in tensors.items()
        if re.search(r"layers\.(\d).self_attn.q_proj", k) and int(k.split(".")[4]) in adapted
    }
    _, lora = peft.from_tensors(keep, settings, ARCH)
    assert list(modules(lora)) == ["attn/q_proj"]
    for leaf in modules(lora)["attn/q_proj"].values():
        assert {i for i in range(ARCH.layers) if np.any(leaf[i])} == adapted


@pytest.mark.parametrize(
    "setting",
    [
        {"peft_type": "LOHA"},
        {"bias": "all"},
        {"fan_in_fan_out": True},
        {"modules_to_save": ["lm_head"]},
        {"layer_replication": [[0, 2], [1, 3]]},
        {"target_parameters": ["mlp.experts"]},
        {"trainable_token_indices": [1]},
        {"lora_bias": True},
        {"use_qalora": True},
        {"use_bdlora": {"nblocks": 2}},
        {"alora_invocation_tokens": [5]},
        {"arrow_config": {"top_k": 2}},
        {"kasa_config": {"beta": 1e-4}},
        {"monteclora_config": {"num_samples": 2}},
        {"velora_config": {"scale": 1.0}},
        *({"init_lora_weights": i} for i in ("pissa", "pissa_niter_4", "olora", "corda", "loftq")),
        {"init_lora_weights": "lora_ga"},
        {"r": "8"},
        {"lora_alpha": None},
        {"target_modules": None},
        {"rank_pattern": [1]},
        {"lora_dropout": "x"},
        {"layers_to_transform": "0"},
    ],
)
def test_settings_that_are_refused_by_name(setting, tmp_path):
    settings, tensors = adapter()
    write(tmp_path, settings, tensors)
    peft.read(tmp_path, ARCH)
    write(tmp_path, settings | setting, tensors)
    with pytest.raises(UserError, match=rf"adapter_config.json: {next(iter(setting))} is "):
        peft.read(tmp_path, ARCH)


Q = "base_model.model.model.layers.1.self_attn.q_proj."


@pytest.mark.parametrize(
    ("settings", "tensors", "message"),
    [
        ({}, {f"{Q}lora_B.weight": None}, rf"lacks {Q}lora_B.weight"),
        ({"use_dora": True}, {f"{Q}lora_magnitude_vector": None}, rf"lacks {Q}lora_magnitude"),
        ({}, {f"{Q}lora_A.weight": np.ones((4, 31))}, r"q_proj.lora_A.weight is \[4, 31\], .*32\]"),
        (
            {"rank_pattern": {"layers.1.self_attn.q_proj": 5}},
            {},
            rf"{Q}lora_A.* expected \[5, 32\]",
        ),
        ({"r": 5}, {}, r"lora_A.weight is \[4, 32\], expected \[5, 32\]"),
        ({}, {f"{Q}lora_C.weight": np.ones(2)}, rf"1 tensors .* no place for: {Q}lora_C"),
        ({"layers_to_transform": 0}, {}, r"28 tensors .* no place for"),
        ({"target_modules": ["c_attn"]}, {}, r"\['c_attn'\] match no module .*q_proj"),
        ({"rank_pattern": {"q_proj": 0}}, {}, r"rank_pattern of 'q_proj' is 0"),
        ({"alpha_pattern": {"q_proj(": 2}}, {}, r"alpha_pattern is .*expected"),
        ({"target_modules": "(q_proj"}, {}, r"json: '\(q_proj' is no regular expression: missing"),
        ({"exclude_modules": "("}, {}, r"adapter_config.json: '\(' is no regular expression"),
        ({"use_dora": True, "layers_to_transform": [0, 1]}, {}, r"DoRA in 2 of the 3 layers"),
    ],
)
def test_tensors_that_are_refused_by_name(settings, tensors, message, tmp_path):
    stated, whole = adapter(use_dora=settings.get("use_dora", False))
    if "layers_to_transform" in settings and "use_dora" in settings:
        whole = {k: v for k, v in whole.items() if ".layers.2." not in k}
    changed = {k: v for k, v in (whole | tensors).items() if v is not None}
    write(tmp_path, stated | settings, changed)
    with pytest.raises(UserError, match=message):
        peft.read(tmp_path, ARCH)


def test_an_adapter_in_bfloat16(tmp_path):
    settings, tensors = adapter()
    half = {k: x.astype(ml_dtypes.bfloat16) for k, x in tensors.items()}
    write(tmp_path, settings, half)
    _, got = peft.read(tmp_path, ARCH)
    _, want = peft.from_tensors({k: x.astype(np.float32) for k, x in half.items()}, settings, ARCH)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_a_base_of_a_revision_is_named_with_it(tmp_path):
    config, lora = peft.from_tensors(*reversed(adapter()), ARCH)
    for revision in ("", "v1"):
        peft.export(tmp_path / "adapter", lora, config, ARCH, "org/name", revision=revision)
        stated = common.read_json(tmp_path / "adapter" / "adapter_config.json")
        assert stated["base_model_name_or_path"] == "org/name"
        assert stated["revision"] == (revision or None)


def test_files_that_are_missing_or_corrupt(tmp_path):
    with pytest.raises(UserError, match=r"adapter_config.json and adapter_model.safetensors miss"):
        peft.read(tmp_path, ARCH)
    write(tmp_path, *adapter())
    (tmp_path / "adapter_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match=r"adapter_model.safetensors cannot be read"):
        peft.read(tmp_path, ARCH)
    (tmp_path / "adapter_config.json").write_text("[1]")
    with pytest.raises(UserError, match=r"adapter_config.json holds a JSON list"):
        peft.read(tmp_path, ARCH)


def test_what_does_not_read_back_leaves_nothing(tmp_path, monkeypatch):
    settings, tensors = adapter()
    config, lora = peft.from_tensors(tensors, settings, ARCH)
    right = peft.to_tensors
    monkeypatch.setattr(
        peft, "to_tensors", lambda *args: {k: 2 * v for k, v in right(*args).items()}
    )
    with pytest.raises(UserError, match="does not read back"):
        peft.export(tmp_path / "adapter", lora, config, ARCH, "tiny")
    assert not list(tmp_path.iterdir())
