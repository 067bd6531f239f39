"""Checkpoints on disk -> our parameter tree; every way in which they can be wrong."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import common
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import TINY, tiny_weights, write_tiny
from tiny_tokenizer import write_tokenizer

from gemma_lora import arch as arch_module
from gemma_lora.arch import ARCHS, Arch
from gemma_lora.errors import UserError
from gemma_lora.files import sha256
from gemma_lora.model import Transformer
from gemma_lora.sharding import make_mesh
from gemma_lora.weights import mapping
from gemma_lora.weights.hf import Safetensors
from gemma_lora.weights.pretrained import load_base, open_weights

gguf = common.needs("gguf")

ONE = {"data": 1, "fsdp": 1, "tensor": 1}


def message(call, *args):
    """The error's text, which must be one line."""
    with pytest.raises(UserError) as e:
        call(*args)
    assert "\n" not in str(e.value)
    return str(e.value)


def load(pretrained, dtype=jnp.float32):
    """Our flat tree as numpy arrays, on one device."""
    model = Transformer(pretrained.arch, dtype, dtype)
    tree = load_base(pretrained, model, make_mesh(ONE, jax.devices()[:1]))
    return {k: np.asarray(v) for k, v in mapping.flatten(tree).items()}


def load_dir(directory, dtype=jnp.float32):
    return load(open_weights(str(directory), "auto"), dtype)


def same(a, b):
    assert a.keys() == b.keys()
    for k in a:
        assert a[k].dtype == b[k].dtype, k
        np.testing.assert_array_equal(a[k], b[k], err_msg=k)


# ---- values ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gemma", "gemma2", "gemma3", "qwen2", "qwen2_untied"])
def test_every_element_is_where_it_belongs(tmp_path, name):
    tree, w = load_dir(write_tiny(name, tmp_path)), tiny_weights(name)
    arch = Arch.from_hf(TINY[name])
    rng = np.random.default_rng(0)
    used = {"model.embed_tokens.weight", "model.norm.weight"}
    np.testing.assert_array_equal(tree["embed/w"], w["model.embed_tokens.weight"])
    np.testing.assert_array_equal(tree["final_norm/scale"], w["model.norm.weight"])
    if not arch.tied:
        used.add("lm_head.weight")
        np.testing.assert_array_equal(tree["head/w"], w["lm_head.weight"])
    d_, f_, h_ = arch.embed, arch.hidden, arch.head_dim

    def source(key, layer):
        used.add(key := f"model.layers.{layer}.{key}")
        return w[key]

    for layer in range(arch.layers):
        for _ in range(20):
            d, f, h = rng.integers(d_), rng.integers(f_), rng.integers(h_)
            for x, heads in (("q", arch.heads), ("k", arch.kv_heads), ("v", arch.kv_heads)):
                n = rng.integers(heads)
                got = tree[f"layers/attn/{x}_proj/w"][layer, d, n, h]
                assert got == source(f"self_attn.{x}_proj.weight", layer)[n * h_ + h, d]
                if arch.qkv_bias:
                    got = tree[f"layers/attn/{x}_proj/b"][layer, n, h]
                    assert got == source(f"self_attn.{x}_proj.bias", layer)[n * h_ + h]
            n = rng.integers(arch.heads)
            got = tree["layers/attn/o_proj/w"][layer, n, h, d]
            assert got == source("self_attn.o_proj.weight", layer)[d, n * h_ + h]
            for x in ("gate", "up"):
                got = tree[f"layers/mlp/{x}_proj/w"][layer, d, f]
                assert got == source(f"mlp.{x}_proj.weight", layer)[f, d]
            got = tree["layers/mlp/down_proj/w"][layer, f, d]
            assert got == source("mlp.down_proj.weight", layer)[d, f]
        norms = {"pre_attn_norm": "input_layernorm", "pre_mlp_norm": "post_attention_layernorm"}
        if arch.post_norms:
            norms = {
                "pre_attn_norm": "input_layernorm",
                "post_attn_norm": "post_attention_layernorm",
                "pre_mlp_norm": "pre_feedforward_layernorm",
                "post_mlp_norm": "post_feedforward_layernorm",
            }
        if arch.qk_norm:
            norms |= {f"attn/{x}_norm": f"self_attn.{x}_norm" for x in "qk"}
        for ours, theirs in norms.items():
            got = tree[f"layers/{ours}/scale"][layer]
            np.testing.assert_array_equal(got, source(f"{theirs}.weight", layer))
    assert used == w.keys()
    assert sum(x.size for x in tree.values()) == sum(x.size for x in w.values())


@pytest.mark.parametrize("stored", [ml_dtypes.bfloat16, np.float16, np.float32, np.float64])
def test_stored_dtypes(tmp_path, stored):
    directory = write_tiny("gemma3", tmp_path)
    weights = {k: v.astype(stored) for k, v in tiny_weights("gemma3").items()}
    save_file(weights, directory / "model.safetensors")
    for dtype in (jnp.float32, jnp.bfloat16):
        tree = load_dir(directory, dtype)
        want = weights["model.embed_tokens.weight"].astype(dtype)
        assert tree["embed/w"].dtype == dtype
        np.testing.assert_array_equal(tree["embed/w"], want)
        scale = weights["model.layers.3.input_layernorm.weight"].astype(np.float32)
        assert tree["layers/pre_attn_norm/scale"].dtype == np.float32  # whatever the model's dtype
        np.testing.assert_array_equal(tree["layers/pre_attn_norm/scale"][3], scale)


def test_a_tied_head_written_out_is_accepted(tmp_path):
    directory = write_tiny("gemma3", tmp_path)
    want = load_dir(directory)
    weights = tiny_weights("gemma3")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    save_file(weights, directory / "model.safetensors")
    same(load_dir(directory), want)


def test_a_file_loads_as_its_directory(tmp_path):
    directory = write_tiny("qwen2", tmp_path)
    file = open_weights(str(directory / "model.safetensors"), "auto")
    same(load(file), load_dir(directory))


# ---- reading only what is needed ------------------------------------------------------------


class Recorder:
    def __init__(self, tensors):
        self.tensors, self.reads = tensors, []

    def names(self):
        return self.tensors.names()

    def shape(self, name):
        return self.tensors.shape(name)

    def read(self, name):
        self.reads.append(name)
        return self.tensors.read(name)


def test_each_tensor_is_read_once_and_mapped(tmp_path):
    pretrained = open_weights(str(write_tiny("qwen2_untied", tmp_path)), "auto")
    recorder = Recorder(pretrained.tensors)
    load(dataclasses.replace(pretrained, tensors=recorder))
    assert sorted(recorder.reads) == sorted(pretrained.tensors.names())
    # Converting is a view of the mapped file: pages of a slice that is not asked for never load.
    arch = pretrained.arch
    q = pretrained.tensors.read("model.layers.0.self_attn.q_proj.weight")
    shaped = mapping._converter("layers/attn/q_proj/w", False)(
        q, (arch.embed, arch.heads, arch.head_dim)
    )
    assert isinstance(q, np.memmap) and np.shares_memory(shaped, q)


SHARDED = """
import dataclasses, sys, jax, jax.numpy as jnp, numpy as np
from gemma_lora.model import Transformer
from gemma_lora.sharding import make_mesh
from gemma_lora.weights.mapping import flatten
from gemma_lora.weights.pretrained import load_base, open_weights
from test_weights import Recorder
assert jax.device_count() == 8
pretrained = open_weights(sys.argv[1], "auto")
model = Transformer(pretrained.arch, jnp.float32, jnp.float32)
alone = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
one = flatten(load_base(pretrained, model, alone))
recorder = Recorder(pretrained.tensors)
sharded = dataclasses.replace(pretrained, tensors=recorder)
eight = flatten(load_base(sharded, model, make_mesh({"data": 1, "fsdp": 4, "tensor": 2})))
for path, x in eight.items():
    np.testing.assert_array_equal(np.asarray(x), np.asarray(one[path]), err_msg=path)
parts = {path: x.size // x.addressable_shards[0].data.size for path, x in eight.items()}
assert parts["layers/mlp/gate_proj/w"] == 8 and parts["embed/w"] == 8, parts
assert recorder.reads.count("model.embed_tokens.weight") == 1
print("ok")
"""


def test_eight_devices_hold_the_same_values(tmp_path):
    here = pathlib.Path(__file__).parent
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": f"{here}{os.pathsep}{here.parent}",
    }
    done = subprocess.run(
        [sys.executable, "-c", SHARDED, str(write_tiny("gemma2", tmp_path))],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and done.stdout == "ok\n", done.stderr


# ---- shards and damaged files ---------------------------------------------------------------


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
    text = message(load, open_weights(str(directory / shards[0]), "auto"))
    assert "tensors missing" in text
    (directory / shards[1]).unlink()
    text = message(load_dir, directory)
    assert "names shards that are not there" in text and shards[1] in text
    assert shards[0] not in text
    for broken in ("{", "[]", '{"weight_map": 3}'):
        (directory / "model.safetensors.index.json").write_text(broken)
        assert "index.json is corrupt" in message(load_dir, directory)


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


# ---- wrong tensors --------------------------------------------------------------------------


def changed(tmp_path, change, name="gemma3"):
    directory = write_tiny(name, tmp_path)
    weights = tiny_weights(name)
    change(weights)
    save_file(weights, directory / "model.safetensors")
    return message(load_dir, directory)


def test_an_unknown_tensor_is_named(tmp_path):
    text = changed(tmp_path, lambda w: w.update({"model.extra": np.zeros(3, np.float32)}))
    assert "0 tensors missing (none), 1 unknown (model.extra)" in text


def test_a_missing_tensor_is_named(tmp_path):
    text = changed(tmp_path, lambda w: w.pop("model.layers.4.mlp.up_proj.weight"))
    assert "1 tensors missing (model.layers.4.mlp.up_proj.weight), 0 unknown" in text


def test_a_renamed_tensor_is_suggested(tmp_path):
    def rename(w):
        w["model.layers.4.mlp.upproj.weight"] = w.pop("model.layers.4.mlp.up_proj.weight")

    assert "did you mean model.layers.4.mlp.upproj.weight?" in changed(tmp_path, rename)


def test_an_untied_model_needs_its_head(tmp_path):
    text = changed(tmp_path, lambda w: w.pop("lm_head.weight"), "qwen2_untied")
    assert "missing (lm_head.weight)" in text


def test_a_misshapen_tensor_is_named(tmp_path):
    def transpose(w):
        name = "model.layers.0.mlp.up_proj.weight"
        w[name] = np.ascontiguousarray(w[name].T)

    text = changed(tmp_path, transpose)
    assert "model.layers.0.mlp.up_proj.weight is [32, 64], expected [64, 32]" in text


def test_a_name_held_twice_is_named(tmp_path):
    pretrained = open_weights(str(write_tiny("gemma", tmp_path)), "auto")
    recorder = Recorder(pretrained.tensors)
    names = recorder.names()
    recorder.names = lambda: [*names, names[3]]
    text = message(load, dataclasses.replace(pretrained, tensors=recorder))
    assert "twice" in text and names[3] in text and not recorder.reads


# ---- open_weights ---------------------------------------------------------------------------


def test_missing_weights_suggest_the_nearest(tmp_path):
    write_tiny("gemma3", tmp_path / "gemma-tiny")
    text = message(open_weights, str(tmp_path / "gema-tiny"), "auto")
    assert "do not exist" in text and "'demo'" in text and "did you mean gemma-tiny?" in text
    assert "do not exist" in message(open_weights, str(tmp_path / "a" / "b"), "auto")
    (tmp_path / "empty").mkdir()
    assert "no weights in" in message(open_weights, str(tmp_path / "empty"), "gemma3_1b")
    assert "no config.json in" in message(open_weights, str(tmp_path / "empty"), "auto")


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
    for broken in ("{", "[1]"):
        (directory / "config.json").write_text(broken)
        assert "config.json is corrupt" in message(open_weights, str(directory), "auto")
    (directory / "config.json").write_text('{"model_type": "llama"}')
    assert "model_type 'llama' is not supported" in message(open_weights, str(directory), "auto")


def test_the_tokenizer_is_where_the_weights_are_or_where_it_is_said_to_be(tmp_path):
    directory = write_tiny("gemma3", tmp_path / "model")
    assert "no tokenizer in" in message(open_weights(str(directory), "auto").tokenizer)
    write_tokenizer(tmp_path / "tokenizer")
    other = open_weights(str(directory), "auto", tokenizer=str(tmp_path / "tokenizer"))
    write_tokenizer(directory)
    for pretrained in (other, open_weights(str(directory / "model.safetensors"), "auto")):
        tokenizer = pretrained.tokenizer()
        assert tokenizer.add_bos and tokenizer.bos_id == 2
        assert tokenizer.decode(tokenizer.encode("2 + 2\n= 4")) == "2 + 2\n= 4"


# ---- GGUF -----------------------------------------------------------------------------------


@pytest.fixture
def tiny_arch(monkeypatch):
    monkeypatch.setitem(ARCHS, "tiny", Arch.from_hf(TINY["gemma3"]))
    assert arch_module.get_arch("tiny").embed == 32


def write_gguf(path, kind="gemma3", **changes):
    """TINY['gemma3'] as llama.cpp's converter writes it: its names, and 1 added to the norms."""
    arch = Arch.from_hf(TINY["gemma3"])
    writer = gguf.GGUFWriter(path, kind)
    facts = {
        "block_count": arch.layers,
        "embedding_length": arch.embed,
        "feed_forward_length": arch.hidden,
        "attention.head_count": arch.heads,
        "attention.head_count_kv": arch.kv_heads,
        "attention.key_length": arch.head_dim,
        "attention.sliding_window": arch.window,
    } | changes
    for key, value in facts.items():
        writer.add_uint32(f"{kind}.{key}", value)
    writer.add_float32(f"{kind}.rope.freq_base", arch.rope_base)
    table = mapping.names(arch, "hf"), mapping.names(arch, "gguf")
    rename = {
        hf.format(i=i): table[1][ours].format(i=i)
        for ours, hf in table[0].items()
        for i in range(arch.layers)
    }
    for name, w in tiny_weights("gemma3").items():
        writer.add_tensor(rename[name], w + 1 if "norm" in name else w)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def test_gguf_loads_as_safetensors_do(tmp_path, tiny_arch):
    want = load_dir(write_tiny("gemma3", tmp_path))
    got = load(open_weights(write_gguf(tmp_path / "tiny.gguf"), "tiny"))
    assert got.keys() == want.keys()
    for path, x in want.items():
        # (w + 1) - 1 is w but for its last bits.
        rounding = 3e-7 if path.endswith("/scale") else 0
        np.testing.assert_allclose(got[path], x, rtol=0, atol=rounding, err_msg=path)


def test_gguf_names_are_llama_cpps(tmp_path):
    """Our column of names against the gguf package's own table."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, 7)
    arch = Arch.from_hf(TINY["gemma3"])
    for ours, hf in mapping.names(arch, "hf").items():
        if ours.endswith("/b") or ours == "head/w":
            continue
        theirs = names.get_name(hf.format(i=3).removesuffix(".weight"))
        assert f"{theirs}.weight" == mapping.names(arch, "gguf")[ours].format(i=3)


def test_gguf_of_another_model(tmp_path, tiny_arch):
    path = write_gguf(tmp_path / "tiny.gguf")
    assert "gemma3_270m" in message(open_weights, path, "auto")
    text = message(open_weights, path, "gemma2_2b")
    assert "holds a gemma3 model" in text and "gemma2_2b is of gemma2" in text
    text = message(open_weights, path, "gemma3_1b")
    assert "embed is 32, arch says 1152" in text and "heads" not in text.split("embed")[0]
    path = write_gguf(tmp_path / "llama.gguf", kind="llama")
    assert "holds a llama model" in message(open_weights, path, "tiny")
    path = write_gguf(tmp_path / "wide.gguf", **{"feed_forward_length": 65})
    assert "hidden is 65, arch says 64" in message(open_weights, path, "tiny")
