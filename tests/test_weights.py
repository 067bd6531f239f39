"""Named tensors -> our parameter tree: every element, how little is read, how errors are named."""

import dataclasses
import mmap
import pathlib
import tracemalloc
import weakref

import common
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from common import message
from loading import Recorder, load, load_dir, same
from safetensors.numpy import load_file, save_file
from tiny import TINY, tiny_weights, write_tiny

from gemma_lora.arch import ARCHS, Arch
from gemma_lora.weights import mapping
from gemma_lora.weights.pretrained import Pretrained, fingerprint, open_weights

pytestmark = pytest.mark.usefixtures("quick")

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


@pytest.mark.parametrize("name", ["gemma", "gemma3", "qwen2_untied"])
def test_one_leaf_at_a_time_there_and_back(tmp_path, name):
    """read_leaf gives what load does; hf_tensor gives the file's own tensors again."""
    pretrained = open_weights(str(write_tiny(name, tmp_path)), "auto")
    tree, again = load(pretrained), {}
    for ours, whole in tree.items():
        layered = ours.startswith("layers/")
        for i in range(pretrained.arch.layers) if layered else (None,):
            leaf = mapping.read_leaf(pretrained.tensors, "hf", pretrained.arch, ours, i)
            np.testing.assert_array_equal(leaf, whole[i] if layered else whole)
            key, array = mapping.hf_tensor(pretrained.arch, ours, leaf, i)
            assert key not in again
            again[key] = array
    same(again, tiny_weights(name))


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
    other = weights["lm_head.weight"].copy()
    other[-1, -1] += 1
    for head in (other, other[:-1]):
        save_file(weights | {"lm_head.weight": head}, directory / "model.safetensors")
        text = message(load_dir, directory)
        assert "lm_head.weight is not model.embed_tokens.weight" in text


@pytest.mark.parametrize("form", mapping.FORMS)
def test_every_format_has_a_place_for_every_leaf(form):
    """For every listed model of its families: letters, and as many elements as ours."""
    families = {"flax": "gemma", "keras_gemma": "gemma", "keras_qwen": "qwen"}.get(form, "")
    for name, arch in ARCHS.items():
        if not arch.family.startswith(families):
            continue
        for ours, row in mapping.stored(arch, form).items():
            letters, size = mapping._place(arch, ours)
            for way, shape in mapping._shapes(row, size).items():
                assert sorted("".join(mapping._axes(way))) == sorted(letters), (name, ours)
                whole = np.prod(shape) / (row.part[1] if row.part else 1)
                assert whole == np.prod([size[c] for c in letters]), (name, ours)


def test_a_model_that_a_format_cannot_hold():
    text = message(mapping.stored, ARCHS["qwen2_7b"], "flax")
    assert "form 'flax' has no place for head/w, layers/attn/k_proj/b" in text


def test_a_scale_an_output_channel():
    w = np.array([[1.0, -2.0, 0.0], [0.5, 4.0, 0.0]], np.float32)
    q, scale = mapping.quantize_int8(w, (0,))
    np.testing.assert_allclose(scale, [1 / 127, 4 / 127, 1.0])
    assert q.dtype == np.int8
    np.testing.assert_array_equal(q, [[127, -64, 0], [64, 127, 0]])  # 63.5 is rounded to even
    q, scale = mapping.quantize_int8(w.astype(ml_dtypes.bfloat16), (1,))
    np.testing.assert_allclose(scale, [2 / 127, 4 / 127])
    assert np.max(np.abs(q * scale[:, None] - w)) <= np.max(scale) / 2


@pytest.mark.parametrize("name", ["gemma2", "qwen2"])
def test_loading_in_8_bits(tmp_path, name):
    pretrained = open_weights(str(write_tiny(name, tmp_path)), "auto")
    whole, tree = load(pretrained), load(pretrained, jnp.bfloat16, quantize="int8")
    inputs = {"o_proj": (1, 2)}
    seen = 0
    for path, x in tree.items():
        if path.endswith("_proj/w"):
            assert x.dtype == np.int8
            q, scale = x.astype(np.float32), tree[f"{path}_scale"]
            axes = inputs.get(path.split("/")[2], (1,))
            want = np.stack(
                [mapping.quantize_int8(w, tuple(a - 1 for a in axes))[1] for w in whole[path]]
            )
            np.testing.assert_array_equal(scale, want)
            wide = np.expand_dims(scale, axes)
            assert np.all(np.abs(q * wide - whole[path]) <= wide * 0.5001), path
            assert np.all(np.max(np.abs(q), axes) == 127)
            seen += 1
        elif not path.endswith("w_scale"):
            np.testing.assert_array_equal(x, whole[path].astype(x.dtype), err_msg=path)
    assert seen == 7 and len(tree) == len(whole) + 7


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_have_no_8_bits(tmp_path, bad):
    path, name = write_tiny("qwen2", tmp_path), "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(path / "model.safetensors")
    tensors[name][3, 0] = bad
    save_file(tensors, path / "model.safetensors")
    text = message(load, open_weights(str(path), "auto"), jnp.float32, "int8")
    assert f"{name}: got a NaN or an infinity, expected finite weights to store as int8" in text


# ---- reading only what is needed ------------------------------------------------------------


def test_each_tensor_is_read_once_and_mapped(tmp_path):
    pretrained = open_weights(str(write_tiny("qwen2_untied", tmp_path)), "auto")
    recorder = Recorder(pretrained.tensors)
    load(dataclasses.replace(pretrained, tensors=recorder))
    assert sorted(recorder.reads) == sorted(pretrained.tensors.names())
    # Converting is a view of the mapped file: pages of a slice that is not asked for never load.
    owner = mapping.read_leaf(pretrained.tensors, "hf", pretrained.arch, "layers/attn/q_proj/w", 0)
    while isinstance(owner, np.ndarray):
        owner = owner.base
    assert isinstance(owner, mmap.mmap)


class Meter(Recorder):
    """Makes tensors on demand and knows how many bytes of them are alive at most."""

    def __init__(self, shapes):
        super().__init__(None)
        self.shapes, self.live, self.peak = shapes, {}, 0

    def names(self):
        return list(self.shapes)

    def shape(self, name):
        return self.shapes[name]

    def read(self, name):
        self.reads.append(name)
        x = np.full(self.shapes[name], len(name), np.float32)
        key = object()
        self.live[key] = x.nbytes
        weakref.finalize(x, self.live.pop, key)  # on whichever thread lets go last
        self.peak = max(self.peak, self.alive)
        return x

    @property
    def alive(self):
        return sum(tuple(self.live.values()))


def metered(form="hf"):
    """A model of 10 layers of which no tensor is larger than 1 MiB, and that size."""
    config = TINY["gemma3"] | {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 10,
    }
    arch = Arch.from_hf(config)
    shapes = {}
    for ours, row in mapping.stored(arch, form).items():
        (shape, *_) = mapping._shapes(row, mapping._place(arch, ours)[1]).values()
        for i in range(arch.layers) if ours.startswith("layers/") else (None,):
            shapes[row.name.format(i=i)] = shape
    meter = Meter(shapes)
    home = pathlib.Path()
    return Pretrained(arch, meter, form, None, "", "", home, {}), 4 * max(
        map(np.prod, shapes.values())
    )


# Bytes of a layer's norms and the final one, at most. They are float32, and so the device's own on
# a CPU, which lets go of a layer's after it has said that it is done with them.
NORMS = 8192


# Quantising makes float32 copies. A stack of 10 layers would be 5 or more of the largest.
@pytest.mark.parametrize(
    ("form", "quantize", "limit"), [("hf", "", 2), ("flax", "", 2), ("hf", "int8", 5)]
)
def test_one_tensor_at_a_time_is_in_memory(form, quantize, limit):
    pretrained, largest = metered(form)
    load(pretrained, jnp.bfloat16, quantize)  # compiles
    pretrained, largest = metered(form)
    tracemalloc.start()  # counts numpy's arrays, not those on jax's devices
    try:
        load(pretrained, jnp.bfloat16, quantize)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    meter = pretrained.tensors
    assert sorted(meter.reads) == sorted(meter.shapes)
    # The next one, and the last.
    assert meter.peak <= 2 * largest + NORMS and meter.alive <= NORMS
    assert peak <= (limit + 1.1) * largest


SHARDED = """
import dataclasses, sys, jax, jax.numpy as jnp, numpy as np
from gemma_lora.model import Transformer
from gemma_lora.sharding import make_mesh
from gemma_lora.weights.mapping import flatten
from gemma_lora.weights.pretrained import fingerprint, load_base, open_weights
from test_weights import NORMS, Recorder, metered
assert jax.device_count() == 8
pretrained = open_weights(sys.argv[1], "auto")
alone = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
mesh = make_mesh({"data": 1, "fsdp": 4, "tensor": 2})
for quantize in ("", "int8"):
    model = Transformer(pretrained.arch, jnp.float32, jnp.float32, quantize=quantize)
    one = load_base(pretrained, model, alone)
    recorder = Recorder(pretrained.tensors)
    sharded = dataclasses.replace(pretrained, tensors=recorder)
    eight = load_base(sharded, model, mesh)
    assert fingerprint(one) == fingerprint(eight)
    one, eight = flatten(one), flatten(eight)
    for path, x in eight.items():
        assert x.dtype == one[path].dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(one[path]), err_msg=path)
    parts = {path: x.size // x.addressable_shards[0].data.size for path, x in eight.items()}
    assert parts["layers/mlp/gate_proj/w"] == 8 and parts["embed/w"] == 8, parts
    assert sorted(recorder.reads) == sorted(pretrained.tensors.names())
pretrained, largest = metered()
load_base(pretrained, Transformer(pretrained.arch, param_dtype=jnp.bfloat16), mesh)
assert pretrained.tensors.peak <= 2 * largest + NORMS
print("equal")
"""


def test_eight_devices_hold_the_same_values(tmp_path):
    common.on_eight_devices(SHARDED, str(write_tiny("gemma2", tmp_path)))


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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_fingerprint_sees_what_was_changed_moved_or_negated(dtype):
    x = jnp.arange(1, 25).reshape(2, 3, 4).astype(dtype)
    others = (x, x[::-1], x[:, ::-1], x[:, :, ::-1], -x, x.at[1, 2, 3].add(1))
    found = [fingerprint({"layers": {"w": each}}) for each in others]
    found += [fingerprint({"layers": {"w": x}, "embed": {"w": each}}) for each in others]
    assert len(set(found)) == len(found) and all(len(f) == 8 for f in found)
    two = fingerprint({"layers": {"a": x, "b": -x}}), fingerprint({"layers": {"a": -x, "b": x}})
    assert two[0] != two[1]
