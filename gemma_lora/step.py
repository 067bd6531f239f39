"""The training step and the evaluation step: pure functions over trees.

`base` (frozen weights) is an argument, never donated, never returned; the gradient is taken with
respect to `lora` alone, so frozen weights have neither gradient nor optimizer state.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from gemma_lora.loss import TokenStats, token_stats
from gemma_lora.model import Transformer, head_weight

Batch = dict[str, jax.Array]  # the arrays of data.dataset.Batch


@flax.struct.dataclass
class State:
    """All that training changes. Randomness comes from (seed, step), so no key is kept."""

    step: jax.Array
    lora: Any
    opt_state: Any


def forward(
    model: Transformer, chunk: int, base: Any, lora: Any, batch: Batch, rng: jax.Array | None
) -> TokenStats:
    """Statistics [B,C] of the batch's loss positions; dropout is on when an rng is given."""
    hidden = model.apply(
        {"params": base, "lora": lora},
        batch["tokens"],
        batch["segments"],
        batch["positions"],
        rngs=None if rng is None else {"dropout": rng},
    )
    # The head runs only where there is loss: C of T positions.
    hidden = jnp.take_along_axis(hidden, batch["loss_pos"][..., None], axis=1)
    head = head_weight(base, model.arch)
    return token_stats(hidden, batch["targets"], head, model.arch.final_softcap, chunk)


def make_train_step(
    model: Transformer, tx: optax.GradientTransformation, micro_batches: int, chunk: int, seed: int
) -> Callable[[State, Any, Batch], tuple[State, dict[str, jax.Array]]]:
    """step(state, base, batch) -> (state, metrics).

    The loss is the mean over all loss tokens of the batch, however it is cut into micro-batches:
    sums are accumulated and divided once. metrics: nll, tokens, correct [micro_batches] sums, and
    grad_norm before clipping.
    """

    def loss(lora, base, batch, rng):
        stats = forward(model, chunk, base, lora, batch, rng)
        mask = batch["loss_mask"]
        nll = jnp.sum(stats.nll * mask)
        return nll, {"nll": nll, "tokens": mask.sum(), "correct": jnp.sum(stats.correct * mask)}

    grad = jax.grad(loss, has_aux=True)

    def step(state: State, base: Any, batch: Batch):
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        if micro_batches == 1:
            grads, sums = grad(state.lora, base, batch, rng)
            sums = jax.tree.map(lambda x: x[None], sums)
        else:

            def body(total, k_micro):
                k, micro = k_micro
                grads, sums = grad(state.lora, base, micro, jax.random.fold_in(rng, k))
                return jax.tree.map(jnp.add, total, grads), sums

            # Strided, so that each micro-batch keeps rows of every device.
            cut = jax.tree.map(
                lambda x: x.reshape(-1, micro_batches, *x.shape[1:]).swapaxes(0, 1), batch
            )
            zero = jax.tree.map(jnp.zeros_like, state.lora)
            grads, sums = jax.lax.scan(body, zero, (jnp.arange(micro_batches), cut))
        tokens = jnp.maximum(jnp.sum(sums["tokens"]), 1)
        grads = jax.tree.map(lambda g: g / tokens, grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.lora)
        lora = optax.apply_updates(state.lora, updates)
        metrics = {**sums, "grad_norm": optax.tree.norm(grads)}
        return State(state.step + 1, lora, opt_state), metrics

    return step


def make_eval_step(model: Transformer, chunk: int) -> Callable[[Any, Any, Batch], TokenStats]:
    """step(lora, base, batch) -> TokenStats [B,C], dropout off."""

    def step(lora, base, batch):
        return forward(model, chunk, base, lora, batch, None)

    return step
