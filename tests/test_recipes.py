"""The four recipes: their settings, their sizes, and a short run of each on a tiny model."""

import pathlib
import runpy

import common
import jax
import numpy as np
import pytest
import scipy.special
import tiny
import tiny_run
import tiny_tokenizer

from gemma_lora import config as configs
from gemma_lora import evaluate
from gemma_lora.arch import get_arch
from gemma_lora.data.dataset import shapes
from gemma_lora.data.examples import tokenize
from gemma_lora.data.pipeline import dataset
from gemma_lora.lora import LoRAConfig, count
from gemma_lora.loss import Sweep
from gemma_lora.model import Transformer
from gemma_lora.step import make_eval_step
from gemma_lora.weights.pretrained import load_base, open_weights

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"

# name -> (arch, source, trainable parameters on all linear modules, on q and v alone)
RECIPES = {
    "gemma_2b_alpaca_gpt4": (
        "gemma_2b", "tfds:huggingface:vicgalle/alpaca-gpt4", 9_805_824, 921_600
    ),
    "gemma_2b_gsm8k": ("gemma_2b", "tfds:gsm8k", 9_805_824, 921_600),
    "gemma_2b_imdb": ("gemma_2b", "tfds:imdb_reviews", 9_805_824, 921_600),
    "qwen2_0p5b_instruct_gsm8k": ("qwen2_0p5b", "tfds:gsm8k", 4_399_104, 540_672),
}  # fmt: skip

# The settings that the four published runs share.
SETTINGS = {
    "lora.rank": 8,
    "lora.alpha": 16.0,
    "lora.dropout": 0.1,
    "lora.targets": "all-linear",
    "lora.rslora": False,
    "lora.variant": "lora",
    "lora.init": "kaiming",
    "optim.lr": 2e-4,
    "optim.schedule": "linear",
    "optim.warmup_steps": 0,
    "optim.clip": 1.0,
    "optim.weight_decay": 0.0,
    "train.epochs": 3,
    "train.max_steps": 0,
    "train.micro_batches": 1,
    "train.patience": 5,
    "data.validation_fraction": 0.1,
    "data.batch_size": 8,
    "data.loss_on": "all",
    "data.pack": False,
    "seed": 42,
    "dtype": "bfloat16",
    "quantize": "",
}


def load(name):
    return runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"]()


@pytest.mark.parametrize("name", RECIPES)
def test_settings(name):
    c = load(name)
    arch, source, _, _ = RECIPES[name]
    flat = configs.flat(configs.to_dict(c))
    assert {k: flat[k] for k in SETTINGS} == SETTINGS
    assert (c.arch, c.data.source) == (arch, source)
    # With fewer evals than this, early stopping could never happen.
    assert c.train.epochs / c.train.eval_every > c.train.patience
    assert len((CONFIGS / f"{name}.py").read_text().splitlines()) < 40


@pytest.mark.parametrize("name", RECIPES)
def test_trainable_parameters(name):
    c = load(name)
    for targets, expected in zip(("all-linear", "qv"), RECIPES[name][2:], strict=True):
        wrap = LoRAConfig(**{**c.lora, "targets": targets})
        assert count(Transformer(get_arch(c.arch), wrap=wrap).abstract()["lora"]) == expected


ROWS = {
    "gemma_2b_alpaca_gpt4": {"instruction": "Add {i} and 1", "input": "", "output": "It is {j}."},
    "gemma_2b_gsm8k": {"question": "What is {i} + 1?", "answer": "{j}\n#### {j}"},
    "gemma_2b_imdb": {"text": "number {i} is good", "label": 0},
    "qwen2_0p5b_instruct_gsm8k": {"question": "What is {i} + 1?", "answer": "{j}\n#### {j}"},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """family -> directory of a tiny random model with a tokenizer of its family's kind."""
    root = tmp_path_factory.mktemp("models")
    tiny_tokenizer.write_tokenizer(tiny.write_tiny("gemma", root / "gemma"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny.TINY, "qwen2", tiny.TINY["qwen2"] | {"vocab_size": 512})
        tiny_tokenizer.write_qwen(tiny.write_tiny("qwen2", root / "qwen2"))
    with tiny_run.quick_compilation():
        yield root


@pytest.mark.parametrize("name", RECIPES)
def test_short_run(name, models, tmp_path):
    """Two steps of the recipe on a model and a file given by override."""
    rows = [
        {k: v.format(i=i, j=i + 1) if isinstance(v, str) else i % 2 for k, v in ROWS[name].items()}
        for i in range(16)
    ]
    tiny_run.write_rows(tmp_path / "rows.jsonl", rows)
    c = load(name)
    changes = {
        "arch": "auto",
        "weights": str(models / get_arch(c.arch).family),
        "data.path": str(tmp_path / "rows.jsonl"),
        "data.seq_len": 96,
        "data.batch_size": 4,
        "train.max_steps": 2,
        "train.eval_every": 1,
    }
    c.update_from_flattened_dict(changes)
    tiny_run.run(tmp_path / "run", c)
    report = common.read_json(tmp_path / "run" / "report.json")
    assert report["run"]["status"] == "finished" and report["run"]["steps"] == 2
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    text = (tmp_path / "run" / "report.md").read_text()
    assert ("## Class accuracy" in text) == ("class_accuracy" in report["validation"])
    assert ("class_accuracy" in report["validation"]) == (name == "gemma_2b_imdb")
    assert ("<|im_start|>assistant" in text) == (name == "qwen2_0p5b_instruct_gsm8k")


def test_class_probabilities_are_the_models(models, tmp_path):
    """label_p of the ledger against the logits of the whole vocabulary, packed and not."""
    pretrained = open_weights(str(models / "gemma"), "auto")
    tokenizer, model = pretrained.tokenizer(), Transformer(pretrained.arch)
    base = load_base(pretrained, model, common.one_device())
    rows = [{"id": f"r{i}", "text": "ab" * (1 + i), "label": i % 2} for i in range(5)]
    for pack in (False, True):
        c = load("gemma_2b_imdb")
        c.update_from_flattened_dict(
            {"data.seq_len": 96, "data.batch_size": 2, "data.pack": pack, "seed": 0}
        )
        found = tokenize(rows, tokenizer, c.data, "rows")
        sizes = shapes(found.examples, c.data)
        data = dataset(found.examples, c, sizes, found.label_tokens, shuffle=False)
        step = jax.jit(make_eval_step(model, Sweep(64), found.label_tokens))
        got = evaluate.ledger_rows(step, {}, base, data, common.one_device(), "eval", 0)
        assert got["label"].tolist() == [0, 1, 0, 1, 0]
        n, p = tokenizer.encode("np")
        assert found.label_tokens == (n, p)
        right = 0
        for example, probabilities in zip(found.examples, got["label_p"], strict=True):
            at = len(example.tokens) - len("negative" if example.label == 0 else "positive") - 1
            logits = common.all_logits(model, base, {}, example.tokens[None])[0, at - 1]
            expected = scipy.special.softmax(logits[[n, p]].astype(np.float64))
            np.testing.assert_allclose(probabilities, expected, rtol=1e-5)
            right += expected.argmax() == example.label
        assert evaluate.metrics(got, 2)["class_accuracy"] == right / 5
