"""What many tests share: tiny models on our tree, and batches from token arrays."""

import contextlib
import functools
import importlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from gemma_lora.arch import Arch
from gemma_lora.data.examples import Example
from gemma_lora.errors import UserError
from gemma_lora.lora import from_base
from gemma_lora.model import Transformer, head_weight, logits, no_wrap
from gemma_lora.sharding import make_mesh, tree_shardings
from gemma_lora.step import Batch
from gemma_lora.weights import mapping, peft
from gemma_lora.weights.hf import Safetensors


@contextlib.contextmanager
def jax_settings(**settings: Any) -> Iterator[None]:
    """Other settings of JAX for a while."""
    before = {name: jax.config.values[name] for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def all_passes() -> contextlib.AbstractContextManager[None]:
    """Compiles as for a user, also where the environment asks for few optimisations."""
    return jax_settings(jax_disable_most_optimizations=False)


def live(module: str):
    """A module of the tests that needs torch, transformers and peft; skips where they are absent.

    With GEMMA_LORA_REQUIRE_LIVE set, their absence is a failure: CI must not lose these tests.
    """
    for package in ("torch", "transformers", "peft"):
        needs(package)
    return importlib.import_module(module)


def needs(package: str):
    """An optional package; skips where it is absent, fails with GEMMA_LORA_REQUIRE_LIVE set."""
    if os.environ.get("GEMMA_LORA_REQUIRE_LIVE"):
        return importlib.import_module(package)
    return pytest.importorskip(package, reason=f"{package} is not installed")


def rows_of(name: str, split: str = "train") -> pathlib.Path:
    """The file of real rows tiny.DATA/name/split.jsonl; skips, saying where it looked, where there
    is none, and fails where GEMMA_LORA_DATA says that there is."""
    path = tiny.DATA / name / f"{split}.jsonl"
    if not path.exists():
        assert "GEMMA_LORA_DATA" not in os.environ, f"there is no {path}"
        pytest.skip(f"there is no {path}: GEMMA_LORA_DATA names the directory of the real rows")
    return path


def message(call: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """The text of the UserError that a call raises, which must be one line."""
    with pytest.raises(UserError) as e:
        call(*args, **kwargs)
    assert "\n" not in str(e.value)
    return str(e.value)


def on_eight_devices(script: str, *arguments: str) -> None:
    """Runs a script that ends by printing 'equal' in a process with eight devices of the host.

    It compiles quickly: what is left out comes after programs are split over devices.
    """
    here = pathlib.Path(__file__).parent
    flags = "--xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env={
            **os.environ,
            "XLA_FLAGS": flags,
            "JAX_PLATFORMS": "cpu",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "PYTHONPATH": os.pathsep.join((str(here), str(here.parent))),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "equal", done.stderr[-3000:]


def one_device():
    return make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])


def tiny_arch(name: str) -> Arch:
    return Arch.from_hf(tiny.TINY[name])


@functools.cache
def tiny_params(name: str, quantize: str = "") -> dict[str, Any]:
    """The base weights of TINY[name], through our safetensors reader and mapping, float32."""
    arch = tiny_arch(name)
    boxed = Transformer(arch, quantize=quantize).abstract()["params"]
    shardings = tree_shardings(boxed, one_device())
    with tempfile.TemporaryDirectory() as directory:
        tensors = Safetensors(tiny.write_tiny(name, directory))
        return mapping.load(tensors, "hf", arch, nn.unbox(boxed), shardings)


def tiny_model(name: str, wrap=no_wrap, **kwargs) -> tuple[Transformer, dict[str, Any]]:
    return Transformer(tiny_arch(name), wrap=wrap, **kwargs), tiny_params(name)


def adapter(name: str, rank: int = 4, **kwargs) -> dict[str, Any]:
    """tiny.init_adapter on our tree."""
    return on_our_tree(tiny.init_adapter(tiny.TINY[name], rank, **kwargs), tiny_arch(name))


def on_our_tree(tensors: dict[str, np.ndarray], arch: Arch) -> dict[str, Any]:
    """PEFT's tensors of all linear modules, of one rank."""
    settings = tiny.settings_of("lora", r=len(next(iter(tensors.values()))))
    return peft.from_tensors(tensors, settings, arch)[1]


def random_adapter(model: Transformer, params: dict[str, Any], size: float = 0.2) -> Any:
    """Every leaf of the model's adapters at random; DoRA's m near the norms of the base."""
    rng = np.random.default_rng(0)
    shapes = nn.unbox(model.abstract()["lora"])
    start = jax.tree.map(lambda x: jnp.asarray(rng.uniform(-size, size, x.shape), x.dtype), shapes)
    _, lora = jax.jit(functools.partial(from_base, model.wrap))(params, start)

    def near(path, leaf, noise):
        return leaf * (1 + noise) if path[-1].key == "m" else leaf

    return jax.tree_util.tree_map_with_path(near, lora, start)


def batch_of(tokens: np.ndarray, mask: np.ndarray, slots: int | None = None) -> Batch:
    """Arrays of one batch from tokens [B,T] and a mask that is True where tokens[t] is a target."""
    rows, length = tokens.shape
    slots = slots or int(mask.sum(1).max())
    loss_pos, targets = (np.zeros((rows, slots), np.int32) for _ in range(2))
    loss_mask = np.zeros((rows, slots), np.float32)
    for r in range(rows):
        at = np.flatnonzero(mask[r])
        loss_pos[r, : len(at)], targets[r, : len(at)] = at - 1, tokens[r, at]
        loss_mask[r, : len(at)] = 1
    arrays = {
        "tokens": tokens.astype(np.int32),
        "segments": np.ones(tokens.shape, np.int32),
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape),
        "loss_pos": loss_pos,
        "targets": targets,
        "loss_mask": loss_mask,
    }
    return {k: jnp.asarray(v) for k, v in arrays.items()}


def all_logits(model: Transformer, params: Any, lora: Any, tokens: np.ndarray) -> np.ndarray:
    """[B,T] ids -> [B,T,V] float32 logits of one whole segment a row."""
    quick = jax.config.values["jax_disable_most_optimizations"]  # which changes the last bits
    return np.asarray(_logits_of(model, quick)(params, lora, jnp.asarray(tokens)))


@functools.cache
def _logits_of(model: Transformer, quick: bool):
    @jax.jit
    def run(params, lora, tokens):
        variables = {"params": params, "lora": lora}
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden = model.apply(variables, tokens, jnp.ones_like(tokens), positions)
        return logits(hidden, head_weight(params, model.arch), model.arch, model.dtype)

    return run


def examples(lengths: list[int], loss_from: list[int], vocab: int = 128) -> list[Example]:
    """Random examples of given lengths whose loss begins at the given tokens."""
    rng = np.random.default_rng(0)
    return [
        Example(f"e{i}", rng.integers(3, vocab, n).astype(np.int32), start, f"text {i}", 0, 0)
        for i, (n, start) in enumerate(zip(lengths, loss_from, strict=True))
    ]


def read_json(path) -> Any:
    return json.loads(path.read_text())
