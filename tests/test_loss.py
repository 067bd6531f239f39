"""token_stats against the whole softmax, and what the mask and the padding may not change."""

import time

import common
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from gemma_lora.errors import UserError
from gemma_lora.loss import Sweep, token_stats
from gemma_lora.sharding import AXES, RULES
from gemma_lora.step import forward


@pytest.mark.parametrize(
    ("vocab", "chunk", "softcap"),
    [(1000, 128, 0.0), (1000, 128, 30.0), (64, 128, 20.0), (997, 100, 0.0), (512, 128, 15.0)],
)
def test_chunked_equals_whole(vocab, chunk, softcap):
    """In float64 by numpy: nll, its gradient, margin, EL2N."""
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = 2 * jax.random.normal(keys[0], (2, 5, 16))
    head = jax.random.normal(keys[1], (vocab, 16))
    targets = jax.random.randint(keys[2], (2, 5), 0, vocab)
    weights = jax.random.uniform(keys[3], (2, 5))
    h, e, y, w = (np.asarray(x, np.float64) for x in (hidden, head, targets, weights))
    y = y.astype(int)
    z = h @ e.T
    y[0, :2] = z[0, :2].argmax(-1)  # some targets are the greedy choice
    targets = jnp.asarray(y)
    slope = np.ones_like(z)
    if softcap:
        slope = 1 - np.tanh(z / softcap) ** 2
        z = np.tanh(z / softcap) * softcap
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    onehot = np.eye(vocab)[y]
    others = np.where(onehot > 0, -np.inf, z).max(-1)
    want = {
        "nll": -np.log((p * onehot).sum(-1)),
        "margin": (z * onehot).sum(-1) - others,
        "el2n": np.sqrt(((p - onehot) ** 2).sum(-1)),
        "correct": z.argmax(-1) == y,
    }
    all_of, sweep = jnp.ones_like(targets), Sweep(chunk)
    stats = token_stats(hidden, targets, all_of, head, softcap, sweep)
    for name, value in want.items():
        assert np.allclose(getattr(stats, name), value, atol=2e-5), name
    grad = jax.grad(
        lambda x: jnp.sum(token_stats(x, targets, all_of, head, softcap, sweep).nll * weights)
    )(hidden)
    exact = ((p - onehot) * slope * w[..., None]) @ e
    assert np.allclose(grad, exact, atol=2e-5)
    assert 0 < want["correct"].mean() < 1


def test_words_over_the_axes_of_the_rows_are_refused(monkeypatch):
    """Their sums would mix the tokens of several devices."""
    monkeypatch.setitem(RULES, "V", ("fsdp",))
    monkeypatch.setitem(RULES, "D", ())
    mesh = jax.sharding.AbstractMesh((1, 2, 1), AXES)
    hidden, targets, table = jnp.zeros((2, 3, 4)), jnp.zeros((2, 3), int), jnp.zeros((8, 4))
    with pytest.raises(UserError, match="splits V over fsdp"):
        token_stats(hidden, targets, jnp.ones_like(targets), table, 0.0, Sweep(8), mesh)


@pytest.mark.parametrize("softcap", [0.0, 20.0])
def test_floor_is_within_its_bound_and_leaves_values_alone(softcap):
    """The gradient is off by at most sum p |E - mean E| over the words of passed-over chunks.

    Peaked logits over 3,020 words in chunks of 50, the last one short: with a floor of 3e-3 many
    are passed over, with one of 1e-30 none is.
    """
    chunk, floor = 50, 3e-3
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = 2 * jax.random.normal(keys[0], (2, 5, 16))
    table = jax.random.normal(keys[1], (3020, 16))
    targets = jax.random.randint(keys[2], (2, 5), 0, 3020)

    def run(sweep):
        def nll(x):
            stats = token_stats(x, targets, jnp.ones_like(targets), table, softcap, sweep)
            return stats.nll.sum(), stats

        (_, stats), grad = jax.value_and_grad(nll, has_aux=True)(hidden)
        return stats, np.asarray(grad)

    exact, want = run(Sweep(chunk))
    for sweep in (Sweep(chunk, floor), Sweep(chunk, 1e-30)):
        stats, got = run(sweep)
        for one, other in zip(stats, exact, strict=True):
            assert np.array_equal(one, other)
        if sweep.floor < floor:
            assert np.allclose(got, want, atol=2e-6)
    z = np.asarray(hidden, np.float64) @ np.asarray(table, np.float64).T
    slope = np.ones_like(z)
    if softcap:
        slope, z = 1 - np.tanh(z / softcap) ** 2, np.tanh(z / softcap) * softcap
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    bound, passed = 0 * want[..., 0], 0
    for start in range(0, 3020, chunk):
        e = np.asarray(table[start : start + chunk], np.float64)
        mean = np.asarray(table[min(start, 3020 - chunk) :][:chunk], np.float64).mean(0)
        part, weights = p[..., start : start + chunk], (p * slope)[..., start : start + chunk]
        small = part.max(-1) < floor
        spread = np.linalg.norm(e - mean, axis=-1)
        bound += np.where(small, (weights * spread).sum(-1), 0)
        passed += small.mean() * chunk / 3020
    error = np.linalg.norm(run(Sweep(chunk, floor))[1] - want, axis=-1)
    assert 0.3 < passed < 1 and np.any(error > 1e-5)
    assert np.all(error <= bound + 1e-5)


@pytest.mark.parametrize("softcap", [0.0, 30.0])
def test_bfloat16_operands_are_summed_in_float32(softcap):
    """Against float64 of the same rounded numbers; logits in bfloat16 would be off by 0.1."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(3 * rng.standard_normal((2, 7, 64)), jnp.bfloat16)
    table = jnp.asarray(rng.standard_normal((300, 64)), jnp.bfloat16)
    targets = rng.integers(0, 300, (2, 7))
    h, w = (np.asarray(x, np.float64) for x in (hidden, table))
    raw = h @ w.T
    z = softcap * np.tanh(raw / softcap) if softcap else raw
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    nll = -np.log(np.take_along_axis(p, targets[..., None], -1)[..., 0])
    slope = p - np.eye(300)[targets]
    slope *= 1 - np.square(z / softcap) if softcap else 1

    def total(hidden):
        mask = jnp.ones(targets.shape)
        got = token_stats(hidden, jnp.asarray(targets), mask, table, softcap, Sweep(64)).nll
        return got.sum(), got

    (_, got), grad = jax.value_and_grad(total, has_aux=True)(hidden)
    assert got.dtype == jnp.float32 and np.allclose(got, nll, atol=1e-3)
    grad = np.asarray(grad, np.float64)
    assert np.linalg.norm(grad - slope @ w) < 1e-2 * np.linalg.norm(slope @ w)


def test_only_nll_has_a_gradient():
    hidden, head = jnp.ones((1, 2, 4)), jnp.eye(8, 4)
    targets = jnp.zeros((1, 2), jnp.int32)
    for name in ("margin", "other_p2"):
        grad = jax.grad(
            lambda x, n=name: getattr(
                token_stats(x, targets, targets + 1, head, 0, Sweep(4)), n
            ).sum()
        )
        assert not np.any(grad(hidden))


@pytest.mark.parametrize("floor", [0.0, 3e-3])
def test_positions_without_loss_do_not_matter(floor):
    """Of 1,500, wherever they lie: what stands there, NaN even, leaves 0 and no trace
    in the others, whose numbers are those they have when every position carries loss."""
    keys = jax.random.split(jax.random.key(1), 3)
    hidden = 3 * jax.random.normal(keys[0], (3, 500, 8))
    table = jax.random.normal(keys[1], (300, 8))
    targets = jax.random.randint(keys[2], (3, 500), 0, 300)

    def nll(x, mask):
        stats = token_stats(x, targets, mask, table, 20.0, Sweep(64, floor))
        return stats.nll.sum(), stats

    run = jax.jit(jax.value_and_grad(nll, has_aux=True))
    (_, want), grad = run(hidden, np.ones((3, 500), bool))
    for carry in (0, 1, 191, 192, 193, 1344, 1345, 1499):
        mask = np.zeros(1500, bool)
        mask[np.random.default_rng(carry).permutation(1500)[:carry]] = True
        mask = mask.reshape(3, 500)
        (_, got), own = run(jnp.where(mask[..., None], hidden, jnp.nan), mask)
        for all_of, some in zip((*want, grad), (*got, own), strict=True):
            assert np.allclose(some[mask], all_of[mask], rtol=1e-5, atol=1e-6)
            assert not np.any(some[~mask])
        assert not np.any(got.correct[~mask]) and not np.any(got.el2n[~mask])


def test_positions_without_loss_take_little_time():
    keys = jax.random.split(jax.random.key(1), 2)
    hidden = jax.random.normal(keys[0], (4, 512, 256))
    table = jax.random.normal(keys[1], (20_000, 256))
    targets = jnp.zeros((4, 512), jnp.int32)
    run = jax.jit(lambda mask: token_stats(hidden, targets, mask, table, 0.0, Sweep()).nll.sum())
    masks = [jnp.arange(512) < n for n in (512, 32)]
    masks = [jnp.broadcast_to(mask, (4, 512)) for mask in masks]
    seconds = np.zeros((5, 2))
    for turn in seconds:
        for i, mask in enumerate(masks):
            began = time.perf_counter()
            run(mask).block_until_ready()
            turn[i] = time.perf_counter() - began
    whole, few = np.median(seconds[1:], 0)
    assert few < 0.4 * whole  # an eighth of the positions is multiplied out


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "qwen2"])
def test_padding_changes_nothing(name):
    """Longer rows, more loss slots and empty rows leave every token's nll as it was."""
    model, params = common.tiny_model(name)
    tokens = tiny.tokens()
    mask = tiny.loss_mask(tokens.shape)
    plain = common.batch_of(tokens, mask)
    run = jax.jit(lambda batch: forward(model, Sweep(64), params, {}, batch, None))
    want = run(plain).nll * plain["loss_mask"]
    rows, length = tokens.shape
    wide = {k: np.zeros((rows + 2, v.shape[1] + 9), v.dtype) for k, v in plain.items()}
    for k, v in plain.items():
        wide[k][:rows, : v.shape[1]] = v
    wide["tokens"][rows:] = 5
    got = run(wide).nll * wide["loss_mask"]
    assert np.allclose(got[:rows, : want.shape[1]], want, atol=1e-5)
    assert not np.any(got[rows:]) and not np.any(got[:, want.shape[1] :])
    assert length == 24
