"""Hugging Face directories: shards, image parts, damaged files."""

import json

import numpy as np
import pytest
from common import message
from loading import load, load_dir, same
from safetensors.numpy import load_file, save_file
from tiny import tiny_weights, write_tiny

from gemma_lora.weights.hf import Safetensors
from gemma_lora.weights.pretrained import open_weights


def test_a_file_loads_as_its_directory(tmp_path):
    directory = write_tiny("qwen2", tmp_path)
    file = open_weights(str(directory / "model.safetensors"), "auto")
    same(load(file), load_dir(directory))


def shard(directory, count=3):
    """Splits model.safetensors into shards with an index, as the Hub has large models."""
    file = directory / "model.safetensors"
    weights = load_file(file)
    file.unlink()
    index = {}
    for i in range(count):
        name = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        part = dict(list(weights.items())[i::count])
        save_file(part, directory / name, metadata={"format": "pt"})
        index |= dict.fromkeys(part, name)
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": index})
    (directory / "model.safetensors.index.json").write_text(text)
    return sorted(set(index.values()))


def test_shards(tmp_path):
    directory = write_tiny("gemma2", tmp_path)
    want = load_dir(directory)
    shards = shard(directory)
    same(load_dir(directory), want)
    text = message(open_weights, str(directory / shards[0]), "auto")
    assert f"is one of {len(shards)} shards: expected the directory" in text
    (directory / shards[1]).unlink()
    text = message(load_dir, directory)
    assert "names shards that are not there" in text and shards[1] in text
    assert shards[0] not in text
    for broken in (
        "{",
        "[]",
        '{"weight_map": 3}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {}}',
    ):
        (directory / "model.safetensors.index.json").write_text(broken)
        assert "index.json is corrupt" in message(load_dir, directory)


def test_one_file_beside_shards_is_what_counts(tmp_path):
    """As to transformers: of a directory in which a model was saved again."""
    directory = write_tiny("gemma2", tmp_path)
    want = load_dir(directory)
    whole = (directory / "model.safetensors").read_bytes()
    for name in shard(directory):
        doubled = {k: 2 * x for k, x in load_file(directory / name).items()}
        save_file(doubled, directory / name)
    (directory / "model.safetensors").write_bytes(whole)
    same(load_dir(directory), want)


def test_a_tensor_in_two_shards_is_named(tmp_path):
    directory = write_tiny("gemma2", tmp_path)
    shards = shard(directory)
    twice = "model.norm.weight"
    for name in shards:
        part = load_file(directory / name)
        part[twice] = np.zeros(32, np.float32)
        save_file(part, directory / name)
    text = message(load_dir, directory)
    assert twice in text and shards[0] in text and shards[1] in text


def with_header(path, header):
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 16)
    return path


def test_damaged_files(tmp_path):
    directory = write_tiny("gemma", tmp_path)
    path = directory / "model.safetensors"
    whole = path.read_bytes()
    for size in (0, 5, 200, len(whole) - 1):
        path.write_bytes(whole[:size])
        text = message(Safetensors, path)
        assert str(path) in text and ("truncated" in text or "corrupt" in text)
    path.write_bytes(whole + b"\0")
    assert "corrupt" in message(Safetensors, path)
    path.write_bytes(whole[:8] + b"\xff" * 40 + whole[48:])
    assert "header is not JSON" in message(Safetensors, path)
    path.write_bytes(b"PK\3\4" + whole[4:])  # a PyTorch .bin
    assert "no safetensors file" in message(Safetensors, path)
    good = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
    assert Safetensors(with_header(path, {"a": good})).read("a").shape == (2, 2)
    for change in ({"shape": [3, 2]}, {"dtype": "BF16"}, {"data_offsets": [8, 16]}):
        text = message(Safetensors, with_header(path, {"a": good | change}))
        assert "corrupt: tensor a is" in text
    for header in ([], {"a": 3}, {"a": {}}, {"a": good | {"data_offsets": []}}, {"a": [1]}):
        assert "does not describe tensors" in message(Safetensors, with_header(path, header))
    integers = Safetensors(with_header(path, {"a": good | {"dtype": "I32"}}))
    text = message(integers.read, "a")
    assert "tensor a is I32" in text and "BF16" in text


# ---- the text model of a multimodal checkpoint ----------------------------------------------

# How transformers has called it: 4.50 and the Hub, 4.52 and later, and in between.
SPELLINGS = {
    "hub": ("language_model.", "vision_tower.", "multi_modal_projector."),
    "new": ("model.language_model.", "model.vision_tower.", "model.multi_modal_projector."),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("head", ["", "lm_head.weight", "language_model.lm_head.weight"])
def test_multimodal_names(tmp_path, spelling, head):
    directory = write_tiny("gemma3", tmp_path)
    want = load_dir(directory)
    text, vision, projector = SPELLINGS[spelling]
    weights = tiny_weights("gemma3")
    old = "" if spelling == "hub" else "model."
    renamed = {text + name.removeprefix(old): w for name, w in weights.items()}
    if head:
        renamed[head] = weights["model.embed_tokens.weight"]
    renamed[f"{vision}vision_model.embeddings.position_embedding.weight"] = np.zeros((4, 4))
    renamed[f"{projector}mm_input_projection_weight"] = np.zeros((4, 4))
    save_file(renamed, directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    both = {"model_type": "gemma3", "text_config": config, "vision_config": {}}
    (directory / "config.json").write_text(json.dumps(both))
    opened = open_weights(str(directory), "auto")
    assert opened.notice == "Text only: 2 tensors of its image parts are left out"
    same(load(opened), want)
    # Only these are left out.
    save_file(renamed | {"audio_tower.w": np.zeros(2)}, directory / "model.safetensors")
    assert "1 unknown (audio_tower.w)" in message(load_dir, directory)


def test_one_tensor_under_two_spellings_is_named(tmp_path):
    directory = write_tiny("gemma3", tmp_path)
    weights = tiny_weights("gemma3")
    weights["language_model.model.norm.weight"] = weights["model.norm.weight"]
    save_file(weights, directory / "model.safetensors")
    assert "tensor model.norm.weight is in" in message(load_dir, directory)
