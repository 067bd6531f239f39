"""A worker of speed.py: gemma_lora's own step, evaluation or base forward, as a job describes."""

import pathlib
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import protocol

from gemma_lora.adapters import LoRA
from gemma_lora.config import default
from gemma_lora.lora import LoRAConfig
from gemma_lora.loss import Sweep
from gemma_lora.model import no_wrap
from gemma_lora.optim import optimizer
from gemma_lora.sharding import make_mesh
from gemma_lora.step import init_state, loss_hidden, make_eval_step, make_train_step
from gemma_lora.weights.pretrained import build_model, load_base, open_weights

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import common


class Offset(LoRA):
    """base(x) + b: everything of a training step but the adapters' products and dropout."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.base(x) + self.leaf("b", nn.initializers.zeros, self.sides()[1])


def batch_arrays(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """The step's arrays from tokens, mask (which tokens are targets), the loss slots of a row
    where the data set has more than the batch needs, and, if packed, segments."""
    slots = int(batch["slots"]) if "slots" in batch else None
    arrays = common.batch_of(batch["tokens"], batch["mask"], slots)
    packed = {k: jnp.asarray(batch[k]) for k in ("segments", "positions") if k in batch}
    return arrays | packed


def main() -> None:
    job, batches = protocol.job()
    config = default()
    config.update_from_flattened_dict(job["config"])
    pretrained = open_weights("demo", "gemma3_270m")
    mesh = make_mesh(config.mesh)
    lora = LoRAConfig(**config.lora)
    wrap = lora
    if job["work"] != "train":
        wrap = no_wrap  # an adapter merged into the weights costs what the base does
    elif job["adapters"] == "none":
        wrap = lambda base, path: Offset(base, 1, 1.0, 0.0)  # noqa: E731
    model = build_model(pretrained.arch, config, wrap)
    base = load_base(pretrained, model, mesh)
    sweep = Sweep(**config.head)
    arrays = [batch_arrays(b) for b in batches]
    if job["work"] == "train":
        tx = optimizer(config.optim, 1000)
        state = init_state(model, tx, 0, mesh)
        train = jax.jit(make_train_step(model, tx, 1, sweep, 0), donate_argnums=0)

        def work(i: int) -> float:
            nonlocal state
            state, sums = train(state, base, arrays[i])
            return float(sums["nll"].sum() / sums["tokens"].sum())
    elif job["work"] == "eval":
        evaluate = jax.jit(make_eval_step(model, sweep))

        def work(i: int) -> float:
            out, mask = jax.device_get(evaluate({}, base, arrays[i])), arrays[i]["loss_mask"]
            return float((out["nll"] * mask).sum() / mask.sum())
    else:
        forward = jax.jit(lambda b: loss_hidden(model, base, {}, b, None))

        def work(i: int) -> float:
            return float(jax.block_until_ready(forward(arrays[i])).sum() * 0)

    protocol.serve(work, len(arrays), peak_flops=peak_flops(jnp.dtype(config.dtype)))


def peak_flops(dtype: jnp.dtype) -> float:
    """Multiplications and additions a second of the layers' own kind of product, best of 10."""
    x, w = (
        jax.random.normal(jax.random.key(0), s).astype(dtype) for s in ((1024, 640), (640, 2048))
    )
    product = jax.jit(lambda x, w: jnp.matmul(x, w, preferred_element_type=jnp.float32))
    jax.block_until_ready(product(x, w))
    best = np.inf
    for _ in range(10):
        began = protocol.time.perf_counter()
        jax.block_until_ready(product(x, w))
        best = min(best, protocol.time.perf_counter() - began)
    return 2 * 1024 * 640 * 2048 / best


if __name__ == "__main__":
    main()
