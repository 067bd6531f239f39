"""The training step: what it moves, what it may not depend on."""

import functools

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from gemma_lora import step as steps
from gemma_lora.config import default
from gemma_lora.data.dataset import Dataset, loss_slots
from gemma_lora.errors import UserError
from gemma_lora.evaluate import ledger_rows
from gemma_lora.lora import LoRAConfig
from gemma_lora.loss import Sweep
from gemma_lora.model import REMAT
from gemma_lora.optim import optimizer, schedule
from gemma_lora.sharding import make_mesh
from gemma_lora.step import (
    State,
    forward,
    init_state,
    jit_train_step,
    make_eval_step,
    make_train_step,
)
from gemma_lora.weights.mapping import flatten

pytestmark = pytest.mark.usefixtures("quick")

NAME = "gemma3"


@functools.cache
def one_run(micro_batches=1, dropout=0.0, name="qwen2", **kwargs):
    """(first state, last state, base, compilations) of two steps on random batches."""
    model, params = common.tiny_model(name, LoRAConfig(4, 8.0, dropout), **kwargs)
    optim = default().optim
    optim.clip = 0.0  # or a factor of all gradients would go unseen
    tx = optimizer(optim, 10)
    lora = common.adapter(name)
    state = State(jnp.zeros((), jnp.int32), lora, tx.init(lora))
    state = jax.device_put(state, jax.devices()[0])  # committed, as the step's own output is
    step = jax.jit(make_train_step(model, tx, micro_batches, Sweep(64), 0))
    first = state
    for i in range(2):
        tokens = tiny.tokens(i, rows=4)
        batch = common.batch_of(tokens, tiny.loss_mask(tokens.shape, i), 24)
        with common.all_passes():  # without them sums round more than same_moments allows
            state, _ = step(state, params, batch)
    return first, state, params, step._cache_size()


def test_dropout_is_of_the_seed():
    model, params = common.tiny_model("gemma", LoRAConfig(4, 8.0, 0.5))
    tx = optimizer(default().optim, 10)
    lora = common.adapter("gemma")
    state = State(jnp.zeros((), jnp.int32), lora, tx.init(lora))
    tokens = tiny.tokens(rows=2)
    batch = common.batch_of(tokens, tiny.loss_mask(tokens.shape), 24)
    losses = []
    for seed in (0, 1):
        config = default()
        config.seed = seed
        own = jax.tree.map(jnp.array, state)  # which the step takes
        step = jit_train_step(model, tx, config, own, common.one_device())
        losses.append(float(step(own, params, batch)[1]["nll"].sum()))
    assert abs(losses[1] - losses[0]) > 1e-3


def test_adapters_start_by_the_seed():
    model, _ = common.tiny_model("gemma", LoRAConfig(4, 8.0, 0.0))
    tx, mesh = optimizer(default().optim, 10), common.one_device()
    one, same, other = (flatten(init_state(model, tx, seed, mesh).lora) for seed in (3, 3, 4))
    for key, x in one.items():
        assert np.array_equal(x, same[key])
        assert np.array_equal(x, other[key]) == key.endswith("/b"), key


def test_logits_of_label_words_are_soft_capped():
    model, params = common.tiny_model("gemma2")
    tokens, words = tiny.tokens(rows=2), (5, 9, 77)
    batch = common.batch_of(tokens, tiny.loss_mask(tokens.shape))
    got = jax.jit(make_eval_step(model, Sweep(64), words))({}, params, batch)["label_logits"]
    z = common.all_logits(model, params, {}, tokens)[:, :, words]
    want = np.take_along_axis(z, np.asarray(batch["loss_pos"])[..., None], axis=1)
    np.testing.assert_allclose(got, want, atol=1e-4)


def same_moments(one: State, other: State) -> None:
    """Adam's moments, which are the gradients: its updates would magnify rounding near zero."""
    for a, b in zip(jax.tree.leaves(one.opt_state), jax.tree.leaves(other.opt_state), strict=True):
        assert np.max(np.abs(a - b)) <= 1e-5 * np.max(np.abs(a))


def test_moves_every_adapter_and_no_base_weight_and_compiles_once():
    _, params = common.tiny_model(NAME)
    before = jax.device_get(params)
    first, last, base, compilations = one_run(dropout=0.1, name=NAME)
    assert compilations == 1
    assert int(last.step) == 2
    for path, leaf in flatten(base).items():
        assert np.array_equal(leaf, flatten(before)[path]), path
    for path, leaf in flatten(last.lora).items():
        moved = np.any(np.asarray(leaf) != np.asarray(flatten(first.lora)[path]), axis=(1, 2))
        assert np.all(moved), path  # in every layer


def test_micro_batches_equal_one_batch():
    """Rows of unequal loss counts: a mean of means would differ."""
    same_moments(one_run()[1], one_run(micro_batches=4)[1])


@pytest.mark.parametrize(
    "change", [*({"remat": name} for name in REMAT if name != "none"), {"unroll": True}]
)
def test_remat_and_unroll_change_nothing(change):
    same_moments(one_run()[1], one_run(**change)[1])


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "qwen2"])
def test_packed_equals_unpacked(name):
    """Neighbours in a row change nothing, although rows are longer than the window."""
    model, params = common.tiny_model(name, LoRAConfig(4, 8.0, 0.0))
    examples = common.examples([20, 7, 12, 5, 24, 3], [4, 1, 11, 2, 9, 1])
    step = jax.jit(make_eval_step(model, Sweep(64)))
    rows = {}
    for packed in (False, True):
        data = Dataset(
            examples,
            shapes={32: loss_slots(examples, 32, packed)},
            batch_size=2,
            pack=packed,
            seed=0,
            shuffle=False,
        )
        rows[packed] = ledger_rows(
            step, common.adapter(name), params, data, common.one_device(), "x", 0
        )
    assert len(data.plan(0)) < len(examples)
    for column in ("tokens", "correct"):
        assert np.array_equal(rows[False][column], rows[True][column])
    for column in ("nll", "nll_max", "margin", "el2n"):
        assert np.allclose(rows[False][column], rows[True][column], rtol=1e-4, atol=1e-5), column


def test_an_evaluation_takes_a_micro_batch_at_a_time():
    model, params = common.tiny_model(NAME, LoRAConfig(4, 8.0, 0.5))
    tokens = tiny.tokens(0, rows=8)
    batch = common.batch_of(tokens, tiny.loss_mask(tokens.shape), 24)
    found = []
    for micro_batches in (1, 4):
        step = jax.jit(make_eval_step(model, Sweep(64), (5, 7), micro_batches))
        compiled = step.lower(common.adapter(NAME), params, batch).compile()
        values = compiled(common.adapter(NAME), params, batch)
        found.append((values, compiled.memory_analysis().temp_size_in_bytes))
    (whole, much), (cut, little) = found
    assert little < 0.5 * much
    assert cut["label_logits"].shape == (8, 24, 2)
    for name, x in whole.items():
        assert np.allclose(x, cut[name], rtol=1e-4, atol=1e-5), name


def test_bfloat16_stays_near_float32():
    model, params = common.tiny_model(NAME)
    half, _ = common.tiny_model(NAME, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    want = common.all_logits(model, params, {}, tiny.tokens())
    cast = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    got = common.all_logits(half, cast, {}, tiny.tokens())
    error = np.sqrt(np.mean((got - want) ** 2)) / np.std(want)
    assert 1e-4 < error < 0.1


def test_gradients_in_bfloat16_stay_near_those_in_float32():
    """Of float32 adapters, in float32."""
    lora, found = common.adapter(NAME), {}
    batch = common.batch_of(tiny.tokens(), tiny.loss_mask(tiny.tokens().shape))
    for dtype in (jnp.float32, jnp.bfloat16):
        kind = {"dtype": dtype, "param_dtype": dtype}
        model, params = common.tiny_model(NAME, LoRAConfig(4, 8.0, 0.0), **kind)
        params = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype) if x.ndim > 2 else x, params)

        def loss(lora, model=model, params=params):
            stats = forward(model, Sweep(64), params, lora, batch, None)
            return jnp.sum(stats.nll * batch["loss_mask"]) / batch["loss_mask"].sum()

        found[dtype] = flatten(jax.jit(jax.grad(loss))(lora))
    for path, exact in found[jnp.float32].items():
        got = found[jnp.bfloat16][path]
        assert got.dtype == jnp.float32
        assert 1e-4 < np.linalg.norm(got - exact) / np.linalg.norm(exact) < 0.05, path


def test_dropout_differs_between_steps_and_micro_batches():
    model, params = common.tiny_model(NAME, LoRAConfig(4, 8.0, 0.5))
    tx, lora = optimizer(default().optim, 10), common.adapter(NAME)
    tokens = np.repeat(tiny.tokens(rows=1), 2, axis=0)
    batch = common.batch_of(tokens, tiny.loss_mask(tokens.shape)[:1].repeat(2, axis=0))
    step = jax.jit(make_train_step(model, tx, 2, Sweep(64), 0))
    seen = []
    for at in (0, 1, 0):
        _, sums = step(State(jnp.asarray(at), lora, tx.init(lora)), params, batch)
        seen.append([float(x) for x in sums["nll"]])
    assert seen[0] == seen[2] and len({*seen[0], *seen[1]}) == 4


@pytest.mark.parametrize("norm", [0.5, 2.0])
def test_gradients_are_clipped_to_their_norm(norm):
    tx = optimizer(default().optim, 10)
    grads = {"a": jnp.full(4, norm / 2)}
    _, state = tx.update(grads, tx.init(grads), grads)
    first = optax.tree_utils.tree_get(state, "mu")["a"]
    assert np.allclose(first, 0.1 * min(norm, 1.0) / 2)


SHARDED = """
import common, re, jax, jax.numpy as jnp, numpy as np, tiny
from gemma_lora import loss
from gemma_lora.config import default
from gemma_lora.loss import Sweep
from gemma_lora.lora import LoRAConfig
from gemma_lora.optim import optimizer
from gemma_lora.sharding import batch_sharding, make_mesh, tree_shardings, to_global
from gemma_lora.step import State, make_train_step

assert jax.device_count() == 8
loss._FEWEST = 0  # programs for 16 tokens and for 24 on each of eight devices
model, params = common.tiny_model("gemma3", LoRAConfig(4, 8.0, 0.0))
boxed = model.abstract()
optim = default().optim
optim.clip = 0.0
tx = optimizer(optim, 10)
tokens = tiny.tokens(0, rows=16)
batch = jax.device_get(common.batch_of(tokens, tiny.loss_mask(tokens.shape), 24))
rows, length = tokens.shape
rows //= 2  # of a micro-batch
results, peaks = {}, {}
for sizes in ((1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4), (1, 2, 1)):
    n = int(np.prod(sizes))
    mesh = make_mesh(dict(zip(("data", "fsdp", "tensor"), sizes)), jax.devices()[:n])
    where = {k: tree_shardings(boxed[k], mesh) for k in ("params", "lora")}
    base = jax.device_put(jax.device_get(params), where["params"])
    lora = jax.device_put(common.adapter("gemma3"), where["lora"])
    state = State(jnp.zeros((), jnp.int32), lora, tx.init(lora))
    arrays = to_global(batch, mesh)
    floor = 1e-30 if n > 1 else 0.0  # so low that no chunk is passed over
    step = jax.jit(make_train_step(model.clone(mesh=mesh), tx, 2, Sweep(16, floor), 0))
    step = step.lower(state, base, arrays).compile()
    (in_state, in_base, in_batch), _ = step.input_shardings
    same = lambda x, got, want: got.is_equivalent_to(want, x.ndim)
    assert all(jax.tree.leaves(jax.tree.map(same, base, in_base, where["params"])))
    assert all(jax.tree.leaves(jax.tree.map(same, lora, in_state.lora, where["lora"])))
    assert all(same(arrays[k], in_batch[k], batch_sharding(mesh)) for k in arrays)
    up = base["layers"]["mlp"]["up_proj"]["w"]  # of D and F, split over fsdp and tensor
    assert np.prod(in_base["layers"]["mlp"]["up_proj"]["w"].shard_shape(up.shape)) * (
        sizes[1] * sizes[2]) == up.size
    # The activations: a device multiplies its own rows, and with tensor its own part of F.
    arch, text = model.arch, step.as_text()
    ways = sizes[0] * sizes[1]
    mine = lambda rows, width: re.search(rf"f32\\[{rows},{length},{width}\\]", text)
    assert mine(rows // ways, arch.embed) and mine(rows // ways, arch.hidden // sizes[2])
    if ways > 1:
        assert not mine(rows, arch.embed) and not mine(rows, arch.hidden)
    if sizes[2] > 1:
        assert not mine(rows // ways, arch.hidden)
    # Each device's own words of the table, a chunk at a time: the table is nowhere gathered.
    whole = f"f32[{arch.vocab},{arch.embed}]"
    gathered = [x for x in text.splitlines() if " all-gather" in x and whole in x]
    assert not gathered, gathered
    memory = step.memory_analysis()
    peaks[sizes] = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    state, metrics = step(state, base, arrays)
    results[sizes] = jax.device_get((metrics, state.opt_state))
mean = lambda r: float(r[0]["nll"].sum() / r[0]["tokens"].sum())
alone = results.pop((1, 1, 1))
for r in results.values():
    assert abs(mean(r) / mean(alone) - 1) < 1e-5, (mean(r), mean(alone))
    for a, b in zip(jax.tree.leaves(r[1]), jax.tree.leaves(alone[1])):
        scale = np.max(np.abs(b)) + 1e-30
        assert np.max(np.abs(a - b)) / scale < 1e-5, np.max(np.abs(a - b)) / scale
falling = [peaks[1, n, 1] for n in (1, 2, 8)]
assert all(b < 0.75 * a for a, b in zip(falling, falling[1:])), falling
assert all(p < 0.4 * falling[0] for s, p in peaks.items() if np.prod(s) == 8), peaks
print("equal")
"""


def test_sharded_on_eight_devices_equals_one_device():
    """Loss and Adam's first moments (the gradients) for six meshes, in a process of its own; the
    weights, the batch and the activations are split, and a device holds less the more there are."""
    common.on_eight_devices(SHARDED)


def test_lora_plus_is_another_learning_rate_for_b_and_m():
    """A moves as without it; decay, moments and schedule are untouched."""
    optim = default().optim
    optim.weight_decay = 0.1
    leaves = {"a": jnp.ones((3, 2)), "b": jnp.ones((2, 3)), "m": jnp.ones(3)}
    lora = {"layers": {"attn": {"q_proj": leaves}}}
    grads = jax.tree.map(lambda x: 0.3 * x, lora)
    moves = {}
    for ratio in (1.0, 16.0):
        optim.b_lr_ratio = ratio
        tx = optimizer(optim, 10)
        moves[ratio], _ = tx.update(grads, tx.init(lora), lora)
    for path, move in flatten(moves[1.0]).items():
        # AdamW's first update of equal gradients: -lr (sign of the gradient + decay x weight).
        assert np.allclose(move, -optim.lr * (1 + 0.1), rtol=1e-6)
        factor = 1 if path.endswith("/a") else 16
        assert np.any(move) and np.allclose(flatten(moves[16.0])[path], factor * move, rtol=1e-6)


def test_schedules():
    """Values of transformers' get_scheduler for 10 steps, 2 of them warmup, at a peak of 1."""
    optim = default().optim
    optim.lr, optim.warmup_steps = 1.0, 2
    want = {
        "linear": [0, 0.5, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125],
        "cosine": [0, 0.5, *(0.5 * (1 + np.cos(np.pi * np.arange(8) / 8)))],
        "constant": [0, 0.5] + [1] * 8,
    }
    for name, values in want.items():
        optim.schedule = name
        got = [float(schedule(optim, 10)(i)) for i in range(10)]
        assert np.allclose(got, values, atol=1e-6), name
    optim.schedule = "linaer"
    with pytest.raises(UserError, match="linear"):
        schedule(optim, 10)


def test_optimizers_of_several_groups_and_of_other_shapes_than_the_parameters():
    """Every leaf of the state is where its parameter is, or whole."""
    model, _ = common.tiny_model(NAME, LoRAConfig(4, 8.0, 0.0))
    mesh = common.one_device()
    groups = optax.partition(
        {"a": optax.adam(1e-3), "b": optax.lion(1e-3)},
        lambda tree: jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key, tree),
    )
    factored = optax.scale_by_factored_rms(min_dim_size_to_factor=1)
    for tx, like in ((groups, 3), (factored, 0)):  # moments of A are two, of B one
        state = steps.init_state(model, tx, 0, mesh)
        modules = len(jax.tree.leaves(state.lora)) // 2
        where = {x.shape: x.sharding for x in jax.tree.leaves(state.lora)}
        kept = [x for x in jax.tree.leaves(state.opt_state) if x.shape in where]
        assert len(kept) == like * modules and all(x.sharding == where[x.shape] for x in kept)
        updates, _ = tx.update(state.lora, state.opt_state, state.lora)
        assert jax.tree.structure(updates) == jax.tree.structure(state.lora)


def test_both_steps_sweep_the_head_as_the_config_says(monkeypatch):
    made = []

    def recorded(*arguments):
        made.extend(x for x in arguments if isinstance(x, Sweep))
        return lambda *trees: trees

    for name in ("make_train_step", "make_eval_step"):
        monkeypatch.setattr(steps, name, recorded)
    c = default()
    c.head.chunk, c.head.floor = 512, 1e-3
    mesh = make_mesh(c.mesh, jax.devices()[:1])
    steps.jit_train_step(None, None, c, State(*map(jnp.zeros, (1, 2, 3))), mesh)
    steps.jit_eval_step(None, c, (), mesh)
    assert made == 2 * [Sweep(512, 1e-3)]
