"""A worker of speed.py: Google's tunix, its own PeftTrainer's step on its own Gemma 3 270M.

Needs google-tunix alone. The weights are random: the time does not depend on them. A reads x once
for k and v (one product in tunix), so that pair shares it; the rest is PEFT's: r 8, alpha 16,
dropout 0.1 (qwix's) on all linear layers. No embedding or head is adapted.
"""

import jax
import jax.numpy as jnp
import optax
import protocol
import qwix
from flax import nnx
from tunix.models.gemma3 import model as gemma3
from tunix.sft import peft_trainer, utils

LINEAR = ".*(q_einsum|kv_einsum|attn_vec_einsum|gate_proj|up_proj|down_proj)"


def load(dtype: str, dropout: float) -> nnx.Module:
    config = gemma3.ModelConfig.gemma3_270m()
    config.param_dtype = jnp.dtype(dtype)
    model = gemma3.Gemma3(config, rngs=nnx.Rngs(params=0))
    provider = qwix.LoraProvider(module_path=LINEAR, rank=8, alpha=16.0, dropout=dropout)
    model = qwix.apply_lora_to_model(model, provider, rngs=nnx.Rngs(1), **model.get_model_input())
    if dropout:
        model.set_attributes(qwix_rngs=nnx.Rngs(dropout=2))
    return model


def inputs(example: peft_trainer.TrainingInput) -> dict[str, jax.Array]:
    """The default loss's arguments; a token 0 is padding, input_mask says what carries loss."""
    real = example.input_tokens != 0
    return {
        "input_tokens": example.input_tokens,
        "input_mask": example.input_mask,
        "positions": utils.build_positions_from_mask(real),
        "attention_mask": utils.make_causal_attn_mask(real),
    }


def main() -> None:
    job, batches = protocol.job()
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(2e-4, weight_decay=0.0))
    trainer = peft_trainer.PeftTrainer(
        load(job["dtype"], job["dropout"]),
        optimizer,
        peft_trainer.TrainingConfig(eval_every_n_steps=1000, max_steps=1000),
    ).with_gen_model_input_fn(inputs)
    # What train() calls for each batch.
    step, _ = trainer.jit_train_and_eval_step(cache_nnx_graph=True)
    examples = [
        peft_trainer.TrainingInput(input_tokens=b["tokens"], input_mask=b["mask"]) for b in batches
    ]
    protocol.serve(lambda i: float(step(examples[i])[0]), len(examples))


if __name__ == "__main__":
    main()
