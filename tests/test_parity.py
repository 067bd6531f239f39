"""Parity with torch, transformers and PEFT on tiny models, float32.

Every test runs against committed goldens (made by make_goldens.py) and, where torch is installed,
against the live libraries as well.
"""

import functools
from pathlib import Path

import common
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from gemma_lora import adapters
from gemma_lora.config import default
from gemma_lora.evaluate import metrics
from gemma_lora.lora import LoRAConfig, from_base, modules, on_original_base
from gemma_lora.loss import Sweep
from gemma_lora.optim import optimizer
from gemma_lora.step import State, forward, make_train_step
from gemma_lora.weights import peft
from gemma_lora.weights.mapping import flatten, hf_tensor

GOLDENS = Path(__file__).parent / "goldens"
SOURCES = ["golden", "live"]
ALPHA, RANK = 8.0, 4


@functools.cache
def expected(source: str, name: str) -> dict[str, np.ndarray]:
    """The reference values of a tiny model, 'adapters', 'trajectory' or 'real'."""
    if source == "golden":
        return dict(np.load(GOLDENS / f"{name}.npz"))
    make_goldens = common.live("make_goldens")
    makers = {
        "adapters": make_goldens.adapters_golden,
        "trajectory": make_goldens.trajectory_golden,
        "real": functools.partial(make_goldens.real_golden, live=True),
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
    value, grads = loss_and_grads(model, params, lora)
    close(value, want["lora_loss"], 1e-5, "loss")
    keys = [k for k in peft.to_tensors(grads, model.arch) if k in want]
    assert keys or name in ("gemma3_rope8", "qwen2_untied")
    for key in keys:
        close(peft.to_tensors(grads, model.arch)[key], want[key], 1e-4, key)


def loss_and_grads(model, params, lora):
    """The mean loss over the masked targets of tiny.tokens(), and its gradient."""
    tokens = tiny.tokens()
    batch = common.batch_of(tokens, tiny.loss_mask(tokens.shape))

    def loss(lora):
        stats = forward(model, Sweep(32), params, lora, batch, None)
        return jnp.sum(stats.nll * batch["loss_mask"]) / jnp.sum(batch["loss_mask"])

    return jax.jit(jax.value_and_grad(loss))(lora)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("which", "name"), tiny.ADAPTED)
def test_other_adapters(which, name, source):
    """DoRA, and patterns under rsLoRA: logits, loss and gradients of A, B and m."""
    start = f"{which}/{name}/"
    want = {
        k.removeprefix(start): v
        for k, v in expected(source, "adapters").items()
        if k.startswith(start)
    }
    settings = tiny.settings_of(which)
    tensors = tiny.init_adapter(tiny.TINY[name], settings["r"], **settings)
    config, lora = peft.from_tensors(tensors, settings, common.tiny_arch(name))
    model, params = common.tiny_model(name, config)
    got = common.all_logits(model, params, lora, tiny.tokens())[:, ::4]
    close(got, want["logits"], 1e-4, "logits")
    value, grads = loss_and_grads(model, params, lora)
    close(value, want["loss"], 1e-5, "loss")
    ours = peft.to_tensors(grads, model.arch)
    keys = [k for k in ours if k in want]
    assert len(keys) == 7 * (3 if which == "dora" else 2)
    for key in keys:
        close(ours[key], want[key], 1e-4, key)


def train_like_peft(model, params, lora, batches, masks, lr, lr_ratio=1.0):
    """(losses, gradient norms, final adapter under PEFT's keys) of one step a batch."""
    optim = default().optim
    optim.lr, optim.b_lr_ratio = lr, lr_ratio
    tx = optimizer(optim, len(batches))
    state = State(jnp.zeros((), jnp.int32), lora, tx.init(lora))
    step = jax.jit(make_train_step(model, tx, 1, Sweep(4096), 0))
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


def test_eval_loss_is_that_of_transformers():
    """Of rows with 1 to 9 tokens that carry loss, the last batch not full."""
    reference = common.live("reference")
    tokens = tiny.tokens(rows=7, length=16)
    counts = np.array([1, 9, 3, 2, 8, 5, 1])
    mask = np.arange(tokens.shape[1]) >= tokens.shape[1] - counts[:, None]
    logits = reference.logits("gemma", tokens)[:, :-1].astype(np.float64)
    nll = (
        np.logaddexp.reduce(logits, -1)
        - np.take_along_axis(logits, tokens[:, 1:, None], -1)[..., 0]
    )
    rows = {
        "tokens": counts,
        "nll": (nll * mask[:, 1:]).sum(1),
        "correct": np.zeros(7),
        "label": np.full(7, -1),
    }
    for size in (2, 4, 7):
        want = reference.trainer_loss("gemma", tokens, mask, size)
        assert metrics(rows, size)["trl_compat/eval_loss"] == pytest.approx(want, rel=1e-6)


# ---- live alone: what PEFT does with other settings --------------------------------------------


@pytest.mark.parametrize("name", ["gemma2", "qwen2"])
def test_dora_drops_what_peft_drops(name, monkeypatch):
    """With dropout the undropped W x stays, and B A and the rest of W see the dropped x."""
    reference = common.live("reference")
    monkeypatch.setattr(
        adapters, "_drop", lambda key, x, rate: x * (jnp.arange(x.shape[-1]) % 2 == 0) * 2
    )
    settings = tiny.settings_of("dora")
    tensors = tiny.init_adapter(tiny.TINY[name], 4, **settings)
    tokens = tiny.tokens()
    mask = tiny.loss_mask(tokens.shape)
    want = reference.lora_grads(name, tensors, tokens, mask, halved=True, **settings)
    config, lora = peft.from_tensors(
        tensors, settings | {"lora_dropout": 0.5}, common.tiny_arch(name)
    )
    model, params = common.tiny_model(name, config)
    batch = common.batch_of(tokens, mask)

    def loss(lora):
        stats = forward(model, Sweep(32), params, lora, batch, jax.random.key(0))
        return jnp.sum(stats.nll * batch["loss_mask"]) / jnp.sum(batch["loss_mask"])

    value, grads = jax.jit(jax.value_and_grad(loss))(lora)
    close(value, want["loss"], 1e-5, "loss")
    for key, grad in peft.to_tensors(grads, model.arch).items():
        close(grad, want[key], 1e-4, key)


@pytest.mark.parametrize(("which", "lr_ratio", "steps"), [("dora", 1.0, 20), ("dora", 4.0, 5)])
def test_trajectories_of_dora_and_lora_plus(which, lr_ratio, steps):
    reference = common.live("reference")
    settings = tiny.settings_of(which)
    tensors = tiny.init_adapter(tiny.TINY["qwen2"], 4, zero_b=True, **settings)
    batches, masks = tiny.tiny_batches(steps=steps)
    want = reference.train("qwen2", tensors, batches, masks, 1e-2, lr_ratio, **settings)
    config, lora = peft.from_tensors(tensors, settings, common.tiny_arch("qwen2"))
    model, params = common.tiny_model("qwen2", config)
    losses, norms, final = train_like_peft(model, params, lora, batches, masks, 1e-2, lr_ratio)
    assert np.all(np.abs(losses / want["losses"] - 1) <= 1e-4)
    assert np.all(np.abs(norms / want["grad_norms"] - 1) <= 1e-3)
    close_matrices(final, {k: want[k] for k in tensors})


@pytest.mark.parametrize("rslora", [False, True])
def test_pissa(rslora, tmp_path):
    """What PEFT takes from the base and gives to A B, and its conversion to the original base.

    Singular vectors have no sign, so products are compared; the float32 SVDs of both sides are off
    by up to 7e-6 from that of float64.
    """
    reference = common.live("reference")
    config = LoRAConfig(RANK, ALPHA, 0.0, rslora=rslora, init="pissa")
    settings = {"use_rslora": rslora}
    found = reference.pissa("qwen2", tmp_path, **settings)
    model, params = common.tiny_model("qwen2", config)
    zeros = common.adapter("qwen2", zero_b=True)
    base, start = jax.jit(functools.partial(from_base, config))(params, zeros)
    ours = peft.to_tensors(start, model.arch)
    for key in (k for k in ours if "lora_A" in k):
        b = key.replace("lora_A", "lora_B")
        close(ours[b] @ ours[key], found["start"][b] @ found["start"][key], 3e-5, key)
    for path, leaves in modules(start).items():
        module, proj = path.split("/")
        for i in range(model.arch.layers):
            w = base["layers"][module][proj]["w"][i]
            name, stored = hf_tensor(model.arch, f"layers/{path}/w", np.asarray(w), i)
            close(stored, found["base"][name], 3e-5, name)
        assert leaves["a"].shape[-1] == RANK
    # PEFT's own start and end, converted by us, do what the trained PEFT model does.
    arch = model.arch
    first, last = (
        peft.from_tensors(found[k], tiny.settings_of("lora", **settings), arch)[1]
        for k in ("start", "end")
    )
    twice, lora = on_original_base(config, last, first)
    plain, _ = common.tiny_model("qwen2", twice)
    got = common.all_logits(plain, params, lora, tiny.tokens())
    close(got, found["logits"]["logits"], 1e-4, "logits")
    # And so does what PEFT converted, read here.
    theirs, lora = peft.read(tmp_path / "converted", arch)
    assert theirs.rank == twice.rank == 2 * RANK
    assert theirs.scale == pytest.approx(twice.scale) == pytest.approx(config.scale)
    got = common.all_logits(common.tiny_model("qwen2", theirs)[0], params, lora, tiny.tokens())
    close(got, found["logits"]["logits"], 1e-4, "logits of PEFT's conversion")


# ---- adapters to and from PEFT -----------------------------------------------------------------

# What `export` may have to say.
OURS = {
    "rslora": {"rslora": True},
    "dora": {"variant": "dora"},
    "patterned": {
        "rslora": True,
        "rank_pattern": [("mlp/.*", 2), ("q_proj", 3)],
        "alpha_pattern": [("v_proj", 5.0)],
    },
}


@pytest.mark.parametrize("which", OURS)
def test_our_adapter_loads_in_peft(which, tmp_path):
    reference = common.live("reference")
    wrap = LoRAConfig(RANK, ALPHA, 0.0, **OURS[which])
    model, params = common.tiny_model("gemma3", wrap)
    lora = common.random_adapter(model, params)
    peft.export(tmp_path / "adapter", lora, wrap, model.arch, "tiny")
    got = reference.adapter_logits("gemma3", tmp_path / "adapter", tiny.tokens())
    close(got, common.all_logits(model, params, lora, tiny.tokens()), 1e-4, "logits")


# What PEFT may have been told.
THEIRS = {
    "patterns of layers": {
        "rank_pattern": {"layers.0.self_attn.q_proj": 7, "^model.layers.1.*v_proj": 2},
        "alpha_pattern": {"layers.2.mlp.down_proj": 3, "layers.0.self_attn.q_proj": 20},
    },
    "rslora": {
        "use_rslora": True,
        "rank_pattern": {"layers.1.self_attn.q_proj": 6, "gate_proj": 2},
        "alpha_pattern": {"o_proj": 2},
    },
    "some layers": {"layers_to_transform": [0, 2], "target_modules": ["q_proj", "down_proj"]},
    "one layer": {
        "layers_to_transform": 1,
        "layers_pattern": "layers",
        "target_modules": ["v_proj", "model.layers.0.mlp.up_proj", "self_attn.q_proj"],
    },
    "an expression": {"target_modules": r"model\.layers\.[01]\.(self_attn\.o|mlp\.up)_proj"},
    "exclusions": {"exclude_modules": ["layers.0.self_attn.q_proj", "up_proj"]},
    "dora": {"use_dora": True, "rank_pattern": {"layers.1.self_attn.q_proj": 6}},
}


@pytest.mark.parametrize("which", THEIRS)
def test_adapter_made_by_peft_loads_here(which, tmp_path):
    reference = common.live("reference")
    reference.save_random_adapter("qwen2", tmp_path, **THEIRS[which])
    wrap, lora = peft.read(tmp_path, common.tiny_arch("qwen2"))
    model, params = common.tiny_model("qwen2", wrap)
    want = reference.adapter_logits("qwen2", tmp_path, tiny.tokens())
    close(common.all_logits(model, params, lora, tiny.tokens()), want, 1e-4, "logits")
    plain = common.all_logits(*common.tiny_model("qwen2"), {}, tiny.tokens())
    assert np.max(np.abs(want - plain)) > 0.1


def test_adapter_trained_by_peft_loads_here(tmp_path):
    reference = common.live("reference")
    reference.save_trained_adapter("qwen2", tmp_path)
    wrap, lora = peft.read(tmp_path, common.tiny_arch("qwen2"))
    model, params = common.tiny_model("qwen2", wrap)
    assert all(np.any(leaf) for leaf in flatten(lora).values())
    want = reference.adapter_logits("qwen2", tmp_path, tiny.tokens())
    close(common.all_logits(model, params, lora, tiny.tokens()), want, 1e-4, "logits")
