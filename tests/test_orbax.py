"""Official Flax checkpoints, written by orbax in both layouts, against the gemma package."""

import json
import pathlib
import shutil

import flax_layout
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny
from common import message
from loading import load, logits, same
from safetensors.numpy import save_file

from gemma_lora.arch import ARCHS, Arch
from gemma_lora.weights import orbax, peft
from gemma_lora.weights.pretrained import open_weights

pytestmark = pytest.mark.usefixtures("quick")

GOLDENS = pathlib.Path(__file__).parent / "goldens"


@pytest.fixture(autouse=True)
def listed(monkeypatch):
    """The tiny models are archs as the published ones are."""
    for name, (config, _) in flax_layout.CONFIGS.items():
        monkeypatch.setitem(ARCHS, f"tiny_{name}", Arch.from_hf(config))


def write(tree, directory) -> str:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory, tree)
    return str(directory)


@pytest.mark.parametrize("name", flax_layout.CONFIGS)
def test_logits_are_those_of_the_gemma_package(name, tmp_path):
    golden, tree = np.load(GOLDENS / f"flax_{name}.npz"), flax_layout.flat(name)
    leaves = [x for leaves in tree.values() for x in leaves.values()]
    assert tiny.checksum(tiny.tokens(), *leaves) == golden["checksum"]
    assert flax_layout.keys(tree) == golden["keys"].tolist()
    opened = open_weights(write(tree, tmp_path / "flat"), "auto")
    assert (opened.form, opened.arch, opened.notice) == ("flax", ARCHS[f"tiny_{name}"], "")
    got = logits(opened, tiny.tokens())[:, ::4]
    assert np.max(np.abs(got - golden["logits"])) <= 1e-4
    assert np.max(np.abs(got)) > 3  # they say something

    # The same numbers, bit by bit, by way of the other layout and of safetensors.
    want = load(opened)
    saved = open_weights(write(flax_layout.nested(tree), tmp_path / "nested"), f"tiny_{name}")
    same(load(saved), want)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(flax_layout.CONFIGS[name][0]))
    save_file(flax_layout.weights(name), tmp_path / "hf" / "model.safetensors")
    same(load(open_weights(str(tmp_path / "hf"), "auto")), want)


def test_the_old_array_format_and_bfloat16(tmp_path):
    """Without OCDBT: a directory an array, as older releases wrote."""
    tree = flax_layout.flat("gemma2")
    tree = {k: {leaf: x.astype("bfloat16") for leaf, x in v.items()} for k, v in tree.items()}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
        checkpointer.save(tmp_path / "old", tree)
    opened = open_weights(str(tmp_path / "old"), "auto")
    want = tree["transformer/layer_1/mlp/linear"]["w"]
    assert opened.tensors.read("layer_1/mlp/linear/w").dtype == want.dtype
    np.testing.assert_array_equal(
        load(opened)["layers/mlp/down_proj/w"][1], want.astype(np.float32)
    )


@pytest.mark.parametrize("rows", [120, 136])
def test_the_number_of_words_follows_the_table(rows, tmp_path):
    """Gemma 1 and 2 have spare rows, which are no words; Gemma 3 lacks those for images."""
    tree = flax_layout.flat("gemma2")
    table = tree["transformer/embedder"]["input_embedding"]
    tree["transformer/embedder"]["input_embedding"] = np.resize(table, (rows, table.shape[1]))
    opened = open_weights(write(tree, tmp_path / "c"), "auto")
    assert opened.arch.vocab == min(rows, 128)
    np.testing.assert_array_equal(load(opened)["embed/w"], table[:rows])


def test_image_parts_are_left_out_and_named(tmp_path):
    tree = flax_layout.flat("gemma")
    text = open_weights(write(tree, tmp_path / "text"), "auto")
    want = load(text)
    more = np.zeros(3, np.float32)
    tree["SigLiPFromPatches_0/siglip_encoder/pos_embedding"] = {"w": more}
    tree["transformer/embedder/mm_soft_embedding_norm"] = {"scale": more}
    both = open_weights(write(tree, tmp_path / "both"), "auto")
    assert both.notice == "Text only: 2 tensors of its image parts are left out"
    same(load(both), want)
    # The adapter is named for Hugging Face's model of the same weights, which has them, too.
    assert both.inner == peft.INNER and not text.inner


def test_each_tensor_is_restored_alone(tmp_path, monkeypatch):
    opened = open_weights(write(flax_layout.flat("gemma_mha"), tmp_path / "c"), "auto")
    real, restored = ocp.PyTreeCheckpointer.restore, []

    def restore(self, directory, args):
        found = real(self, directory, args=args)
        restored.append([f"{path}/{leaf}" for path, x in found.items() for leaf in x])
        return found

    monkeypatch.setattr(ocp.PyTreeCheckpointer, "restore", restore)
    load(opened)
    assert all(len(names) == 1 for names in restored)
    # Once each, though q, k and v share a tensor.
    assert len(restored) == len({names[0] for names in restored}) == len(opened.tensors.names())


def test_kaggles_directory(tmp_path):
    """tokenizer.model and the checkpoint side by side."""
    tree = flax_layout.flat("gemma")
    write(tree, tmp_path / "2b")
    (tmp_path / "tokenizer.model").write_bytes(b"")
    opened = open_weights(str(tmp_path), "auto")
    same(load(opened), load(open_weights(str(tmp_path / "2b"), "auto")))
    shutil.copytree(tmp_path / "2b", tmp_path / "2b-it")
    text = message(open_weights, str(tmp_path), "auto")
    assert "expected one orbax checkpoint, found 2b, 2b-it" in text


def test_a_model_that_is_not_listed_needs_its_arch(tmp_path, monkeypatch):
    path = write(flax_layout.flat("gemma2"), tmp_path / "c")
    arch = ARCHS["tiny_gemma2"]
    monkeypatch.delitem(ARCHS, "tiny_gemma2")
    text = message(open_weights, path, "auto")
    assert "does not say which model this is; give one of gemma_2b" in text
    text = message(open_weights, path, "gemma2_2b")
    assert "not of arch gemma2_2b" in text and "embed is 32, arch says 2304" in text
    text = message(open_weights, path, "tiny_gemma")
    assert "kv_heads is 2, arch says 1" in text and "post_norms is True" in text
    monkeypatch.setitem(ARCHS, "mine", arch)
    assert open_weights(path, "mine").arch == arch


def test_other_trees_and_damage(tmp_path):
    other = {"params": {"dense": {"kernel": np.zeros((2, 2), np.float32)}}}
    text = message(open_weights, write(other, tmp_path / "other"), "auto")
    assert "no Gemma checkpoint" in text and "got params/dense/kernel" in text
    tree = flax_layout.flat("gemma2")
    tree["transformer/layer_1/attn/lora"] = {"w": np.zeros(2, np.float32)}
    del tree["transformer/layer_2/mlp/linear"]
    text = message(load, open_weights(write(tree, tmp_path / "c"), "auto"))
    assert "missing (layer_2/mlp/linear/w), 1 unknown (layer_1/attn/lora/w)" in text
    tree = flax_layout.flat("gemma2")
    linear = tree["transformer/layer_1/mlp/linear"]
    linear["w"] = np.ascontiguousarray(linear["w"].T)
    text = message(load, open_weights(write(tree, tmp_path / "d"), "auto"))
    assert "layer_1/mlp/linear/w is [32, 64], expected [64, 32]" in text
    tree["transformer/layer_1/mlp/gating_einsum"]["w"] = np.zeros((2, 8, 8), np.float32)
    text = message(load, open_weights(write(tree, tmp_path / "e"), "auto"))
    assert "gating_einsum/w is [2, 8, 8], expected [2, 32, 64] or [2, 64, 32]" in text
    opened = open_weights(write(flax_layout.flat("gemma"), tmp_path / "f"), "auto")
    shutil.rmtree(tmp_path / "f" / "d")
    for file in (tmp_path / "f").glob("ocdbt.process_*/d/*"):
        file.unlink()
    assert "cannot be read" in message(opened.tensors.read, "layer_0/mlp/linear/w")
    (tmp_path / "f" / "_METADATA").write_text("{")
    assert "no readable orbax checkpoint" in message(orbax.Orbax, tmp_path / "f")
