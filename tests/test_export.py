"""Exports of a run: what is written, by numpy and by transformers."""

import functools
import json
from pathlib import Path

import common
import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import safetensors.numpy
import tiny
import tiny_run
import tiny_tokenizer
from tiny_export import (
    ALPHA,
    RANK,
    adapter_of,
    edit,
    load,
    load_one,
    merged_by_numpy,
    weights_of,
    write_run,
)

from gemma_lora import config, export
from gemma_lora.arch import FAMILIES, Arch
from gemma_lora.decode import continuations
from gemma_lora.lora import LoRAConfig, check_targets
from gemma_lora.loss import Sweep
from gemma_lora.model import Transformer
from gemma_lora.step import State, make_train_step
from gemma_lora.tokenizer import Tokenizer
from gemma_lora.weights import mapping, peft
from gemma_lora.weights.pretrained import fingerprint, load_base, open_weights

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def workdir(tmp_path):
    return write_run(tmp_path, "gemma")


@pytest.fixture(scope="module", params=["gemma", "gemma2", "gemma3", "qwen2", "qwen2_untied"])
def exported(request, tmp_path_factory):
    """(name, workdir, merged export of it in float32 and in shards, what was shown)."""
    directory = tmp_path_factory.mktemp(request.param)
    workdir, out = write_run(directory, request.param), directory / "out"
    return request.param, workdir, out, export.export(workdir, "merged", out, None, 1e-4)


def test_merging_in_our_layout_is_merging_in_hugging_faces(exported):
    """Bitwise, for every projection and with every other tensor as it was; a tied head is none."""
    name, _, out, facts = exported
    got, expected = load(out), merged_by_numpy(name)
    assert got.keys() == expected.keys()
    for key, x in expected.items():
        np.testing.assert_array_equal(got[key], x, err_msg=key)
    assert "at most" in facts["check"] and "rounding" not in facts
    written = common.read_json(out / "config.json")
    assert Arch.from_hf(written) == common.tiny_arch(name)
    assert written["max_position_embeddings"] == tiny.TINY[name]["max_position_embeddings"]


def test_bfloat16_in_shards(workdir, tmp_path):
    """Cast once, cut at the limit, and the index says where everything is."""
    facts = export.export(workdir, "merged", tmp_path / "out", "bfloat16", 5e-5)
    assert "rounding" in facts
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [f.name for f in shards] == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    expected, got = merged_by_numpy("gemma"), load(tmp_path / "out")
    assert got.keys() == expected.keys()
    for key, x in expected.items():
        np.testing.assert_array_equal(got[key], x.astype(ml_dtypes.bfloat16), err_msg=key)
    index = common.read_json(tmp_path / "out" / "model.safetensors.index.json")
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in got.values())
    assert all(sum(x.nbytes for x in load_one(f).values()) <= 50_000 for f in shards)
    assert index["weight_map"] == {k: f.name for f in shards for k in load_one(f)}
    assert common.read_json(tmp_path / "out" / "config.json")["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("stated", [{}, {"eos_token_id": 1, "top_k": 64}])
def test_generation_stops_where_a_run_on_conversations_ends_a_turn(tmp_path, stated):
    workdir = write_run(tmp_path, "gemma", {"data.chat": True})
    if stated:
        (tmp_path / "base" / "generation_config.json").write_text(json.dumps(stated))
    export.export(workdir, "merged", tmp_path / "out")
    t = Tokenizer.from_dir(tmp_path / "out")
    [end] = t.encode("<end_of_turn>")
    want = [common.read_json(tmp_path / "base" / "config.json").get("eos_token_id", t.eos_id), end]
    assert common.read_json(tmp_path / "out" / "config.json")["eos_token_id"] == want
    # The base's files have no template: the one that the run rendered goes with the model.
    assert not (tmp_path / "base" / "chat_template.jinja").exists()
    rendered = Tokenizer.from_dir(tmp_path / "base").chat_template
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == rendered
    if stated:
        written = common.read_json(tmp_path / "out" / "generation_config.json")
        assert written == {"eos_token_id": [1, end], "top_k": 64}


def test_generation_stops_at_the_end_that_a_run_taught(tmp_path):
    """Also where the base's files name another: an Instruct tokenizer on a base checkpoint."""
    workdir = write_run(tmp_path, "gemma", {})
    edit(tmp_path / "base", "config.json", eos_token_id=3)
    (tmp_path / "base" / "generation_config.json").write_text('{"top_k": 64}')
    export.export(workdir, "merged", tmp_path / "out")
    eos = Tokenizer.from_dir(tmp_path / "out").eos_id
    assert common.read_json(tmp_path / "out" / "config.json")["eos_token_id"] == [3, eos]
    written = common.read_json(tmp_path / "out" / "generation_config.json")
    assert written == {"top_k": 64, "eos_token_id": [eos]}


def test_an_int8_run_merges_into_the_original_weights(tmp_path):
    workdir = write_run(tmp_path, "gemma", {"quantize": "int8"})
    facts = export.export(workdir, "merged", tmp_path / "out")
    assert "not those in int8" in facts["merged into"]
    for key, x in merged_by_numpy("gemma").items():
        np.testing.assert_array_equal(load(tmp_path / "out")[key], x, err_msg=key)


def random_adapter(model: Transformer) -> dict:
    rng = np.random.default_rng(0)
    shapes = nn.unbox(model.abstract()["lora"])
    return jax.tree.map(lambda x: rng.uniform(-0.3, 0.5, x.shape).astype(np.float32), shapes)


def test_dora_with_patterns(workdir, tmp_path):
    """m (W + s B A) / |W + s B A| over the rows of Hugging Face's layout, s by module."""
    wrap = LoRAConfig(
        RANK, ALPHA, 0.0, "(q|up)_proj", rslora=True, variant="dora",
        rank_pattern=(("q_proj", 2),), alpha_pattern=(("attn/.*", 3.0),),
    )  # fmt: skip
    arch = common.tiny_arch("gemma")
    lora = random_adapter(Transformer(arch, wrap=wrap))
    peft.export(workdir / "adapter", lora, wrap, arch, "base")
    export.export(workdir, "merged", tmp_path / "out")
    expected, got = weights_of("gemma"), load(tmp_path / "out")
    adapter = load_one(workdir / "adapter" / "adapter_model.safetensors")
    for key in [k for k in expected if k.endswith(("q_proj.weight", "up_proj.weight"))]:
        name = f"base_model.model.{key.removesuffix('.weight')}.lora_"
        a, b = (adapter[f"{name}{x}.weight"].astype(np.float64) for x in "AB")
        sum_ = expected[key] + (3 / 2**0.5 if "q_proj" in key else ALPHA / 2) * (b @ a)
        gain = adapter[f"{name}magnitude_vector"] / np.linalg.norm(sum_, axis=1)
        expected[key] = gain[:, None] * sum_
    assert got.keys() == expected.keys()
    for key, x in expected.items():
        np.testing.assert_allclose(got[key], x, rtol=0, atol=2e-6, err_msg=key)


def test_peft_export_is_the_adapter(workdir, tmp_path):
    facts = export.export(workdir, "peft", tmp_path / "out")
    assert "at most 0.0e+00" in facts["check"]
    got = load_one(tmp_path / "out" / "adapter_model.safetensors")
    expected = adapter_of("gemma")
    assert got.keys() == expected.keys()
    for key, x in expected.items():
        np.testing.assert_array_equal(got[key], x, err_msg=key)


def test_files_of_the_base_are_kept(workdir, tmp_path):
    """Generation settings, the chat template, the stop tokens; and the dtype is the run's."""
    base = workdir.parent / "base"
    (base / "generation_config.json").write_text('{"eos_token_id": [1, 3]}')
    (base / "chat_template.jinja").write_text("{{ messages }}")
    (base / "README.md").write_text("not a file of the model")
    (base / "config.json").write_text(json.dumps(tiny.TINY["gemma"] | {"eos_token_id": [1, 3]}))
    out = tmp_path / "out"
    export.export(workdir, "merged", out)
    for file in ("generation_config.json", "chat_template.jinja", "tokenizer.json"):
        assert (out / file).read_bytes() == (base / file).read_bytes(), file
    assert not (out / "README.md").exists()
    written = common.read_json(out / "config.json")
    assert (written["eos_token_id"], written["torch_dtype"]) == ([1, 3], "float32")


@pytest.mark.parametrize("whole", [True, False])
def test_a_tokenizer_from_elsewhere(tmp_path, whole):
    """A Hugging Face tokenizer is copied; what is not one (here: lacks its config) is written."""
    home = tmp_path / "tokenizer"
    workdir = write_run(tmp_path, "gemma", {"tokenizer": str(home)})
    home.mkdir()
    for file in (tmp_path / "base").glob("tokenizer*"):
        file.rename(home / file.name)
    if whole:
        edit(home, "tokenizer_config.json", kept="as it is")
    else:
        (home / "tokenizer_config.json").unlink()
        (home / "config.json").write_text(json.dumps(tiny.TINY["gemma"]))
    export.export(workdir, "merged", tmp_path / "out")
    written = common.read_json(tmp_path / "out" / "tokenizer_config.json")
    assert (written.get("kept") == "as it is", written["eos_token"]) == (whole, "<eos>")


# ---- transformers ---------------------------------------------------------------------------

PROMPT = "Question: 3 + 4\nAnswer:"


def base_and_adapter(workdir: Path) -> tuple[Transformer, dict, dict]:
    """The unmerged model of a run: the module, base weights and adapter."""
    pretrained = open_weights(common.read_json(workdir / "config.json")["weights"], "auto")
    wrap, lora = peft.read(workdir / "adapter", pretrained.arch)
    model = Transformer(pretrained.arch, wrap=wrap)
    return model, load_base(pretrained, model, common.one_device()), lora


@functools.cache
def torch():
    torch = common.needs("torch")
    # The first multi-threaded cos of a process is sometimes wrong by 1e-4: spend it here.
    torch.arange(1 << 20, dtype=torch.float32).cos()
    return torch


def test_transformers_loads_it_as_it_is(exported):
    """Logits, greedy text, token ids; longer than the window, and nothing missing or left over."""
    transformers = common.needs("transformers")
    _, workdir, out, _ = exported
    torch()
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    assert theirs.dtype == torch().float32
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    ours = open_weights(str(out), "auto").tokenizer()
    prompt = ours.encode(PROMPT)
    assert tokenizer.encode(PROMPT, add_special_tokens=False) == prompt
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (ours.bos_id, ours.eos_id)

    model, params, lora = base_and_adapter(workdir)
    [(_, new)] = continuations(model, params, lora, [np.array(prompt)], (), rows=1, new=32)
    ids = np.array([*prompt, *new])
    expected = common.all_logits(model, params, lora, ids[None])[0]
    theirs.generation_config.eos_token_id = None  # go on, as ours does
    tensor = torch().tensor([prompt])
    generated = theirs.generate(
        tensor, attention_mask=torch().ones_like(tensor), max_new_tokens=32, do_sample=False
    )
    np.testing.assert_array_equal(generated[0].numpy(), ids)
    with torch().no_grad():
        got = theirs(torch().tensor(ids[None])).logits[0].numpy()
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-3)


# ---- a family that is none ------------------------------------------------------------------


def test_a_new_family_is_one_entry_of_a_table(tmp_path, monkeypatch):
    """A new set of switches loads, trains, exports and comes back, with no other change."""
    monkeypatch.setitem(
        FAMILIES,
        "fictitious",
        {
            "tied": False,
            "rope_base": 50_000.0,
            "rope_local_base": 5_000.0,
            "window": 8,
            "local": (True, True, False),
            "norm_plus_one": True,
            "scale_embed": True,
            "qk_norm": True,
            "qkv_bias": True,
            "gelu": False,
            "post_norms": True,
            "final_softcap": 20.0,
        },
    )
    facts = {
        k: v
        for k, v in tiny.TINY["gemma2"].items()
        if k.endswith(("_size", "_heads", "_token_id")) or k in ("head_dim", "rms_norm_eps")
    }
    facts |= {"model_type": "fictitious", "num_hidden_layers": 5}
    arch = Arch.from_hf(facts)
    assert arch.is_local == (True, True, False, True, True)

    base = tmp_path / "base"
    tiny_tokenizer.write_tokenizer(base)
    (base / "config.json").write_text(json.dumps(facts))
    rng, tensors = np.random.default_rng(0), {}
    for ours, (letters, shape) in mapping.leaves(arch).items():
        stacked = letters.startswith("L")
        for i in range(arch.layers) if stacked else (None,):
            x = rng.normal(0, 0.2, shape[stacked:]).astype(np.float32)
            name, x = mapping.hf_tensor(arch, ours, x, i)
            tensors[name] = np.ascontiguousarray(x)
    assert "model.layers.4.self_attn.q_norm.weight" in tensors
    assert "model.layers.4.self_attn.k_proj.bias" in tensors
    safetensors.numpy.save_file(tensors, base / "model.safetensors")

    pretrained = open_weights(str(base), "auto")
    assert pretrained.arch == arch
    wrap = LoRAConfig(rank=RANK, alpha=ALPHA, dropout=0.0, targets="qv")
    model = Transformer(arch, wrap=wrap)
    params = load_base(pretrained, model, common.one_device())
    assert check_targets(wrap, params) == ["attn/q_proj", "attn/v_proj"]
    tokens, mask = (x[0] for x in tiny.tiny_batches(steps=1))
    lora = random_adapter(model)
    tx = optax.sgd(1.0)
    step = jax.jit(make_train_step(model, tx, 1, Sweep(64), 0))
    state = State(jnp.zeros((), jnp.int32), lora, tx.init(lora))
    losses = []
    for _ in range(2):
        state, sums = step(state, params, common.batch_of(tokens, mask))
        losses.append(float(sums["nll"][0]))
    assert losses[1] < losses[0]

    workdir = tmp_path / "run"
    workdir.mkdir()
    settings = config.to_dict(tiny_run.settings(base))
    (workdir / "config.json").write_text(json.dumps(settings))
    prints = {"data_fingerprint": "", "weights_fingerprint": fingerprint(params)}
    (workdir / "run.json").write_text(json.dumps(prints))
    peft.export(workdir / "adapter", state.lora, wrap, arch, str(base))
    facts = export.export(workdir, "merged", tmp_path / "out")
    assert "at most" in facts["check"]
    assert open_weights(str(tmp_path / "out"), "auto").arch == arch
    changed = {k for k, x in load(tmp_path / "out").items() if (x != tensors[k]).any()}
    assert changed == {k for k in tensors if "q_proj.weight" in k or "v_proj.weight" in k}
