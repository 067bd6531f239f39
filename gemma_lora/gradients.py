"""Gradient of every training example: how large, how unlike the others', and whose is most alike.

    python -m gemma_lora.gradients --workdir DIR [--step best|last|0] [--dimension 1024]

takes the adapters of the run's checkpoint (0: those it started from), dropout off, and writes
DIR/gradients.parquet for gemma_lora.outliers. It costs a forward and a backward an example, as an
epoch of training does; where it is interrupted, nothing is written and it begins anew.

id; grad_norm: the l2 norm of the gradient of the example's mean loss on its completion with respect
to all adapters, exact (GraNd, arXiv:2107.07075); grad_misfit: 1 - cosine of the projected gradient
with the mean direction of the others'; neighbours, cosines: the examples with the most alike
projected gradients, the first the most (as LESS does, arXiv:2402.04333). TracIn's self-influence
(arXiv:2002.08484) at one checkpoint is the learning rate times grad_norm^2: it ranks the same.

Letters: B rows of a batch, n examples, m --dimension.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pyarrow
import pyarrow.parquet
from ml_collections import ConfigDict

from gemma_lora.attention import choose
from gemma_lora.compiled import keep_compiled
from gemma_lora.data.dataset import Dataset, shapes
from gemma_lora.data.pipeline import dataset
from gemma_lora.errors import Parser, UserError, run_main
from gemma_lora.evaluate import write_table
from gemma_lora.files import path_argument, require_writable
from gemma_lora.loss import Sweep
from gemma_lora.metrics import say
from gemma_lora.model import Transformer
from gemma_lora.outliers import DIMENSION
from gemma_lora.reopen import STEPS, Run, load, reopen, restored
from gemma_lora.sharding import batch_sharding, to_global
from gemma_lora.step import Batch, cut, head_stats, joined, loss_hidden

NEIGHBOURS = 5
_CHUNK = 256  # examples compared with all others at a time


def project(tree: Any, m: int, seed: int) -> jax.Array:
    """All leaves' elements -> [m]: each changes its sign or not, and is added to one of m sums.

    Sign and sum come from a hash of (seed, position): the count sketch of Charikar et al. 2002,
    feature hashing of Weinberger et al. (arXiv:0902.2206). <project(x), project(y)> is an unbiased
    estimate of <x, y> with a variance of at most (|x|^2 |y|^2 + <x, y>^2) / m.
    """
    out = jnp.zeros(m, jnp.float32)
    for n, leaf in enumerate(jax.tree.leaves(tree)):
        bits = jax.random.bits(jax.random.fold_in(jax.random.key(seed), n), (leaf.size,))
        sign = 1 - 2 * (bits & 1).astype(jnp.float32)
        out = out.at[(bits >> 1) % m].add(sign * leaf.ravel())
    return out


def make_gradient_step(
    model: Transformer, sweep: Sweep, m: int, seed: int, rows: int
) -> Callable[[Any, Any, Batch], tuple[jax.Array, jax.Array]]:
    """step(lora, base, batch) -> norm [B], projected [B,m] of each row's gradient, dropout off.

    A row's loss is the mean over its loss_mask; one without loss has gradient 0. `rows` at a time,
    which B must be a multiple of: no more gradients than these are held.
    """

    def loss(own, base, batch):
        """The sum of the rows' losses, each under the adapters of its own."""

        def hidden(lora, row):
            return loss_hidden(model, base, lora, jax.tree.map(lambda x: x[None], row), None)[0]

        # The head takes the rows together: how much it multiplies out depends on what they hold.
        nll = head_stats(model, sweep, base, jax.vmap(hidden)(own, batch), batch).nll
        tokens = jnp.maximum(jnp.sum(batch["loss_mask"], 1), 1)
        return jnp.sum(nll.sum(1) / tokens)

    def step(lora, base, batch):
        own = jax.tree.map(lambda x: jnp.broadcast_to(x, (rows, *x.shape)), lora)

        def some(batch):
            grads = jax.grad(loss)(own, base, batch)
            return jax.vmap(lambda x: (optax.tree.norm(x), project(x, m, seed)))(grads)

        groups = cut(batch, len(batch["loss_mask"]) // rows)
        return joined(jax.lax.map(some, groups))

    return step


def alone(train_set: Dataset, config: Any) -> Dataset:
    """The training examples once each, one a row, whatever the run packed."""
    config = ConfigDict(config.to_dict())
    config.data.pack = False
    rows = shapes(train_set.examples, config.data)
    return dataset(train_set.examples, config, rows, (), shuffle=False)


def completion_mask(owner: np.ndarray, answer: np.ndarray) -> np.ndarray:
    """[B,C] float32: the loss positions of the completion; all of a row's, where it was cut off."""
    inside = np.cumsum(answer, axis=1) > 0
    return ((owner >= 0) & (inside | ~answer.any(1, keepdims=True))).astype(np.float32)


def gradients(
    opened: Run, lora: Any, base: Any, m: int
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """(ids [n], norm [n] float64, projected [n,m] float32) in id order; UserError: not finite."""
    config, mesh = opened.config, opened.mesh
    data = alone(opened.train_set, config)
    n = len(data.examples)
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    model = opened.model
    # JAX's rule for a batch of cuDNN's calls takes no mask that is the same for all heads.
    facts = config.attention, model.arch, model.dtype
    if any(choose(*facts, length, mesh)[0] == "cudnn" for length in data.shapes):
        say("   attention: block; cudnn cannot take the gradients of several rows at once")
        model = model.clone(attention="block")
    # One row a device at a time. The floor of the run's sweep would make gradients inexact.
    step = make_gradient_step(model, Sweep(config.head.chunk), m, config.seed, ways)
    step = jax.jit(step, out_shardings=(batch_sharding(mesh, 1), batch_sharding(mesh)))
    norm, projected = np.zeros(n), np.zeros((n, m), np.float32)
    tenth = -(-data.steps_per_epoch // 10)
    for i in range(data.steps_per_epoch):
        batch = data.batch_at(i)
        mask = completion_mask(batch.owner, batch.answer)
        found = step(lora, base, to_global({**batch.arrays, "loss_mask": mask}, mesh))
        owner = batch.owner.max(1)
        there = owner >= 0
        norm[owner[there]], projected[owner[there]] = (x[there] for x in jax.device_get(found))
        if (i + 1) % tenth == 0:
            say(f"   {min(n, (i + 1) * data.batch_size)} of {n} examples")
    ids = [e.id for e in data.examples]
    if bad := [e for e, x in zip(ids, norm, strict=True) if not np.isfinite(x)]:
        raise UserError(f"the gradient of {len(bad)} examples is not finite, e.g. {bad[0]}")
    order = sorted(range(n), key=lambda i: ids[i])
    return [ids[i] for i in order], norm[order], projected[order]


def misfit(projected: np.ndarray) -> np.ndarray:
    """[n] in [0, 2]: 1 - cosine with the mean direction of the others; NaN without a gradient.

    Of gradients as they are the mean is that of the few largest, and near zero after training.
    """

    def parts():  # in float64 all rows at once are twice the memory of the projections
        for start in range(0, len(projected), _CHUNK):
            rows = projected[start : start + _CHUNK].astype(np.float64)
            yield rows / np.linalg.norm(rows, axis=1, keepdims=True)

    with np.errstate(invalid="ignore"):
        total = sum(np.nansum(own, axis=0) for own in parts())
        found = []
        for own in parts():
            others = total - np.nan_to_num(own)
            found.append(1 - (own * others).sum(1) / np.linalg.norm(others, axis=1))
    return np.concatenate(found)


def most_alike(projected: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(index, cosine) [n, min(k, n - 1)] of the rows most alike each, itself left out."""
    n = len(projected)
    k = min(k, n - 1)
    lengths = np.linalg.norm(projected, axis=1, keepdims=True)
    unit = projected / np.where(lengths > 0, lengths, 1)
    index, cosine = np.zeros((n, k), np.int64), np.zeros((n, k), np.float32)
    for start in range(0, n, _CHUNK):
        alike = unit[start : start + _CHUNK] @ unit.T
        at = np.arange(len(alike))
        alike[at, start + at] = -np.inf
        some = np.argpartition(-alike, k, axis=1)[:, :k]
        order = np.argsort(-np.take_along_axis(alike, some, 1), axis=1, kind="stable")
        index[start + at] = np.take_along_axis(some, order, 1)
        cosine[start + at] = np.take_along_axis(alike, index[start + at], 1)
    return index, cosine


def run(workdir: pathlib.Path, which: str, m: int) -> dict[str, Any]:
    """Writes gradients.parquet; returns its columns, in id order."""
    if m < 1:
        raise UserError(f"--dimension is {m}, expected at least 1")
    opened = reopen(workdir, which)
    require_writable(workdir / "gradients.parquet")
    base = load(opened)
    step, lora, base = restored(opened, workdir, which, base)
    say(f"   gradients under the adapters of step {step}")
    ids, norm, projected = gradients(opened, lora, base, m)
    index, cosine = most_alike(projected, NEIGHBOURS)
    columns = {
        "id": ids,
        "step": [step] * len(ids),
        "grad_norm": norm,
        "grad_misfit": misfit(projected),
        "neighbours": [[ids[j] for j in row] for row in index],
        "cosines": list(cosine),
    }
    write_table(workdir / "gradients.parquet", pyarrow.table(columns))
    return columns


def main() -> None:
    parser = Parser("gemma_lora.gradients", __doc__)
    parser.add_argument("--workdir", required=True, type=path_argument)
    parser.add_argument("--step", choices=STEPS, default=STEPS[0])
    parser.add_argument(
        "--dimension", type=int, default=DIMENSION, help="of the projected gradients"
    )
    options = parser.parse_args()
    keep_compiled()
    columns = run(options.workdir, options.step, options.dimension)
    say(f"{len(columns['id'])} gradients: {options.workdir / 'gradients.parquet'}")


if __name__ == "__main__":
    run_main(main)
