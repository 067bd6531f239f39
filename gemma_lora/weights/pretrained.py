"""What `config.weights` names: opened, checked against the arch, and put on the devices."""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.sharding import Mesh

from gemma_lora.arch import ARCHS, Arch, get_arch
from gemma_lora.errors import UserError, nearest
from gemma_lora.files import sha256 as file_sha256
from gemma_lora.model import Transformer
from gemma_lora.sharding import tree_shardings
from gemma_lora.tokenizer import Tokenizer
from gemma_lora.weights import gguf, hf, mapping


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """An opened checkpoint: nothing but headers has been read."""

    arch: Arch
    tensors: mapping.Tensors
    form: str  # the column of mapping.NAMES
    tokenizer: Callable[[], Tokenizer]
    base_name: str  # what an adapter made on these weights calls its base
    notice: str  # licence or nothing


def open_weights(weights: str, arch: str, sha256: str = "", tokenizer: str = "") -> Pretrained:
    """Opens config.weights: 'demo', a .gguf or .safetensors file, or a Hugging Face directory.

    arch is a name of ARCHS, or 'auto': from the config.json beside the weights. Raises UserError
    for missing, corrupt or foreign files, a wrong sha256, or facts that contradict the arch.
    """
    notice, base_name, named = "", weights, weights
    if weights == "demo":
        if arch != "gemma3_270m":
            raise UserError(f"the demo weights are of arch gemma3_270m, but the config says {arch}")
        notice, base_name, named = gguf.DEMO_LICENCE, "google/gemma-3-270m", str(gguf.demo_path())
    path = pathlib.Path(named).expanduser()
    if not path.exists():
        home = path.parent
        files = [*home.glob("*.gguf"), *home.glob("*.safetensors")]
        there = [p.name for p in (*files, *(f.parent for f in home.glob("*/config.json")))]
        raise UserError(
            f"weights {weights!r} do not exist: expected 'demo', a .gguf or .safetensors file, or "
            f"a Hugging Face directory; {nearest(path.name, there) if there else ''}".rstrip("; ")
        )
    if sha256:
        if path.is_dir():
            raise UserError("weights_sha256 is given, but the weights are a directory, not a file")
        if (got := file_sha256(path)) != sha256.lower():
            raise UserError(f"{path} has sha256 {got}, expected {sha256.lower()}")
    if path.suffix == ".gguf":
        return _gguf(path, arch, tokenizer, base_name, notice)
    home = path if path.is_dir() else path.parent
    facts = home / "config.json"
    if facts.exists():
        try:
            stated = dict(json.loads(facts.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as e:
            raise UserError(f"{facts} is corrupt: expected a JSON object ({e})") from e
        found = Arch.from_hf(stated)
        chosen = found if arch == "auto" else get_arch(arch)
        _agree(dataclasses.asdict(chosen), dataclasses.asdict(found), arch, facts)
    elif arch == "auto":
        raise UserError(f"arch is 'auto', but there is no config.json in {home}")
    else:
        chosen = get_arch(arch)
    return Pretrained(
        chosen,
        hf.Safetensors(path),
        "hf",
        lambda: _tokenizer(tokenizer) if tokenizer else Tokenizer.from_dir(home),
        base_name,
        notice,
    )


def _gguf(path: pathlib.Path, arch: str, tokenizer: str, base: str, notice: str) -> Pretrained:
    file = gguf.GGUFFile(path)
    if arch == "auto":
        raise UserError(
            f"arch 'auto' needs a config.json, which a .gguf file has not; give one of "
            f"{', '.join(ARCHS)}"
        )
    chosen = get_arch(arch)
    kind = file.metadata.get("general.architecture", "?")
    if kind != chosen.family.removesuffix("_text"):
        raise UserError(f"{path} holds a {kind} model, but arch {arch} is of {chosen.family}")
    keys = {
        "layers": "block_count",
        "embed": "embedding_length",
        "hidden": "feed_forward_length",
        "heads": "attention.head_count",
        "kv_heads": "attention.head_count_kv",
        "head_dim": "attention.key_length",
        "rope_base": "rope.freq_base",
        "window": "attention.sliding_window",
    }
    stated = {k: file.metadata.get(f"{kind}.{theirs}") for k, theirs in keys.items()}
    stated = {k: v for k, v in stated.items() if v is not None}
    ours = dataclasses.asdict(chosen)
    _agree({k: ours[k] for k in stated}, stated, arch, path)
    return Pretrained(
        chosen,
        file,
        "gguf",
        lambda: _tokenizer(tokenizer) if tokenizer else Tokenizer.from_gguf(file.metadata),
        base,
        notice,
    )


def _tokenizer(path: str) -> Tokenizer:
    return (Tokenizer.from_dir if pathlib.Path(path).is_dir() else Tokenizer.from_file)(path)


def _agree(ours: dict[str, Any], theirs: dict[str, Any], arch: str, where: pathlib.Path) -> None:
    wrong = [f"{k} is {theirs[k]}, arch says {ours[k]}" for k in theirs if ours[k] != theirs[k]]
    if wrong:
        raise UserError(f"{where} is not of arch {arch}: {'; '.join(wrong)}")


def load_base(pretrained: Pretrained, model: Transformer, mesh: Mesh) -> dict[str, Any]:
    """The base weights on the devices, in the model's dtype (norms in float32) and shardings."""
    boxed = model.abstract()["params"]
    return mapping.load(
        pretrained.tensors,
        pretrained.form,
        pretrained.arch,
        nn.unbox(boxed),
        tree_shardings(boxed, mesh),
    )


def build_model(arch: Arch, config: Any, wrap: Callable) -> Transformer:
    """The model a config describes."""
    dtype = jnp.dtype(config.dtype)
    return Transformer(arch, dtype, dtype, wrap, config.remat, config.unroll)
