"""The training step and the evaluation step: pure functions over trees.

`base` (frozen weights) is an argument, never donated, never returned; the gradient is taken with
respect to `lora` alone, so frozen weights have neither gradient nor optimizer state.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from gemma_lora.loss import Sweep, TokenStats, token_stats
from gemma_lora.model import Transformer, head_weight, logits
from gemma_lora.sharding import gathered, replicated, tree_shardings

# The arrays of data.dataset.Batch. loss_mask is 0 or 1: the ledger counts its targets, and knows of
# no weights.
Batch = dict[str, jax.Array]


@flax.struct.dataclass
class State:
    """All that training changes. Randomness comes from (seed, step), so no key is kept."""

    step: jax.Array
    lora: Any
    opt_state: Any


def state_maker(
    model: Transformer, tx: optax.GradientTransformation, mesh: Mesh
) -> Callable[[jax.Array], State]:
    """The jitted maker of step 0 from a key: A random, B zero, on their shardings at once."""
    boxed = model.abstract()["lora"]
    shardings = tree_shardings(boxed, mesh)

    def init(key: jax.Array) -> State:
        token = jnp.zeros((1, 1), jnp.int32)
        lora = nn.unbox(model.init(key, token, token, token)["lora"])
        return State(jnp.zeros((), jnp.int32), lora, tx.init(lora))

    def as_its_parameter(x: Any, parameter: jax.ShapeDtypeStruct, sharding: Any) -> Any:
        if isinstance(x, optax.MaskedNode):  # the parameter of another group
            return x
        return sharding if x.shape == parameter.shape else replicated(mesh)

    of_optimizer = optax.tree_utils.tree_map_params(
        tx,
        as_its_parameter,
        jax.eval_shape(init, jax.random.key(0)).opt_state,
        nn.unbox(boxed),
        shardings,
        transform_non_params=lambda _: replicated(mesh),
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )
    return jax.jit(init, out_shardings=State(replicated(mesh), shardings, of_optimizer))


def init_state(
    model: Transformer, tx: optax.GradientTransformation, seed: int, mesh: Mesh
) -> State:
    """Step 0."""
    return state_maker(model, tx, mesh)(jax.random.key(seed))


def loss_hidden(
    model: Transformer, base: Any, lora: Any, batch: Batch, rng: jax.Array | None
) -> jax.Array:
    """Final hidden states [B,C,D] at the batch's loss positions, C of T. Dropout: given an rng."""
    if lora and model.mesh is not None:
        # Whole once a micro-batch, and not where a layer uses them; in the backward their gradients
        # are summed over devices once a layer. A device holds all of them for that long, and in
        # the state its part.
        boxed = model.abstract()["lora"]
        lora = jax.tree.map(lambda x, box: gathered(x, box.names, model.mesh), lora, boxed)
    hidden = model.apply(
        {"params": base, "lora": lora},
        batch["tokens"],
        batch["segments"],
        batch["positions"],
        rngs=None if rng is None else {"dropout": rng},
    )
    return jnp.take_along_axis(hidden, batch["loss_pos"][..., None], axis=1)


def forward(
    model: Transformer, sweep: Sweep, base: Any, lora: Any, batch: Batch, rng: jax.Array | None
) -> TokenStats:
    """Statistics [B,C] of the batch's loss positions."""
    hidden = loss_hidden(model, base, lora, batch, rng)
    return head_stats(model, sweep, base, hidden, batch)


def head_stats(
    model: Transformer, sweep: Sweep, base: Any, hidden: jax.Array, batch: Batch
) -> TokenStats:
    """Statistics [B,C] from the final hidden states [B,C,D] of a batch's loss positions."""
    return token_stats(
        hidden,
        batch["targets"],
        batch["loss_mask"],
        head_weight(base, model.arch),
        model.arch.final_softcap,
        sweep,
        model.mesh,
    )


def cut(batch: Any, n: int) -> Any:
    """[B,...] -> [n,B / n,...] of every array, strided: each part keeps rows of every device."""
    return jax.tree.map(lambda x: x.reshape(-1, n, *x.shape[1:]).swapaxes(0, 1), batch)


def joined(parts: Any) -> Any:
    """The parts of `cut` together again."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), parts)


def make_train_step(
    model: Transformer,
    tx: optax.GradientTransformation,
    micro_batches: int,
    sweep: Sweep,
    seed: int,
) -> Callable[[State, Any, Batch], tuple[State, dict[str, jax.Array]]]:
    """step(state, base, batch) -> (state, metrics).

    The loss is the mean over all loss tokens of the batch, however it is cut into micro-batches:
    sums are accumulated and divided once. metrics: nll, tokens, correct [micro_batches] sums,
    grad_norm before clipping, and token_nll [B,C] of the loss positions, before the update.
    """

    def loss(lora, base, batch, rng):
        stats = forward(model, sweep, base, lora, batch, rng)
        mask = batch["loss_mask"]
        nll = jnp.sum(stats.nll * mask)
        sums = {"nll": nll, "tokens": mask.sum(), "correct": jnp.sum(stats.correct * mask)}
        return nll, sums | {"token_nll": stats.nll}

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

            zero = jax.tree.map(jnp.zeros_like, state.lora)
            parts = jnp.arange(micro_batches), cut(batch, micro_batches)
            grads, sums = jax.lax.scan(body, zero, parts)
        sums["token_nll"] = joined(sums["token_nll"])
        tokens = jnp.maximum(jnp.sum(sums["tokens"]), 1)
        grads = jax.tree.map(lambda g: g / tokens, grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.lora)
        lora = optax.apply_updates(state.lora, updates)
        metrics = {**sums, "grad_norm": optax.tree.norm(grads)}
        return State(state.step + 1, lora, opt_state), metrics

    return step


def make_eval_step(
    model: Transformer, sweep: Sweep, label_tokens: tuple[int, ...] = (), micro_batches: int = 1
) -> Callable[[Any, Any, Batch], dict[str, jax.Array]]:
    """step(lora, base, batch) -> nll, correct, margin, el2n [B,C], dropout off.

    With label_tokens also label_logits [B,C,len(label_tokens)], the logits of these tokens alone.
    A micro-batch at a time, as in training: an evaluation needs no more memory than that.
    """

    def measured(lora, base, batch):
        hidden = loss_hidden(model, base, lora, batch, None)
        stats = head_stats(model, sweep, base, hidden, batch)
        out = {k: getattr(stats, k) for k in ("nll", "correct", "margin", "el2n")}
        if label_tokens:
            words = jnp.take(head_weight(base, model.arch), jnp.asarray(label_tokens), axis=0)
            out["label_logits"] = logits(hidden, words, model.arch, model.dtype)
        return out

    def step(lora, base, batch):
        if micro_batches == 1:
            return measured(lora, base, batch)
        parts = cut(batch, micro_batches)
        return joined(jax.lax.map(functools.partial(measured, lora, base), parts))

    return step


def jit_train_step(
    model: Transformer, tx: optax.GradientTransformation, config: Any, state: State, mesh: Mesh
) -> Callable[..., Any]:
    """The training step of a config, jitted, which donates a state sharded like this one."""
    micro_batches, sweep = config.train.micro_batches, Sweep(**config.head)
    return jax.jit(
        make_train_step(model, tx, micro_batches, sweep, config.seed),
        donate_argnums=0,
        out_shardings=(jax.tree.map(lambda x: x.sharding, state), replicated(mesh)),
    )


def jit_eval_step(
    model: Transformer, config: Any, label_tokens: tuple[int, ...], mesh: Mesh
) -> Callable[..., Any]:
    """The evaluation step of a config, jitted; every process gets the values of all rows."""
    sweep = Sweep(**config.head)
    step = make_eval_step(model, sweep, label_tokens, config.train.micro_batches)
    return jax.jit(step, out_shardings=replicated(mesh))
