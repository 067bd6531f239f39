"""Learning-rate schedule and optimizer from the config."""

from typing import Any

import jax
import optax

from gemma_lora.errors import UserError, require_name

# What follows the warmup: (peak, steps of decay) -> schedule. They are Hugging Face's.
SCHEDULES = {
    "linear": lambda peak, steps: optax.linear_schedule(peak, 0.0, steps),
    "cosine": lambda peak, steps: optax.cosine_decay_schedule(peak, steps),
    "constant": lambda peak, steps: optax.constant_schedule(peak),
}


def schedule(optim: Any, steps: int) -> optax.Schedule:
    """Learning rate of update i = 0 ... steps - 1: linear warmup from 0, then optim.schedule.

    As transformers' get_scheduler: update i < warmup uses lr * i / warmup.
    """
    require_name("optim.schedule", optim.schedule, SCHEDULES)
    warmup = optim.warmup_steps
    if not 0 <= warmup < steps:
        raise UserError(f"optim.warmup_steps is {warmup}, expected 0 <= it < {steps} steps in all")
    after = SCHEDULES[optim.schedule](optim.lr, steps - warmup)
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, optim.lr, warmup), after], [warmup])


def optimizer(optim: Any, steps: int) -> optax.GradientTransformation:
    """Clip by the global norm (0: off), then AdamW with torch's defaults (0.9, 0.999, 1e-8).

    The learning rate of B, and of DoRA's m, is optim.b_lr_ratio times that of A: LoRA+
    (arXiv:2402.12354) as PEFT's create_loraplus_optimizer groups them.
    """
    parts = [optax.adamw(schedule(optim, steps), weight_decay=optim.weight_decay)]
    if optim.clip:
        parts.insert(0, optax.clip_by_global_norm(optim.clip))
    if optim.b_lr_ratio != 1:
        parts.append(optax.stateless(lambda updates, _: _faster(updates, optim.b_lr_ratio)))
    return optax.chain(*parts)


def _faster(updates: Any, ratio: float) -> Any:
    """The updates with those of leaves 'b' and 'm' times `ratio`."""

    def one(path, update):
        return update * ratio if path[-1].key in ("b", "m") else update

    return jax.tree_util.tree_map_with_path(one, updates)
