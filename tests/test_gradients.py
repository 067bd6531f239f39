"""Gradients of examples against jax.grad of each alone; the projection; what is written."""

import dataclasses
import functools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pyarrow.parquet
import pytest
import tiny_run

from gemma_lora import gradients, outliers
from gemma_lora.checkpoint import Checkpoints
from gemma_lora.data.dataset import Dataset
from gemma_lora.errors import UserError
from gemma_lora.gradients import make_gradient_step, project
from gemma_lora.lora import LoRAConfig
from gemma_lora.loss import Sweep
from gemma_lora.model import head_weight, logits
from gemma_lora.optim import optimizer
from gemma_lora.step import State, init_state, make_train_step

pytestmark = pytest.mark.usefixtures("quick")

NAME, M = "gemma3", 64


def by_hand(model, params, lora, tokens: np.ndarray, loss_from: int):
    """Gradient of the mean -log p of tokens[loss_from:], of one example without padding."""
    weights = np.arange(1, len(tokens)) >= loss_from
    return gradient_of(model)(lora, params, tokens, weights / weights.sum())


@functools.cache
def gradient_of(model):
    def loss(lora, params, tokens, weights):
        t = tokens[None]
        places = jnp.arange(len(tokens))[None]
        hidden = model.apply({"params": params, "lora": lora}, t, jnp.ones_like(t), places)
        z = logits(hidden, head_weight(params, model.arch), model.arch, model.dtype)[0]
        return -weights @ jax.nn.log_softmax(z)[jnp.arange(len(tokens) - 1), tokens[1:]]

    return jax.jit(jax.grad(loss))


def norm_of(tree) -> float:
    return float(np.sqrt(sum(np.sum(np.square(x, dtype=float)) for x in jax.tree.leaves(tree))))


def same(got: np.ndarray, want: np.ndarray) -> bool:
    got, want = np.asarray(got), np.asarray(want)
    return np.linalg.norm(got - want) <= 1e-4 * np.linalg.norm(want)


def test_equals_each_example_alone_and_their_sum_the_batch():
    """Dropout is off; the padding does not matter, nor that two rows go at a time."""
    model, params = common.tiny_model(NAME, LoRAConfig(4, 8.0, 0.5))
    lora = common.random_adapter(model, params)
    some = common.examples([20, 7, 20, 7], [4, 1, 19, 2])
    data = Dataset(some, shapes={32: 24}, batch_size=4, pack=False, seed=0, shuffle=False)
    batch = data.batch_at(0).arrays
    norm, projected = jax.jit(make_gradient_step(model, Sweep(64), M, 0, 2))(lora, params, batch)
    for i, e in enumerate(some):
        tree = by_hand(model, params, lora, e.tokens, e.loss_from)
        assert norm[i] == pytest.approx(norm_of(tree), rel=1e-4)
        assert same(projected[i], project(tree, M, 0))

    still, _ = common.tiny_model(NAME, LoRAConfig(4, 8.0, 0.0))
    tx = optax.trace(0.0)  # its state is the gradient
    state = State(jnp.zeros((), jnp.int32), lora, tx.init(lora))
    after, sums = jax.jit(make_train_step(still, tx, 1, Sweep(64), 0))(state, params, batch)
    loads = np.array([e.load for e in some])
    mean = loads @ np.asarray(projected) / loads.sum()
    assert same(mean, project(after.opt_state.trace, M, 0))
    assert norm_of(after.opt_state.trace) == pytest.approx(float(sums["grad_norm"]), rel=1e-5)


SHARDED = """
import common, jax, numpy as np
from gemma_lora import reopen
from gemma_lora.config import default
from gemma_lora.data.dataset import Dataset
from gemma_lora.gradients import make_gradient_step
from gemma_lora.lora import LoRAConfig
from gemma_lora.loss import Sweep
from gemma_lora.sharding import make_mesh, to_global, tree_shardings

model, params = common.tiny_model("gemma3", LoRAConfig(4, 8.0, 0.0))
lora = jax.device_get(common.random_adapter(model, params))
some = common.examples([20, 7, 12, 9] * 4, [4, 1, 5, 2] * 4)
data = Dataset(some, shapes={32: 24}, batch_size=16, pack=False, seed=0, shuffle=False)
found = []
for sizes in ((1, 1, 1), (2, 2, 2)):
    n = int(np.prod(sizes))
    mesh = make_mesh(dict(zip(("data", "fsdp", "tensor"), sizes)), jax.devices()[:n])
    where = tree_shardings(model.abstract()["params"], mesh)
    base = jax.device_put(jax.device_get(params), where)
    step = make_gradient_step(model.clone(mesh=mesh), Sweep(64), 32, 0, 4)
    batch = to_global(data.batch_at(0).arrays, mesh)
    found.append(jax.device_get(jax.jit(step)(lora, base, batch)))
for one, eight in zip(*found):
    assert np.all(one[:, None] if one.ndim < 2 else one.any(1))
    assert np.allclose(one, eight, rtol=1e-4, atol=1e-5 * np.abs(one).max())

# On other devices than the run had, as many are taken as share its rows.
reopen.say = lambda line: None
for changes, expected in (
    ({"data.batch_size": 8}, (1, 8, 1)),
    ({"data.batch_size": 6}, (1, 6, 1)),
    ({"data.batch_size": 8, "train.micro_batches": 4}, (1, 2, 1)),
    ({"data.batch_size": 16, "mesh.fsdp": 16}, (1, 8, 1)),
    ({"data.batch_size": 16, "mesh.tensor": 2}, (1, 4, 2)),
):
    c = default()
    c.update_from_flattened_dict(changes)
    assert tuple(reopen._mesh(c).shape.values()) == expected, changes
print("equal")
"""


def test_eight_devices_and_one():
    """Their gradients are the same; and what a run is opened again on."""
    common.on_eight_devices(SHARDED)


def test_projection_adds_each_element_to_one_sum():
    """Linear, by a matrix with one 1 or -1 a column, about as many in every row."""
    like = {"a": jnp.zeros((3, 40)), "b": jnp.zeros(80)}
    flat, back = jax.flatten_util.ravel_pytree(like)
    matrix = np.asarray(jax.vmap(lambda x: project(back(x), 8, 1))(jnp.eye(flat.size))).T
    assert np.array_equal(abs(matrix).sum(0), np.ones(200)) and set(matrix.ravel()) == {-1, 0, 1}
    assert abs(matrix).sum(1).min() >= 10 and abs(matrix.sum()) < 60
    x = np.random.default_rng(0).standard_normal(200).astype(np.float32)
    assert np.allclose(project(back(jnp.asarray(x)), 8, 1), matrix @ x, atol=1e-5)
    other = np.asarray(jax.vmap(lambda x: project(back(x), 8, 2))(jnp.eye(flat.size))).T
    assert not np.array_equal(matrix, other)


@pytest.mark.parametrize("dense", [True, False])
def test_projection_keeps_inner_products(dense):
    """Over 400 seeds the mean is right, and the variance no larger than stated.

    The bounds are five standard errors: those of a mean and of a variance of 400 draws. In the
    second case the vectors are but a few elements, which share a sum in few of the draws.
    """
    rng, draws = np.random.default_rng(0), 400
    x, y = rng.standard_normal((2, 2000)).astype(np.float32)
    y += 0.5 * x
    if not dense:
        x[5:], y[5:] = 0, 0
    pair = jax.jit(jax.vmap(lambda s: project(x, M, s) @ project(y, M, s)))
    got = np.asarray(pair(jnp.arange(draws)), np.float64)
    exact = float(x.astype(np.float64) @ y)
    bound = (float(x @ x) * float(y @ y) + exact**2) / M
    assert abs(got.mean() - exact) < 5 * np.sqrt(bound / draws)
    spread = 5 * np.std((got - exact) ** 2) / np.sqrt(draws)
    assert np.mean((got - exact) ** 2) < bound + spread
    if dense:  # and nearly as large: the bound is no idle one
        assert np.mean((got - exact) ** 2) > 0.7 * bound


def test_most_alike_and_misfit_by_hand(monkeypatch):
    """Cosines of all pairs, in chunks or not; one that points the other way fits least."""
    monkeypatch.setattr(gradients, "_CHUNK", 7)
    rng = np.random.default_rng(0)
    p = (rng.standard_normal((20, 8)) + 3).astype(np.float32)
    p[3] *= -1
    p[11], p[4] = 2 * p[6], 0
    p[9] *= 100  # which must not decide what the mean is
    index, cosine = gradients.most_alike(p, 5)
    assert index.shape == cosine.shape == (20, 5)
    assert index[6][0] == 11 and index[11][0] == 6 and cosine[6][0] == pytest.approx(1)
    misfit = gradients.misfit(p)
    for i in range(20):
        if i == 4:
            assert np.isnan(misfit[i]) and not cosine[i].any()
            continue
        rest, own = np.delete(p, i, 0).astype(float), p[i].astype(float)
        lengths = np.linalg.norm(rest, axis=1)
        to = rest @ own / np.where(lengths > 0, lengths, 1) / np.linalg.norm(own)
        assert np.allclose(cosine[i], np.sort(to)[::-1][:5], atol=1e-6)
        mean = np.mean(rest / np.where(lengths > 0, lengths, 1)[:, None], 0)
        want = 1 - mean @ own / np.linalg.norm(mean) / np.linalg.norm(own)
        assert misfit[i] == pytest.approx(want, rel=1e-6)
    assert np.nanargmax(misfit) == 3
    assert gradients.most_alike(p[:1], 5)[0].shape == (1, 0) and np.isnan(gradients.misfit(p[:1]))


def test_completion_alone():
    """The prompt's losses are left out; without a completion all of the row's count."""
    owner = np.array([[0, 0, 0, -1], [1, 1, -1, -1], [-1] * 4])
    answer = np.zeros((3, 4), bool)
    answer[0, 1] = True
    want = [[0, 1, 1, 0], [1, 1, 0, 0], [0] * 4]
    assert gradients.completion_mask(owner, answer).tolist() == want


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Iterator[Path]:
    """Eight steps on 18 examples and a copy of one; best at 8, and a checkpoint after it."""
    directory = tmp_path_factory.mktemp("gradients")
    with tiny_run.quick_compilation():
        inputs = tiny_run.write_inputs(directory)
        copy = {"id": "copy", "question": "1 + 2", "answer": "It is 3."}
        with open(inputs / "train.jsonl", "a", encoding="utf-8") as f:
            f.write(json.dumps(copy) + "\n")
        changes = {"train.ledger_every": 4, "data.loss_on": "all"}
        workdir = directory / "run"
        tiny_run.run(workdir, tiny_run.settings(inputs, changes))
        opened = gradients.reopen(workdir)
        tx = optimizer(opened.config.optim, 8)
        checkpoints = Checkpoints(workdir / "checkpoints")
        like = init_state(opened.model, tx, 0, opened.mesh)
        state, notes = checkpoints.restore(8, like)
        assert notes["best_step"] == 8
        checkpoints.save(9, state.replace(lora=jax.tree.map(jnp.negative, state.lora)), notes)
        checkpoints.close()
        yield workdir


def test_what_the_command_writes(run):
    """Of the adapters of the best step; outliers takes the scores and shows the neighbours."""
    gradients.run(run, "best", 128)
    table = pyarrow.parquet.read_table(run / "gradients.parquet")
    assert table.column_names == ["id", "step", "grad_norm", "grad_misfit", "neighbours", "cosines"]
    rows = {r["id"]: r for r in table.to_pylist()}
    assert list(rows) == sorted(rows) and len(rows) == 19
    assert rows["copy"]["neighbours"][0] == "1+2" and rows["1+2"]["neighbours"][0] == "copy"
    assert rows["copy"]["cosines"][0] == pytest.approx(1, abs=1e-5)
    assert all(i not in r["neighbours"] and len(r["cosines"]) == 5 for i, r in rows.items())

    opened = gradients.reopen(run)
    base = gradients.load(opened)
    step, lora, _ = gradients.restored(opened, run, "best", base)
    assert step == 8
    for e in opened.train_set.examples[:3]:
        tree = by_hand(opened.model, base, lora, e.tokens, e.answer_from)
        assert e.answer_from > e.loss_from  # the run trained on all tokens
        assert rows[e.id]["grad_norm"] == pytest.approx(norm_of(tree), rel=1e-3)

    columns = outliers.mine(run, 19, None)
    assert list(columns["grad_norm"]) == [rows[i]["grad_norm"] for i in columns["id"]]
    assert list(columns["grad_misfit"]) == [rows[i]["grad_misfit"] for i in columns["id"]]
    page = (run / "outliers.md").read_text()
    part = page.partition(". `copy`: ")[2].partition("\n## ")[0]
    texts = {e["id"]: e["text"] for e in outliers.read_examples(run, "train")}
    assert f"- `1+2`, cosine 1.000: `{' '.join(texts['1+2'].split())}`" in part
    assert part.count("cosine") == 5
    assert "The adapters of step 8 made `grad_norm` and `grad_misfit`." in page


def test_of_a_batch_attention_is_not_cudnns(run, monkeypatch):
    """JAX batches no mask that is the same for all heads there."""
    opened = gradients.reopen(run)
    base = gradients.load(opened)
    _, lora, base = gradients.restored(opened, run, "best", base)
    block = dataclasses.replace(opened, model=opened.model.clone(attention="block"))
    expected = gradients.gradients(block, lora, base, M)
    monkeypatch.setattr(gradients, "choose", lambda *args: ("cudnn", ""))
    opened = dataclasses.replace(opened, model=opened.model.clone(attention="cudnn"))
    found = gradients.gradients(opened, lora, base, M)
    assert np.array_equal(found[1], expected[1])


def test_gradients_are_exact_where_the_run_passed_over_words(run, monkeypatch):
    made = []

    def step(model, sweep, *rest):
        made.append(sweep)
        raise KeyError

    monkeypatch.setattr(gradients, "make_gradient_step", step)
    opened = gradients.reopen(run)
    opened.config.head.floor = 1e-3
    with pytest.raises(KeyError):
        gradients.gradients(opened, None, None, M)
    assert made == [Sweep(opened.config.head.chunk, 0.0)]


def test_steps(run):
    """The checkpoint that was asked for; at step 0 B is zero, and so are all gradients of A."""
    opened = gradients.reopen(run)
    base = gradients.load(opened)
    found = {which: gradients.restored(opened, run, which, base) for which in gradients.STEPS}
    assert [found[w][0] for w in gradients.STEPS] == [8, 9, 0]
    for x, y in zip(*(jax.tree.leaves(found[w][1]) for w in ("best", "last")), strict=True):
        assert np.array_equal(x, -y)
    e = opened.train_set.examples[0]
    tree = by_hand(opened.model, base, found["0"][1], e.tokens, e.loss_from)
    for leaves in tree["layers"]["attn"].values():
        assert not np.any(leaves["a"]) and np.any(leaves["b"])


@pytest.mark.once
def test_packing_and_length_of_rows_do_not_matter(run, tmp_path):
    """Runs that start from the same adapters and batch the same examples otherwise."""
    want = gradients.run(run, "0", M)
    for name, changes in {
        "packed": {"data.pack": True, "data.seq_len": 96},
        "buckets": {"data.buckets": (24, 48), "data.batch_size": 3, "data.loss_on": "completion"},
    }.items():
        c = tiny_run.settings(run.parent, {"train.max_steps": 1, **changes})
        tiny_run.run(tmp_path / name, c)
        got = gradients.run(tmp_path / name, "0", M)
        assert got["id"] == want["id"]
        for column in ("grad_norm", "grad_misfit", "cosines"):
            assert np.allclose(got[column], want[column], rtol=1e-4, atol=1e-5), (name, column)


def test_without_a_checkpoint(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(UserError, match="checkpoints holds no checkpoint: expected --step 0"):
        gradients.run(tmp_path / "run", "best", M)
    assert not (tmp_path / "run" / "checkpoints").exists()
    with pytest.raises(UserError, match="--dimension is 0, expected at least 1"):
        gradients.run(run, "best", 0)


@pytest.mark.parametrize(
    ("file", "message"),
    [("config.json", "config.json is missing"), ("run.json", "run.json is missing")],
)
def test_no_run_or_other_data(run, tmp_path, file, message):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / file).unlink()
    with pytest.raises(UserError, match=message):
        gradients.run(tmp_path / "run", "best", M)


def test_other_data_than_the_run_had(run, tmp_path):
    """A changed text is seen, though its id is the same."""
    shutil.copytree(run, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    lines = (run.parent / "train.jsonl").read_text()
    (tmp_path / "train.jsonl").write_text(lines.replace("It is 3.", "It is 4."))
    config["data"]["path"] = str(tmp_path / "train.jsonl")
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"the data are no longer those of the run in .*: got "):
        gradients.run(tmp_path / "run", "best", M)


def test_other_weights_than_the_run_had(run, monkeypatch):
    opened = gradients.reopen(run)
    opened.begun["weights_fingerprint"] = "another"
    monkeypatch.setattr(gradients, "reopen", lambda *_: opened)
    with pytest.raises(UserError, match="no longer the weights of the run"):
        gradients.run(run, "best", M)
