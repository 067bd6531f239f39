"""Writes goldens/*.npz from the torch reference: python tests/make_goldens.py

One file for each tiny model, one for the tiny training run and one for the real model, each with
the versions that made it and a checksum of the inputs that tests rebuild with tiny.py.
"""

from pathlib import Path

import numpy as np
import reference
import tiny
import torch

GOLDENS = Path(__file__).parent / "goldens"
# The other two differ from their family in RoPE or head alone, so their logits suffice.
WITH_GRADS = ("gemma", "gemma2", "gemma3", "qwen2")
PROMPTS = (
    "The old lighthouse at the end of the bay had been dark for thirty years when the council "
    "finally voted to repair its lamp, and on the first clear evening",
    "def median(values):\n    values = sorted(values)\n    middle = len(values) // 2\n"
    "    if len(values) % 2 == 1:\n        return",
)
CAPITAL = "The capital of France is"
KEPT_MODULES = ("model.layers.0.self_attn.k_proj", "model.layers.17.self_attn.v_proj")


def tiny_golden(name: str) -> reference.Values:
    """Logits of the base, then logits, loss and gradients with a random adapter (r 4, alpha 8)."""
    tokens = tiny.tokens()
    mask = tiny.loss_mask(tokens.shape)
    adapter = tiny.init_adapter(tiny.TINY[name], rank=4)
    lora = reference.lora_grads(name, adapter, tokens, mask)
    golden = {
        "inputs": _checksum(tiny.tiny_weights(name), adapter, tokens, mask),
        "logits": reference.logits(name, tokens),
        "lora_logits": lora["logits"][:, ::4],
        "lora_loss": lora["loss"],
    }
    return golden | ({k: lora[k] for k in adapter} if name in WITH_GRADS else {})


def adapters_golden() -> reference.Values:
    """Logits, loss and one layer's gradients of the other adapters, for two families."""
    tokens = tiny.tokens()
    mask = tiny.loss_mask(tokens.shape)
    golden = {}
    for which, name in tiny.ADAPTED:
        settings = tiny.settings_of(which)
        adapter = tiny.init_adapter(tiny.TINY[name], settings["r"], **settings)
        golden[f"{which}/{name}/inputs"] = _checksum(tiny.tiny_weights(name), adapter, tokens, mask)
        found = reference.lora_grads(name, adapter, tokens, mask, **settings)
        kept = ["loss", *(k for k in adapter if ".layers.1." in k)]
        golden |= {f"{which}/{name}/{k}": found[k] for k in kept}
        golden[f"{which}/{name}/logits"] = found["logits"][:, ::4]
    return golden


def trajectory_golden() -> reference.Values:
    """Twenty PEFT steps on tiny gemma3 from B = 0: losses, gradient norms, final A and B."""
    adapter = tiny.init_adapter(tiny.TINY["gemma3"], rank=4, zero_b=True)
    tokens, mask = tiny.tiny_batches()
    inputs = _checksum(tiny.tiny_weights("gemma3"), adapter, tokens, mask)
    return {"inputs": inputs, "lr": 1e-2} | reference.train(
        "gemma3", adapter, tokens, mask, lr=1e-2
    )


def real_golden(live: bool = False) -> reference.Values:
    """Gemma 3 270M: logits of text, greedy text, GSM8K loss and twenty PEFT steps (r 8).

    Of the trained adapter those of KEPT_MODULES. live: not to be kept: all matrices of the trained
    adapter, and no greedy text. Without the GSM8K rows (see reference.GSM8K) their
    values are left out.
    """
    base = reference.REAL
    prompts = np.stack([reference.encode(prompt)[:32] for prompt in PROMPTS])
    long = reference.encode((GOLDENS / "prose.txt").read_text())[None, :700]
    assert prompts.shape == (2, 32) and long.shape == (1, 700), (prompts.shape, long.shape)
    golden = {"prompt_ids": prompts, "long_ids": long, "vocab_ids": reference.VOCAB_IDS}
    for name, ids in (("prompt", prompts), ("long", long)):
        summary = reference.summary(reference.logits(base, ids))
        golden |= {f"{name}_{key}": value for key, value in summary.items()}
    if not live:
        golden["greedy_prompt_ids"] = reference.encode(CAPITAL)
        golden["greedy_ids"] = reference.greedy(base, golden["greedy_prompt_ids"], 20)

    if reference.GSM8K.exists():
        rows = reference.token_losses(base, reference.gsm8k_rows())
        golden |= {
            "gsm8k_loss": rows["nll"].mean(dtype=np.float64),
            "gsm8k_accuracy": rows["correct"].mean(),
            "gsm8k_counts": rows["counts"],
            "gsm8k_nll": rows["nll"],
        }

    adapter = tiny.init_adapter(tiny.GEMMA3_270M, rank=8, zero_b=True)
    tokens, mask = tiny.text_batches(long[0])
    run = reference.train(base, adapter, tokens, mask, lr=2e-4, r=8, lora_alpha=16.0)
    kept = [key for key in adapter if live or any(f"{name}." in key for name in KEPT_MODULES)]
    return golden | {
        "train_inputs": _checksum(adapter, tokens, mask),
        "train_losses": run["losses"],
        "train_grad_norms": run["grad_norms"],
        "train_final_norms": np.array([np.linalg.norm(run[key]) for key in adapter]),
        **{key: run[key] for key in kept},
    }


def _checksum(*inputs: reference.Values | np.ndarray) -> int:
    """Over dicts in their order of insertion, and arrays."""
    arrays = (v.values() if isinstance(v, dict) else (v,) for v in inputs)
    return tiny.checksum(*(array for group in arrays for array in group))


def _write(name: str, golden: reference.Values) -> None:
    path = GOLDENS / f"{name}.npz"
    np.savez_compressed(path, versions=reference.versions(), **golden)
    print(f"{path.name}: {path.stat().st_size / 1024:.0f} KiB, {len(golden)} arrays")


def main() -> None:
    torch.use_deterministic_algorithms(True)
    for name in tiny.TINY:
        _write(name, tiny_golden(name))
    _write("adapters", adapters_golden())
    _write("trajectory", trajectory_golden())
    _write("real", real_golden())


if __name__ == "__main__":
    main()
