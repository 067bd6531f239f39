"""What an export reads of a finished tiny run, and what numpy says it must write."""

import json
from pathlib import Path

import common
import numpy as np
import safetensors.numpy
import tiny
import tiny_run
import tiny_tokenizer
from ml_collections import ConfigDict

from gemma_lora import config
from gemma_lora.model import no_wrap
from gemma_lora.tokenizer import Tokenizer
from gemma_lora.weights import pretrained as pretrained_

RANK, ALPHA = 4, 8.0


def exact(tensors: dict[str, np.ndarray], unit: float) -> dict[str, np.ndarray]:
    """Multiples of `unit`, so that float32 holds sums and products of few of them exactly."""
    return {k: (np.round(x / unit) * unit).astype(np.float32) for k, x in tensors.items()}


def weights_of(name: str) -> dict[str, np.ndarray]:
    return exact(tiny.tiny_weights(name), 2**-10)


def adapter_of(name: str) -> dict[str, np.ndarray]:
    return exact(tiny.init_adapter(tiny.TINY[name], RANK), 2**-7)


def write_tokenizer(name: str, directory: Path) -> None:
    """One token a character; byte-level for Qwen2, as transformers reads all its vocabularies."""
    if not name.startswith("qwen2"):
        return tiny_tokenizer.write_tokenizer(directory)
    pieces = ["Ċ", "Ġ", *map(chr, range(33, 127)), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    facts = {
        "tokens": pieces,
        "token_type": [1] * (len(pieces) - 3) + [3] * 3,
        "merges": [],
        "eos_token_id": len(pieces) - 3,
        "bos_token_id": None,
        "padding_token_id": len(pieces) - 3,
    }
    metadata = {f"tokenizer.ggml.{k}": v for k, v in facts.items()}
    Tokenizer.from_gguf(tiny_tokenizer.qwen_metadata() | metadata).save(directory)


def write_run(directory: Path, name: str, changes: dict | None = None) -> Path:
    """What an export reads of a finished run: its base, config.json and adapter; the workdir."""
    base, workdir = directory / "base", directory / "run"
    tiny.write_tiny(name, base)
    safetensors.numpy.save_file(weights_of(name), base / "model.safetensors")
    write_tokenizer(name, base)
    settings = config.to_dict(tiny_run.settings(base, changes))
    (workdir / "adapter").mkdir(parents=True)
    (workdir / "config.json").write_text(json.dumps(settings))
    prints = {"data_fingerprint": "", "weights_fingerprint": fingerprint_of(base, settings)}
    (workdir / "run.json").write_text(json.dumps(prints))
    modules = sorted({k.split(".")[-3] for k in adapter_of(name)})
    facts = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": modules}
    (workdir / "adapter" / "adapter_config.json").write_text(json.dumps(facts))
    file = workdir / "adapter" / "adapter_model.safetensors"
    safetensors.numpy.save_file(adapter_of(name), file, metadata={"format": "pt"})
    return workdir


def fingerprint_of(base: Path, settings: dict) -> str:
    """As a run with these settings writes it."""
    pretrained = pretrained_.open_weights(str(base), "auto")
    mesh = common.one_device()
    model = pretrained_.build_model(pretrained.arch, ConfigDict(settings), no_wrap, mesh)
    return pretrained_.fingerprint(pretrained_.load_base(pretrained, model, mesh))


def merged_by_numpy(name: str) -> dict[str, np.ndarray]:
    """W + s B A, in Hugging Face's layout from beginning to end, without our tree."""
    expected, adapter = weights_of(name), adapter_of(name)
    for module in tiny.linear_shapes(tiny.TINY[name]):
        a, b = (adapter[f"base_model.model.{module}.lora_{x}.weight"] for x in "AB")
        expected[f"{module}.weight"] += np.float32(ALPHA / RANK) * (b @ a)
    return expected


load_one = safetensors.numpy.load_file


def load(directory: Path) -> dict[str, np.ndarray]:
    files = sorted(directory.glob("model*.safetensors"))
    return {k: x for f in files for k, x in load_one(f).items()}


def edit(directory: Path, file: str, **changes) -> None:
    text = json.dumps(common.read_json(directory / file) | changes)
    (directory / file).write_text(text)
