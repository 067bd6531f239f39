"""Adapters in Hugging Face PEFT's format, out and in.

adapter_model.safetensors holds base_model.model.<module>.lora_A.weight [r, in] and
.lora_B.weight [out, r]; ours are A [L, in..., R] and B [L, R, out...]: one layer's matrix is
`ours.reshape(2-d).T`. PEFT only warns about wrongly named keys and leaves B at zero, so every
export is read back and compared before it is put in place.
"""

import json
import os
import pathlib
import shutil
import tempfile
from typing import Any

import flax.linen as nn
import numpy as np
import safetensors.numpy

from gemma_lora.arch import Arch
from gemma_lora.errors import UserError
from gemma_lora.lora import LoRAConfig
from gemma_lora.model import Transformer
from gemma_lora.weights.mapping import flatten, names

# Settings of adapter_config.json that change the maths -> the values we can honour.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": (None, []),
    "layers_to_transform": (None, []),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, []),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (None, {}),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None, {}),
    # PiSSA, OLoRA, CorDA and LoftQ change the base weights as well.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", None),
}


def export(
    directory: pathlib.Path, lora: dict[str, Any], config: LoRAConfig, arch: Arch, base: str
) -> None:
    """Writes adapter_config.json and adapter_model.safetensors, atomically, read back and compared.

    lora: our tree as host arrays. Raises RuntimeError (and leaves no directory) if what was read
    back is not what was written.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = pathlib.Path(tempfile.mkdtemp(dir=directory.parent, prefix=".adapter-"))
    try:
        tensors = to_tensors(lora, arch)
        file = temporary / "adapter_model.safetensors"
        safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})
        text = json.dumps(_config_json(lora, config, base), indent=2, sort_keys=True)
        (temporary / "adapter_config.json").write_text(text + "\n")
        again, back = read(temporary, arch)
        same = again.scale == config.scale and _equal(lora, back)
        if not same:
            raise RuntimeError(f"the adapter written to {directory} does not read back the same")
        temporary.chmod(0o755)
        if directory.exists():
            shutil.rmtree(directory)
        os.replace(temporary, directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def read(directory: pathlib.Path, arch: Arch) -> tuple[LoRAConfig, dict[str, Any]]:
    """(config, our tree as numpy arrays) of a PEFT LoRA adapter.

    Raises UserError for missing files, for settings that change the maths and are not supported,
    and for unknown, missing or misshapen tensors.
    """
    files = [directory / f for f in ("adapter_config.json", "adapter_model.safetensors")]
    absent = [f.name for f in files if not f.exists()]
    if absent:
        raise UserError(f"no PEFT adapter in {directory}: {' and '.join(absent)} missing")
    try:
        settings = json.loads(files[0].read_text())
    except ValueError as e:
        raise UserError(f"{files[0]} is not JSON: {e}") from e
    for key in ("r", "lora_alpha"):
        if not isinstance(settings.get(key), (int, float)):
            raise UserError(f"{files[0]}: {key} is {settings.get(key)!r}, expected a number")
    for key, allowed in _SUPPORTED.items():
        if key in settings and settings[key] not in allowed:
            raise UserError(
                f"{files[0]}: {key} is {settings[key]!r}, which is not supported here "
                f"(expected {allowed[0]!r})"
            )
    try:
        tensors = safetensors.numpy.load_file(files[1])
    except Exception as e:  # safetensors raises its own and the operating system's errors
        raise UserError(f"{files[1]} cannot be read: {e}") from e
    rank = settings["r"]
    tree = from_tensors(tensors, arch, rank)
    modules = sorted({p.rsplit("/", 1)[-1] for p in _modules(tree)})
    config = LoRAConfig(
        rank=rank,
        alpha=float(settings["lora_alpha"]),
        dropout=float(settings.get("lora_dropout", 0.0)),
        targets="|".join(modules),
        rslora=bool(settings.get("use_rslora", False)),
    )
    return config, tree


def to_tensors(lora: dict[str, Any], arch: Arch) -> dict[str, np.ndarray]:
    """Our tree -> PEFT's tensors by name."""
    out = {}
    for path, leaves in _modules(lora).items():
        a, b = np.asarray(leaves["a"]), np.asarray(leaves["b"])
        rank = a.shape[-1]
        for i in range(arch.layers):
            name = _peft_name(path, arch).format(i=i)
            out[f"{name}.lora_A.weight"] = np.ascontiguousarray(a[i].reshape(-1, rank).T)
            out[f"{name}.lora_B.weight"] = np.ascontiguousarray(b[i].reshape(rank, -1).T)
    return out


def from_tensors(tensors: dict[str, np.ndarray], arch: Arch, rank: int) -> dict[str, Any]:
    """PEFT's tensors -> our tree, float32. Every layer of a module must be there."""
    left = dict(tensors)
    tree: dict[str, Any] = {}
    shapes = nn.unbox(Transformer(arch, wrap=LoRAConfig(rank=rank)).abstract()["lora"])
    for path, leaves in _modules(shapes).items():
        name = _peft_name(path, arch)
        if f"{name.format(i=0)}.lora_A.weight" not in left:
            continue
        ours = {k: np.zeros(leaf.shape, np.float32) for k, leaf in leaves.items()}
        for i in range(arch.layers):
            for leaf, part in (("a", "lora_A"), ("b", "lora_B")):
                key = f"{name.format(i=i)}.{part}.weight"
                if key not in left:
                    raise UserError(f"the adapter lacks {key}")
                stored, place = left.pop(key), ours[leaf][i]
                wide = place.size // rank
                expected = (rank, wide) if leaf == "a" else (wide, rank)
                if stored.shape != expected:
                    raise UserError(f"{key} is {list(stored.shape)}, expected {list(expected)}")
                place[...] = stored.T.reshape(place.shape)
        module, leaf = path.split("/")[1:]
        tree.setdefault("layers", {}).setdefault(module, {})[leaf] = ours
    if left:
        some = ", ".join(sorted(left)[:3])
        raise UserError(
            f"the adapter holds {len(left)} tensors this model has no place for: {some}"
        )
    if not tree:
        raise UserError("the adapter holds no tensors")
    return tree


def _modules(lora: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{'layers/attn/q_proj': {'a': ..., 'b': ...}}."""
    return {
        f"layers/{module}/{proj}": leaves
        for module, projections in lora["layers"].items()
        for proj, leaves in projections.items()
    }


def _peft_name(path: str, arch: Arch) -> str:
    return "base_model.model." + names(arch, "hf")[f"{path}/w"].removesuffix(".weight")


def _equal(x: dict[str, Any], y: dict[str, Any]) -> bool:
    x, y = flatten(x), flatten(y)
    return x.keys() == y.keys() and all(np.array_equal(x[k], y[k]) for k in x)


def _config_json(lora: dict[str, Any], config: LoRAConfig, base: str) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "bias": "none",
        "target_modules": sorted(p.rsplit("/", 1)[-1] for p in _modules(lora)),
        "use_rslora": config.rslora,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "inference_mode": True,
    }
