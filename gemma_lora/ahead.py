"""The programs of a run, compiled ahead of time for devices that need not be there, and what they
take of one device. What was found is kept on disk."""

import collections
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
import re
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from gemma_lora import hlo
from gemma_lora.arch import Arch
from gemma_lora.errors import UserError
from gemma_lora.files import cache_dir, write_text
from gemma_lora.lora import LoRAConfig, check_targets
from gemma_lora.optim import optimizer
from gemma_lora.sharding import batch_sharding, tree_shardings
from gemma_lora.step import jit_eval_step, jit_train_step, state_maker
from gemma_lora.weights.pretrained import build_model

STEPS = ("train", "eval")
MOST_ON_HOST = 1024


def host_devices(topology: str) -> int:
    """'cpu:8' -> 8, the devices it takes of this host; of a TPU's topology 0.

    Raises UserError for a number that JAX does not make on a host within a minute.
    """
    kind, _, size = topology.partition(":")
    if kind != "cpu":
        return 0
    if not re.fullmatch("[0-9]{1,4}", size) or not 0 < int(size) <= MOST_ON_HOST:
        raise UserError(f"topology {topology!r}: expected cpu:1 to cpu:{MOST_ON_HOST}")
    return int(size)


def devices_of(topology: str) -> list[Any]:
    """'cpu:8' or a TPU topology, 'v5e:2x2' -> its devices, which are absent.

    Raises UserError for a topology there is none of, or without the TPU's compiler.
    """
    if n := host_devices(topology):
        if n > len(jax.devices("cpu")):
            raise UserError(f"topology {topology!r}: JAX has {len(jax.devices('cpu'))} CPU devices")
        return jax.devices("cpu")[:n]
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # its answer would take minutes to stay out
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing is run, nothing is shared
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as e:  # whatever the plugin raises
        first = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise UserError(
            f"topology {topology!r}: {first}; expected e.g. v5e:2x2 or v5p:2x2x1, and the package "
            "libtpu"
        ) from e


def shapes(arch: Arch, config: Any, mesh: Mesh, rows: int, length: int) -> dict[str, Any]:
    """{'state', 'base', 'batch'}: shapes, dtypes and shardings of what the steps take.

    A batch has B x T tokens, each of which may carry loss: the most that a data set asks for.
    """
    return _setting(arch, config, mesh, rows, length)[0]


def abstract(arch: Arch, config: Any, mesh: Mesh) -> dict[str, Any]:
    """Base and adapters as shapes, boxed with their letters."""
    return build_model(arch, config, LoRAConfig(**config.lora), mesh).abstract()


def _setting(arch: Arch, config: Any, mesh: Mesh, rows: int, length: int):
    wrap = LoRAConfig(**config.lora)
    model = build_model(arch, config, wrap, mesh)
    tree = model.abstract()
    boxed = tree["params"]
    check_targets(wrap, *nn.unbox((boxed, tree.get("lora"))))

    def on(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    # Of how many steps changes constants alone.
    tx = optimizer(config.optim, config.optim.warmup_steps + 100)
    slots = 8 * -(-length // 8)  # at most, by data.dataset.loss_slots
    arrays = {
        **{k: (length, jnp.int32) for k in ("tokens", "segments", "positions")},
        **{k: (slots, jnp.int32) for k in ("loss_pos", "targets")},
        "loss_mask": (slots, jnp.float32),
    }
    trees = {
        "state": state_maker(model, tx, mesh).eval_shape(jax.eval_shape(lambda: jax.random.key(0))),
        "base": jax.tree.map(on, nn.unbox(boxed), tree_shardings(boxed, mesh)),
        "batch": {
            k: jax.ShapeDtypeStruct((rows, n), dtype, sharding=batch_sharding(mesh))
            for k, (n, dtype) in arrays.items()
        },
    }
    return trees, model, tx


def lowered(
    arch: Arch, config: Any, mesh: Mesh, rows: int, length: int, step: str
) -> jax.stages.Lowered:
    """The traced 'train' or 'eval' step (without label words) of a config. Allocates nothing."""
    trees, model, tx = _setting(arch, config, mesh, rows, length)
    state, base, batch = trees["state"], trees["base"], trees["batch"]
    if step == "train":
        return jit_train_step(model, tx, config, state, mesh).lower(state, base, batch)
    return jit_eval_step(model, config, (), mesh).lower(state.lora, base, batch)


def facts(
    arch: Arch, config: Any, topology: str, mesh: Mesh, rows: int, length: int, step: str
) -> dict[str, Any]:
    """What one step takes of one device, from the program compiled for it:

    arguments, temporaries, outputs (those that replace no argument), code: bytes held; padding:
    what tiles add to the arguments; host: bytes put in the host's memory and read from it again;
    flops: of matrix products; attention: a splash kernel's products of [T,H] by [H,S], which
    are not in flops, a head; traffic: bytes from and to HBM; sent: kind of collective ->
    bytes; unknown_loops: loops counted once; seconds: of the compilation. Where the compiler finds
    that the memory does not suffice: too_large, its words; needs and available, bytes; no more.
    """
    key = _key(arch, config, topology, mesh, rows, length, step)
    path = cache_dir() / "plans" / f"{key}.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    config = config.copy_and_resolve_references()
    config.seed = 0  # a constant of the program
    traced = lowered(arch, config, mesh, rows, length, step)
    start = time.monotonic()
    found: dict[str, Any] = {}
    try:
        compiled = traced.compile()
    except jax.errors.JaxRuntimeError as e:
        found |= _refusal(str(e))
        if not found:
            raise
    else:
        found |= _measured(compiled, arch, mesh, rows_at_once(config, rows), length)
    found["seconds"] = time.monotonic() - start
    with contextlib.suppress(OSError):  # a folder that cannot be written only costs the time
        write_text(path, json.dumps(found, indent=1) + "\n")
    return found


def _refusal(message: str) -> dict[str, Any]:
    """What the compiler says where the memory does not suffice; {} where it is another matter."""
    size = r"([\d.]+)([GMK])"
    words = (rf"\({size}\) exceeds available HBM \({size}\)", rf"Used {size} of {size} hbm")
    for found in filter(None, (re.search(w, message) for w in words)):
        unit = {"G": 2**30, "M": 2**20, "K": 2**10}
        needs, u, available, v = found.groups()
        return {
            "too_large": " ".join(message.split("See http")[0].split()),
            "needs": round(float(needs) * unit[u]),
            "available": round(float(available) * unit[v]),
        }
    return {}


def _measured(compiled: Any, arch: Arch, mesh: Mesh, rows: int, length: int) -> dict[str, Any]:
    memory = compiled.memory_analysis()
    program = hlo.parse(compiled.as_text())
    sent = collections.Counter()
    for each in hlo.collectives(program):
        sent[each.kind] += each.bytes
    return {
        "arguments": memory.argument_size_in_bytes,
        "padding": hlo.padding(program),
        "temporaries": memory.temp_size_in_bytes,
        "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
        "host": memory.host_temp_size_in_bytes,
        "flops": sum(hlo.products(program, letter_sizes(arch, mesh, rows, length)).values()),
        "attention": hlo.attention_products(program),
        "traffic": hlo.traffic(program),
        "sent": dict(sent),
        "unknown_loops": program.unknown,
    }


def rows_at_once(config: Any, rows: int) -> int:
    """Of a batch, those that the model takes together: a micro-batch."""
    return rows // config.train.micro_batches


def letter_sizes(arch: Arch, mesh: Mesh, rows: int, length: int) -> dict[str, int]:
    """Of the letters that a product of activations shares, on one device. rows: at once."""
    ways, tensor = mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["tensor"]

    def part(n: int) -> int:
        return n if n % tensor else n // tensor

    return {"B": rows // ways, "K": part(arch.kv_heads), "N": part(arch.heads), "T": length,
            "S": length}  # fmt: skip


def _key(arch: Arch, config: Any, topology: str, mesh: Mesh, rows: int, length: int, step: str):
    """A hash of all that the program of a step depends on, and of the package's code."""
    sections = ("head", "lora", "optim") if step == "train" else ("head", "lora")
    names = ("dtype", "quantize", "remat", "attention", "unroll")
    parts = {
        "arch": dataclasses.asdict(arch),
        "config": {k: getattr(config, k) for k in names}
        | {k: config[k].to_dict() for k in sections},
        "run": [topology, dict(mesh.shape), rows, rows_at_once(config, rows), length, step],
        "flags": {k: os.environ.get(k, "") for k in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")},
        "versions": {p: _version(p) for p in ("jax", "jaxlib", "flax", "optax", "libtpu")},
    }
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    package = pathlib.Path(__file__).parent
    for file in sorted(package.rglob("*.py")):
        if file.name != "plan.py":  # it prints
            digest.update(file.read_bytes())
    return digest.hexdigest()[:32]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
