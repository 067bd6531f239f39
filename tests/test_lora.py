"""The contract of every adapter: what it adds, what it leaves alone, what it may be attached to."""

import common
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from gemma_lora.adapters import LoRA, _drop
from gemma_lora.arch import ARCHS
from gemma_lora.errors import UserError
from gemma_lora.layers import Einsum
from gemma_lora.lora import LoRAConfig, check_targets, count, merge
from gemma_lora.loss import Sweep
from gemma_lora.model import Transformer
from gemma_lora.step import forward
from gemma_lora.weights.mapping import flatten

pytestmark = pytest.mark.usefixtures("quick")

NAME = "gemma3"


def loss_of(model, params, batch, rng=None):
    def loss(lora):
        stats = forward(model, Sweep(64), params, lora, batch, rng)
        return jnp.sum(stats.nll * batch["loss_mask"])

    return loss


def test_zero_b_is_the_base_model_bitwise():
    base, params = common.tiny_model(NAME)
    tuned, _ = common.tiny_model(NAME, LoRAConfig(rank=4, dropout=0.5))
    want = common.all_logits(base, params, {}, tiny.tokens())
    lora = common.adapter(NAME, zero_b=True)
    assert np.array_equal(common.all_logits(tuned, params, lora, tiny.tokens()), want)


@pytest.mark.parametrize("rslora", [False, True])
def test_merged_equals_unmerged(rslora):
    wrap = LoRAConfig(rank=4, alpha=8, rslora=rslora)
    tuned, params = common.tiny_model(NAME, wrap)
    base, _ = common.tiny_model(NAME)
    lora = common.adapter(NAME)
    want = common.all_logits(tuned, params, lora, tiny.tokens())
    got = common.all_logits(base, merge(params, lora, wrap), {}, tiny.tokens())
    assert np.max(np.abs(got - want)) < 1e-4
    plain = common.all_logits(base, params, {}, tiny.tokens())
    assert np.max(np.abs(plain - want)) > 0.1


def test_scale():
    assert LoRAConfig(rank=16, alpha=32).scale == 2
    assert LoRAConfig(rank=16, alpha=32, rslora=True).scale == 8


def test_frozen_weights_take_no_gradient():
    """By construction: the seam's backward has no product for the weight."""
    model, params = common.tiny_model(NAME, LoRAConfig(rank=4))
    lora, tokens = common.adapter(NAME), tiny.tokens()
    batch = common.batch_of(tokens, tiny.loss_mask(tokens.shape))
    grads = jax.jit(jax.grad(lambda p: loss_of(model, p, batch)(lora)))(params)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(grads))


class _Probe(nn.Module):
    """One adapted projection without the model round it."""

    dropout: float

    @nn.compact
    def __call__(self, x):
        base = Einsum("BTD,DF->BTF", (8, 32), jnp.float32, jnp.float32, name="up_proj")
        return LoRAConfig(rank=8, alpha=8, dropout=self.dropout)(base, "mlp/up_proj")(x)


def test_dropout_keeps_the_mean_and_the_share():
    """With A and B the identity on part of x, the adapter's output is the dropped-out input."""
    x = jnp.ones((64, 32, 8))
    lora = {"up_proj": {"a": jnp.eye(8, 8), "b": jnp.eye(8, 32)}}
    params = {"up_proj": {"w": jnp.zeros((8, 32))}}
    out = _Probe(0.25).apply(
        {"params": params, "lora": lora}, x, rngs={"dropout": jax.random.key(0)}
    )
    kept = np.asarray(out[..., :8])
    values = np.unique(kept)
    assert np.allclose(values, [0, 1 / 0.75])
    # Neighbours, and elements that share a draw, are dropped independently.
    dropped = (kept == 0).reshape(-1, 8)
    for i, j in ((0, 1), (0, 4), (3, 7)):
        both = (dropped[:, i] & dropped[:, j]).mean()
        assert abs(both - 0.25**2) < 4 * (0.0625 * 0.9375 / len(dropped)) ** 0.5
    share, n = (kept == 0).mean(), kept.size
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / n) ** 0.5
    still = _Probe(0.25).apply({"params": params, "lora": lora}, x)
    assert np.all(np.asarray(still[..., :8]) == 1)


class _Spy(LoRA):
    """Writes the key of each dropout mask into the 'lora' collection."""

    def make_rng(self, name: str = "params") -> jax.Array:
        key = super().make_rng(name)
        if name == "dropout":
            self.sow("lora", "key", jax.random.key_data(key), reduce_fn=lambda _, new: new)
        return key


def test_dropout_of_bfloat16_keeps_the_mean():
    """1 / 0.9 is not 1.109375."""
    found = np.asarray(_drop(jax.random.key(0), jnp.ones((64, 64), jnp.bfloat16), 0.1))
    assert set(np.unique(found)) == {0, np.float32(1 / 0.9)}


def test_dropout_masks_are_independent():
    """Another key for every module (also those that share an input), layer and step."""

    def wrap(base, path):
        return _Spy(base, 4, 2.0, 0.5)

    model, params = common.tiny_model("qwen2", wrap)
    tokens = jnp.asarray(tiny.tokens())
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    variables = {"params": params, "lora": common.adapter("qwen2")}

    @jax.jit
    def keys_of(rng):
        args = (tokens, jnp.ones_like(tokens), positions)
        _, after = model.apply(variables, *args, rngs={"dropout": rng}, mutable=["lora"])
        return {k: v for k, v in flatten(after["lora"]).items() if k.endswith("/key")}

    keys = []
    for step in range(2):
        found = keys_of(jax.random.fold_in(jax.random.key(0), step))
        keys += [tuple(row) for leaf in found.values() for row in np.asarray(leaf)]
    assert len(keys) == len(set(keys)) == 7 * 3 * 2  # modules x layers x steps


def test_dropout_changes_training_and_not_evaluation():
    model, params = common.tiny_model(NAME, LoRAConfig(rank=4, alpha=8, dropout=0.5))
    lora, tokens = common.adapter(NAME), tiny.tokens()
    batch = common.batch_of(tokens, tiny.loss_mask(tokens.shape))
    evaluate = jax.jit(loss_of(model, params, batch))
    train = jax.jit(lambda lora, rng: loss_of(model, params, batch, rng)(lora))
    losses = [float(evaluate(lora)) for _ in range(2)]
    losses += [float(train(lora, jax.random.key(i))) for i in (0, 0, 1)]
    assert losses[0] == losses[1] and losses[2] == losses[3]
    assert len({losses[0], losses[2], losses[4]}) == 3


def test_initial_values():
    """A is uniform within 1/sqrt(in) (PEFT's kaiming_uniform(sqrt 5)), B is zero, layers differ."""
    model = Transformer(common.tiny_arch(NAME), wrap=LoRAConfig(rank=64))
    token = jnp.zeros((1, 1), jnp.int32)
    lora = nn.unbox(jax.jit(model.init)(jax.random.key(0), token, token, token)["lora"])
    for path, leaf in flatten(lora).items():
        assert leaf.dtype == jnp.float32
        if path.endswith("/b"):
            assert not np.any(leaf)
            continue
        fan_in = np.prod(leaf.shape[1:-1])
        bound = fan_in**-0.5
        assert np.max(np.abs(leaf)) <= bound
        assert np.std(leaf) == pytest.approx(bound / 3**0.5, rel=0.05), path
        assert abs(np.mean(leaf)) < 0.05 * bound
        assert not np.array_equal(leaf[0], leaf[1])


@pytest.mark.parametrize(
    ("arch", "qv", "everything"),
    [
        ("gemma_2b", 921_600, 9_805_824),
        ("qwen2_0p5b", 540_672, 4_399_104),
        ("gemma2_2b", 1_597_440, 10_383_360),
        ("gemma3_1b", 745_472, 6_522_880),
        ("gemma3_270m", 368_640, 1_898_496),
    ],
)
def test_trainable_parameters_as_peft_counts_them(arch, qv, everything):
    for targets, expected in (("qv", qv), ("all-linear", everything)):
        model = Transformer(ARCHS[arch], wrap=LoRAConfig(rank=8, targets=targets))
        assert count(model.abstract()["lora"]) == expected


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("qv", {"attn/q_proj", "attn/v_proj"}),
        ("mlp/.*", {"mlp/gate_proj", "mlp/up_proj", "mlp/down_proj"}),
        ("o_proj|down_proj", {"attn/o_proj", "mlp/down_proj"}),
    ],
)
def test_targets(targets, expected):
    model, params = common.tiny_model(NAME)
    wrap = LoRAConfig(targets=targets)
    assert set(check_targets(wrap, params)) == expected
    lora = Transformer(model.arch, wrap=wrap).abstract()["lora"]
    assert {f"{m}/{p}" for m, ps in lora["layers"].items() for p in ps} == expected


def test_targets_that_match_nothing_name_what_exists():
    _, params = common.tiny_model(NAME)
    with pytest.raises(UserError, match=r"query.*attn/q_proj.*all-linear"):
        check_targets(LoRAConfig(targets="query"), params)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"targets": "q_proj("}, "no regular expression"),
        ({"variant": "dorra"}, "variant 'dorra' is unknown, did you mean dora"),
        ({"init": "pisa"}, "init 'pisa' is unknown, did you mean pissa"),
        ({"rank_pattern": [("q_proj", 0)]}, r"rank_pattern of 'q_proj' is 0, .* at least 1"),
        ({"rank_pattern": [("q_proj", 4.0)]}, r"is 4.0, expected a whole number"),
        ({"rank_pattern": ("q_proj", 4)}, r"expected \(\(regular expression, number\)"),
        ({"alpha_pattern": [("q_proj(", 4)]}, r"alpha_pattern is .*expected \(\(regular"),
        ({"alpha_pattern": [("q_proj", "4")]}, "is '4', expected a positive number"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(UserError, match=message):
        LoRAConfig(**settings)
