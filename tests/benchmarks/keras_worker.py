"""A worker of speed.py: KerasHub's Gemma 3 270M with Keras's LoRA, on Keras's JAX backend.

Needs keras-hub alone. The weights are random: the time does not depend on them. Keras's adapters
have no dropout, alpha is the rank, A of the query has a slice for each head, and A B is added to
the kernel, so that a step makes the gradient of each whole kernel.
The optimizer is Adam with PEFT's clipping.
"""

import os

os.environ["KERAS_BACKEND"] = "jax"

import keras
import keras_hub
import numpy as np
import protocol

ATTENTION = ["query", "key", "value", "attention_output"]
LINEAR = [*ATTENTION, "ffw_gating", "ffw_gating_2", "ffw_linear"]


def load(dtype: str, targets: str) -> keras.Model:
    """The model, adapters on all linear layers or on KerasHub's default ones (query, value)."""
    backbone = keras_hub.models.Gemma3Backbone(
        vocabulary_size=262144,
        image_size=None,
        num_layers=18,
        num_query_heads=4,
        num_key_value_heads=1,
        hidden_dim=640,
        intermediate_dim=2048,
        head_dim=256,
        use_post_ffw_norm=True,
        use_post_attention_norm=True,
        use_sliding_window_attention=True,
        sliding_window_size=512,
        dtype=dtype,
    )
    backbone.enable_lora(8, target_layer_names=LINEAR if targets == "all" else None)
    model = keras_hub.models.Gemma3CausalLM(preprocessor=None, backbone=backbone)
    model.compile(
        optimizer=keras.optimizers.Adam(2e-4, global_clipnorm=1.0),
        loss=keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, reduction="mean_with_sample_weight"
        ),
        weighted_metrics=None,  # its default counts right tokens, too
    )
    return model


def main() -> None:
    job, batches = protocol.job()
    keras.utils.set_random_seed(0)
    model = load(job["dtype"], job["targets"])
    arrays = [
        (
            {"token_ids": b["tokens"], "padding_mask": (b["tokens"] != 0).astype(np.int32)},
            np.roll(b["tokens"], -1, 1),
            np.roll(b["mask"], -1, 1).astype(np.float32),  # a row's first token is no target
        )
        for b in batches
    ]

    def step(i: int) -> float:
        model.reset_metrics()  # train_on_batch returns the mean since then
        x, y, weights = arrays[i]
        found = model.train_on_batch(x, y, weights)
        return float(np.ravel(found)[0])

    protocol.serve(step, len(arrays))


if __name__ == "__main__":
    main()
