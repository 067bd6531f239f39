"""What a training step takes of a TPU chip, compiled ahead of time: no TPU is needed.

    pip install libtpu
    python tests/benchmarks/tpu_memory.py gemma_2b v5e:2x2 16x256 16x1024 remat=matmuls,full

compiles the real step (the default recipe: r 8 on all linear layers, dropout 0.1, bfloat16 base,
every token carries loss; mesh fsdp = all chips) for every batch x length and every combination of
config values, and prints for each, a chip:

  live          the bytes that are alive at once at the worst moment of the schedule, arguments
                included; no gaps between buffers, so a chip must have somewhat more
  peak          arguments + temporaries + outputs that are no argument, GiB: the larger count; of a
                step of Gemma 2B, 16x1024, 7.77 where 7.25 are assigned to buffers and 7.19 live
  dots          floating point operations of matrix products, 1e12, loops counted in full; `of need`
                relates them to 2 * (forward + dx) of every base matrix, and the head's two products
  transc.       exp, log, tanh, ... of elements, 1e9
  twice         base products that run more than once, and how often
  large         buffers as large as [B,T,V] of the rows of a chip, or as a base matrix of all layers
                where no argument is
"""

import collections
import dataclasses
import itertools
import math
import os
import pathlib
import re
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the TPU's compiler alone; arrays stay here
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing is run, so nothing is shared
sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental import topologies

from gemma_lora.arch import Arch, get_arch
from gemma_lora.config import default, flat, to_dict
from gemma_lora.lora import LoRAConfig, count
from gemma_lora.loss import Sweep
from gemma_lora.optim import optimizer
from gemma_lora.sharding import (
    batch_sharding,
    make_mesh,
    replicated,
    tree_shardings,
)
from gemma_lora.step import make_train_step, state_maker
from gemma_lora.weights.pretrained import build_model

BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4,
         "f32": 4}  # fmt: skip
TRANSCENDENTAL = {"exponential", "exponential-minus-one", "log", "log-plus-one", "tanh", "rsqrt",
                  "sqrt", "logistic", "erf", "power", "cosine", "sine"}  # fmt: skip


def compile_step(arch: Arch, config, mesh, rows: int, length: int):
    """The compiled training step of `rows` x `length` tokens on the mesh's absent devices."""
    wrap = LoRAConfig(**config.lora)
    model = build_model(arch, config, wrap, mesh)
    boxed = model.abstract()["params"]

    def on(x, sharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    base = jax.tree.map(on, nn.unbox(boxed), tree_shardings(boxed, mesh))
    tx = optimizer(config.optim, 100)
    state = state_maker(model, tx, mesh).eval_shape(jax.eval_shape(lambda: jax.random.key(0)))
    of_state = jax.tree.map(lambda x: x.sharding, state)
    ints = ("tokens", "segments", "positions", "loss_pos", "targets")
    kinds = {**dict.fromkeys(ints, jnp.int32), "loss_mask": jnp.float32}
    batch = {
        k: jax.ShapeDtypeStruct((rows, length), dtype, sharding=batch_sharding(mesh))
        for k, dtype in kinds.items()
    }
    step = jax.jit(
        make_train_step(model, tx, config.train.micro_batches, Sweep(**config.head), config.seed),
        donate_argnums=0,
        out_shardings=(of_state, replicated(mesh)),
    )
    return step.lower(state, base, batch).compile(), count(base), count(base["embed"])


@dataclasses.dataclass
class Op:
    kind: str
    dtype: str
    shape: tuple[int, ...]  # of the only or the first result
    operands: list[str]
    text: str

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def source(self) -> str:
        """The path of the operation in the program that was traced."""
        return (re.findall(r'op_name="([^"]*)"', self.text) or [""])[0]


def parse(text: str) -> tuple[dict[str, dict[str, Op]], dict[str, float]]:
    """(computation -> name -> Op, computation -> how often it runs) of a compiled module's text."""
    computations: dict[str, dict[str, Op]] = {}
    entry = name = ""
    for line in text.splitlines():
        if found := re.match(r"(ENTRY )?%([\w.\-]+) \(.*\{$", line):
            name = found[2]
            entry = name if found[1] else entry
            computations[name] = {}
        elif found := re.match(r"\s+(?:ROOT )?%([\w.\-]+) = (.*)", line):
            result = re.search(r"(\w+)\[([\d,]*)\]", found[2])
            kind = re.search(r"[)}\]] ([a-z][\w\-]*)\(([^)]*)\)", found[2])
            if not result or not kind:
                continue
            shape = tuple(int(n) for n in result[2].split(",") if n)
            operands = re.findall(r"%([\w.\-]+)", kind[2])
            computations[name][found[1]] = Op(kind[1], result[1], shape, operands, line)
    runs: dict[str, float] = collections.defaultdict(float)

    def visit(name: str, times: float) -> None:
        runs[name] += times
        for op in computations[name].values():
            called = {k: v for k, v in re.findall(r"(calls|body|condition)=%([\w.\-]+)", op.text)}
            inner = times
            if op.kind == "while":
                limits = [
                    int(n)
                    for o in computations[called.pop("condition")].values()
                    for n in re.findall(r"s32\[\][^ ]* constant\((\d+)\)", o.text)
                ]
                if len(limits) != 1:
                    raise SystemExit(f"how often does this loop run? {op.text[:300]}")
                inner = times * limits[0]
            for other in called.values():
                visit(other, inner)
            for other in re.findall(r"branch_computations=\{([^}]*)\}", op.text):
                branches = re.findall(r"%([\w.\-]+)", other)
                for branch in branches:
                    visit(branch, times / len(branches))

    visit(entry, 1.0)
    return computations, runs


def products(computations, runs, sizes: dict[str, int]) -> dict[tuple[str, str], float]:
    """(path of the module, einsum) -> floating point operations of all runs of its products."""
    found: dict[tuple[str, str], float] = collections.defaultdict(float)
    for name, ops in computations.items():
        for op in ops.values():
            if op.kind not in ("convolution", "dot") or not runs[name]:
                continue
            x, y = (ops[o].elements for o in op.operands[:2])
            parts = op.source.split("/")
            eqn = next((p for p in parts if "->" in p), "?")
            # (b M K) (b K N) (b M N) = b^3 (M K N)^2
            letters = [set(p) for p in re.split(",|->", eqn)]
            shared = set.intersection(*letters) if len(letters) == 3 else set()
            batch = math.prod(sizes.get(c, 1) for c in shared)
            flops = 2 * math.sqrt(x * y * op.elements / batch)
            path = "/".join(p for p in parts if re.fullmatch(r"attn|mlp|\w+_proj(\.product)?", p))
            found[path, eqn] += flops * runs[name]
    return found


def report(label: str, arch: Arch, compiled, mesh, rows: int, length: int, matrices: int) -> None:
    memory = compiled.memory_analysis()
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes + new
    computations, runs = parse(compiled.as_text())
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    tokens = rows * length // ways
    sizes = {"B": rows // ways, "K": arch.kv_heads, "N": arch.heads, "T": length, "S": length}
    dots = products(computations, runs, sizes)
    need = tokens * 2 * (2 * matrices + 2 * arch.vocab * arch.embed)
    twice = []
    for (path, eqn), flops in dots.items():
        if ".product" in path:
            letters = dict(D=arch.embed, F=arch.hidden, N=arch.heads, K=arch.kv_heads,
                           H=arch.head_dim)  # fmt: skip
            weight = re.split(",|->", eqn)[1]
            once = 2 * tokens * arch.layers * math.prod(letters[c] for c in weight)
            if round(flops / once, 2) != 1:
                twice.append(f"{path.rsplit('/', 1)[-1]} {eqn} x {flops / once:.2f}")
    slow = sum(
        op.elements * runs[name]
        for name, ops in computations.items()
        for op in ops.values()
        if op.kind in TRANSCENDENTAL
    )
    gib = 2.0**30
    print(
        f"{label:<44} live {memory.peak_memory_in_bytes / gib:6.2f}"
        f" | peak {peak / gib:6.2f} = arguments {memory.argument_size_in_bytes / gib:5.2f}"
        f" + temporaries {memory.temp_size_in_bytes / gib:5.2f} + new outputs {new / gib:4.2f}"
        f" | dots {sum(dots.values()) / 1e12:7.3f}, of need {sum(dots.values()) / need:5.3f}"
        f" | transc. {slow / 1e9:6.2f}"
    )
    print(f"    twice: {'; '.join(twice) or 'none'}")
    print(f"    large: {'; '.join(large(computations, runs, arch, tokens)) or 'none'}")


def large(computations, runs, arch: Arch, tokens: int) -> list[str]:
    """Buffers of [B,T,V] of a chip, and base matrices (of all layers, or the table) that were
    copied, converted or gathered whole; what is inside a fusion is no buffer."""
    fused = {f for ops in computations.values() for op in ops.values() if op.kind == "fusion"
             for f in re.findall(r"calls=%([\w.\-]+)", op.text)}  # fmt: skip
    out = collections.Counter()
    stacked = arch.layers * arch.embed * arch.hidden
    passing = {
        "parameter",
        "get-tuple-element",
        "bitcast",
        "tuple",
        "while",
        "optimization-barrier",
    }
    for name, ops in computations.items():
        for op in ops.values() if runs[name] and name not in fused else ():
            if op.kind in passing:
                continue
            of_loss = arch.vocab in op.shape and op.elements >= tokens * arch.vocab
            last = {arch.embed, arch.hidden, arch.vocab}
            is_base = op.elements in (stacked, arch.vocab * arch.embed) and set(op.shape) & last
            if of_loss or (is_base and op.dtype in BYTES):
                out[f"{op.dtype}{list(op.shape)} {op.kind}"] += 1
    return [f"{n} x {what}" for what, n in out.items()]


def main() -> None:
    name, topology, *rest = sys.argv[1:]
    arch = get_arch(name)
    shapes = [tuple(map(int, a.split("x"))) for a in rest if "=" not in a]
    choices = [(k, v.split(",")) for k, v in (a.split("=") for a in rest if "=" in a)]
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = make_mesh({"data": 1, "fsdp": -1, "tensor": 1}, devices)
    print(f"{name} on {topology}, {len(devices)} chips, fsdp; jax {jax.__version__}; GiB a chip")
    for rows, length in shapes:
        for values in itertools.product(*(v for _, v in choices)):
            config = default()
            settings = dict(zip((k for k, _ in choices), values, strict=True))
            known = flat(to_dict(config))
            typed = {k: type(known[k])(v) for k, v in settings.items()}
            config.update_from_flattened_dict(typed)
            label = " ".join([f"{rows}x{length}", *(f"{k}={v}" for k, v in settings.items())])
            start = time.monotonic()
            compiled, total, table = compile_step(arch, config, mesh, rows, length)
            tables = table if arch.tied else 2 * table
            report(label, arch, compiled, mesh, rows, length, total - tables)
            print(f"    compiled in {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
