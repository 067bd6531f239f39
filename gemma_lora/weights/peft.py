"""Adapters in Hugging Face PEFT's format, out and in.

adapter_model.safetensors holds base_model.model.<module>.lora_A.weight [r, in], .lora_B.weight
[out, r] and, for DoRA, .lora_magnitude_vector [out]; ours are A [L, in..., R], B [L, R, out...] and
m [L, out...]: one layer's matrix is `ours.reshape(2-d).T`. PEFT only warns about wrongly named keys
and leaves B at zero, so every export is read back and compared before it is put in place.

PEFT may give each layer of a module its own rank and scale; ours share them. What is smaller is
padded with zeros, and a scale that differs goes into B: the function is the same, and zero columns
of B beside zero rows of A take no gradient.
"""

import dataclasses
import json
import pathlib
import re
from types import NoneType
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import safetensors.numpy

from gemma_lora.arch import Arch
from gemma_lora.errors import UserError
from gemma_lora.files import read_json, replace_directory
from gemma_lora.lora import LoRAConfig, modules, put
from gemma_lora.model import Transformer
from gemma_lora.weights import hf
from gemma_lora.weights.mapping import flatten, names

# Our leaf -> the end of PEFT's name.
_PARTS = {"a": "lora_A.weight", "b": "lora_B.weight", "m": "lora_magnitude_vector"}
# Settings of adapter_config.json -> what they may be; with None, they may also be left out.
_KINDS: dict[str, tuple[type, ...]] = {
    "r": (int,),
    "lora_alpha": (int, float),
    "target_modules": (list, str),
    "lora_dropout": (int, float, NoneType),
    "rank_pattern": (dict, NoneType),
    "alpha_pattern": (dict, NoneType),
    "exclude_modules": (list, str, NoneType),
    "layers_pattern": (list, str, NoneType),
    "layers_to_transform": (list, int, NoneType),
}
# Settings that change the maths -> the values we can honour.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (None, {}),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None, {}),
    "kasa_config": (None, {}),
    "monteclora_config": (None, {}),
    "velora_config": (None, {}),
    # PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change the base weights as well.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", "mica", None),
}


# Where a multimodal model of transformers keeps the text model: model.language_model.layers...
INNER = "language_model."
# Where transformers 4.50 and 4.51 had it: language_model.model.layers...
_OLD = "language_model.model."


def export(
    directory: pathlib.Path,
    lora: dict[str, Any],
    config: LoRAConfig,
    arch: Arch,
    base: str,
    inner: str = "",
    revision: str = "",
) -> None:
    """Writes adapter_config.json and adapter_model.safetensors, atomically, read back and compared.

    lora: our tree as host arrays; inner: INNER where the base is a multimodal checkpoint; revision:
    of a base on the hub, if not the latest. Raises UserError (and leaves no directory) if what was
    read back is not what was written.
    """
    with replace_directory(directory) as temporary:
        tensors = to_tensors(lora, arch, inner)
        file = temporary / "adapter_model.safetensors"
        safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})
        text = json.dumps(
            _config_json(lora, config, base, inner, revision), indent=2, sort_keys=True
        )
        (temporary / "adapter_config.json").write_text(text + "\n")
        again, back = read(temporary, arch)
        if not (_means(again, back) == _means(config, lora) and _equal(lora, back)):
            raise UserError(f"the adapter written to {directory} does not read back the same")


def require(directory: pathlib.Path) -> list[pathlib.Path]:
    """The two files of an adapter; UserError where one is missing."""
    files = [directory / f for f in ("adapter_config.json", "adapter_model.safetensors")]
    if absent := [f.name for f in files if not f.exists()]:
        raise UserError(f"no PEFT adapter in {directory}: {' and '.join(absent)} missing")
    return files


def read(directory: pathlib.Path, arch: Arch) -> tuple[LoRAConfig, dict[str, Any]]:
    """(config, our tree as numpy arrays) of a PEFT LoRA adapter.

    Raises UserError for missing files, for settings that change the maths and are not supported,
    and for unknown, missing or misshapen tensors.
    """
    files = require(directory)
    settings = read_json(files[0])
    for key, allowed in _SUPPORTED.items():
        if key in settings and settings[key] not in allowed:
            raise UserError(
                f"{files[0]}: {key} is {settings[key]!r}, which is not supported here "
                f"(expected {allowed[0]!r})"
            )
    for key, kind in _KINDS.items():
        if not isinstance(settings.get(key), kind):
            expected = " or ".join("null" if k is NoneType else k.__name__ for k in kind)
            raise UserError(f"{files[0]}: {key} is {settings.get(key)!r}, expected {expected}")
    try:
        tensors = {
            name: np.frombuffer(x["data"], hf.DTYPES[x["dtype"]]).reshape(x["shape"])
            for name, x in safetensors.deserialize(files[1].read_bytes())
        }
    except Exception as e:  # safetensors raises its own and the operating system's errors
        raise UserError(f"{files[1]} cannot be read: {e}") from e
    try:
        return from_tensors(tensors, settings, arch)
    except UserError as e:
        raise UserError(f"{directory}: {e}") from e
    except re.error as e:
        raise UserError(f"{files[0]}: {e.pattern!r} is no regular expression: {e}") from e


def base_of(directory: pathlib.Path) -> str | None:
    """The base that an adapter says it was made on."""
    return read_json(require(directory)[0]).get("base_model_name_or_path")


def check_spelling(config: LoRAConfig, lora: dict[str, Any], arch: Arch) -> None:
    """Raises UserError where adapters of these shapes could not be exported: PEFT's format, as it
    is spelled here, has not their leaves or their variant. Asked before they are trained."""
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), lora)
    try:
        settings = _config_json(zeros, config, "", "", "")
        found, _ = from_tensors(to_tensors(zeros, arch), settings, arch)
        same = _means(found, zeros) == _means(config, zeros)
        why = "" if same else f"it would be read as {found.variant!r}, or with other scales"
    except KeyError as e:
        why = f"it has no name for a leaf {e}, or needs one"
    except UserError as e:
        why = str(e)
    if why:
        raise UserError(
            f"lora.variant {config.variant!r} cannot be exported, as weights/peft.py spells "
            f"adapters: {why}"
        )


def to_tensors(lora: dict[str, Any], arch: Arch, inner: str = "") -> dict[str, np.ndarray]:
    """Our tree -> PEFT's tensors by name."""
    out = {}
    for path, leaves in modules(lora).items():
        rank = leaves["a"].shape[-1]
        two = {"a": (-1, rank), "b": (rank, -1), "m": (-1,)}
        for leaf, stacked in leaves.items():
            for i, layer in enumerate(np.asarray(stacked)):
                key = f"base_model.model.{_module(path, i, arch, inner)}.{_PARTS[leaf]}"
                out[key] = np.ascontiguousarray(layer.reshape(two[leaf]).T)
    return out


def from_tensors(
    tensors: dict[str, np.ndarray], settings: dict[str, Any], arch: Arch
) -> tuple[LoRAConfig, dict[str, Any]]:
    """PEFT's tensors and the settings of adapter_config.json -> our config and tree, float32.

    A layer that the settings leave out has zeros. Raises UserError as `read` does.
    """
    stated = LoRAConfig(
        rank=settings["r"],
        alpha=settings["lora_alpha"],
        dropout=settings.get("lora_dropout") or 0.0,
        rslora=bool(settings.get("use_rslora")),
        variant="dora" if settings.get("use_dora") else "lora",
        rank_pattern=(settings.get("rank_pattern") or {}).items(),
        alpha_pattern=(settings.get("alpha_pattern") or {}).items(),
    )
    inner = next((x for x in (_OLD, INNER) if any(f".{x}layers." in key for key in tensors)), "")
    layers = _layers(settings, stated, arch, inner)
    # All layers of a module get the rank and alpha of one with the largest rank.
    own = {path: max(found.values(), key=lambda c: c.rank) for path, found in layers.items()}
    config = dataclasses.replace(
        stated,
        targets="|".join(own),
        rank_pattern=[(p, c.rank) for p, c in own.items() if c.rank != stated.rank],
        alpha_pattern=[(p, c.alpha) for p, c in own.items() if c.alpha != stated.alpha],
    )
    shapes = modules(nn.unbox(Transformer(arch, wrap=config).abstract()["lora"]))
    left = dict(tensors)

    def take(key: str, shape: tuple[int, ...]) -> np.ndarray:
        if key not in left:
            raise UserError(f"the adapter lacks {key}")
        if (stored := left.pop(key)).shape != shape:
            raise UserError(f"{key} is {list(stored.shape)}, expected {list(shape)}")
        return stored.T.astype(np.float32)

    tree: dict[str, Any] = {}
    for path, found in layers.items():
        if "m" in shapes[path] and len(found) < arch.layers:
            raise UserError(
                f"the adapter is DoRA in {len(found)} of the {arch.layers} layers of {path}; "
                "expected all or none (the others' magnitudes are those of the base weights)"
            )
        ours = {k: np.zeros(leaf.shape, np.float32) for k, leaf in shapes[path].items()}
        for i, one in found.items():
            key = f"base_model.model.{_module(path, i, arch, inner)}."
            a, b = ours["a"][i], ours["b"][i]
            part = take(key + _PARTS["a"], (one.rank, a.size // a.shape[-1]))
            a[..., : one.rank] = part.reshape(*a.shape[:-1], one.rank)
            part = take(key + _PARTS["b"], (b[0].size, one.rank))
            b[: one.rank] = part.reshape(one.rank, *b.shape[1:])
            if one.scale != own[path].scale:
                b *= one.scale / own[path].scale
            if "m" in ours:
                m = ours["m"][i]
                m[...] = take(key + _PARTS["m"], (m.size,)).reshape(m.shape)
        tree[path] = ours
    if left:
        some = ", ".join(sorted(left)[:3])
        raise UserError(
            f"the adapter holds {len(left)} tensors that its settings or this model have no "
            f"place for: {some}"
        )
    return config, put({"layers": {}}, tree)


def _layers(
    settings: dict[str, Any], stated: LoRAConfig, arch: Arch, inner: str
) -> dict[str, dict[int, LoRAConfig]]:
    """Our path -> layer -> rank and alpha of each module that PEFT adapts with these settings."""
    found: dict[str, dict[int, LoRAConfig]] = {}
    for path in _paths(arch):
        for i in range(arch.layers):
            name = _module(path, i, arch, inner)
            if _targeted(settings, name):
                found.setdefault(path, {})[i] = LoRAConfig(
                    rank=_pattern(stated.rank_pattern, name, stated.rank),
                    alpha=_pattern(stated.alpha_pattern, name, stated.alpha),
                    rslora=stated.rslora,
                )
    if not found:
        raise UserError(
            f"target_modules {settings['target_modules']!r} match no module of this model, such as "
            + _module("attn/q_proj", 0, arch, inner)
        )
    return found


def _targeted(settings: dict[str, Any], name: str) -> bool:
    """Does PEFT adapt the module? As its check_target_module_exists."""

    def named(by: list[str] | str) -> bool:
        if isinstance(by, str):
            return bool(re.fullmatch(by, name))
        return any(name == t or name.endswith(f".{t}") for t in by)

    if named(settings.get("exclude_modules") or []) or not named(settings["target_modules"]):
        return False
    layers, targets = settings.get("layers_to_transform"), settings["target_modules"]
    if isinstance(targets, str) or name in targets or layers is None or layers == []:
        return True
    within = settings.get("layers_pattern") or "[^.]*"
    for pattern in [within] if isinstance(within, str) else within:
        if match := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name):
            return int(match[1]) in ([layers] if isinstance(layers, int) else layers)
    return False


def _pattern(pairs: tuple[tuple[str, Any], ...], name: str, default: Any) -> Any:
    """The value of the first key that PEFT's get_pattern_key finds in the module's name."""
    return next((v for key, v in pairs if re.match(rf"(.*\.)?({key})$", name)), default)


def _paths(arch: Arch) -> list[str]:
    """Our path of every module that can be adapted."""
    every = names(arch, "hf")
    return [p[len("layers/") : -len("/w")] for p in every if re.fullmatch("layers/.*/w", p)]


def _module(path: str, layer: int, arch: Arch, inner: str) -> str:
    """'attn/q_proj' -> 'model.layers.0.self_attn.q_proj'."""
    name = names(arch, "hf")[f"layers/{path}/w"].removesuffix(".weight").format(i=layer)
    name = name.removeprefix("model.")
    return f"{inner}{name}" if inner == _OLD else f"model.{inner}{name}"


def _means(config: LoRAConfig, lora: dict[str, Any]) -> tuple[Any, ...]:
    """What an adapter's settings come to, however they are spelled."""
    scales = {path: (config.rank_of(path), config.scale_of(path)) for path in modules(lora)}
    return config.variant, scales


def _equal(x: dict[str, Any], y: dict[str, Any]) -> bool:
    x, y = flatten(x), flatten(y)
    return x.keys() == y.keys() and all(np.array_equal(x[k], y[k]) for k in x)


def _config_json(
    lora: dict[str, Any], config: LoRAConfig, base: str, inner: str, revision: str
) -> dict[str, Any]:
    last = {path: path.rsplit("/", 1)[-1] for path in modules(lora)}
    ranks = {name: config.rank_of(path) for path, name in last.items()}
    alphas = {name: config.alpha_of(path) for path, name in last.items()}
    targets = sorted(last.values())
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision or None,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "bias": "none",
        # The image parts of a multimodal model have modules of the same names.
        "target_modules": rf".*\.{re.escape(inner)}.*\.({'|'.join(targets)})" if inner else targets,
        "use_rslora": config.rslora,
        "use_dora": config.variant == "dora",
        "rank_pattern": {name: r for name, r in ranks.items() if r != config.rank},
        "alpha_pattern": {name: a for name, a in alphas.items() if a != config.alpha},
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "inference_mode": True,
    }
