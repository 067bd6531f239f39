"""What a training step takes of a TPU chip, compiled ahead of time: no TPU is needed.

    pip install -c constraints.txt libtpu
    python tests/benchmarks/tpu_memory.py gemma_2b v5e:2x2 16x256 16x1024 remat=matmuls,offload,full

compiles the real step (the default recipe: r 8 on all linear layers, dropout 0.1, bfloat16 base,
every token carries loss; mesh fsdp = all chips) for every batch x length and every combination of
config values, and prints for each, a chip:

  live          the bytes that are alive at once at the worst moment of the schedule, arguments
                included; no gaps between buffers, so a chip must have somewhat more
  peak          arguments + temporaries + outputs that are no argument, GiB: the larger count; of a
                step of Gemma 2B, 16x1024, 7.77 where 7.25 are assigned to buffers and 7.19 live
  host          what is put in the host's memory and read again, GiB
  dots          floating point operations of matrix products, 1e12, loops counted in full; `of need`
                relates them to 2 * (forward + dx) of every base matrix, and the head's two products
  transc.       exp, log, tanh, ... of elements, 1e9
  twice         base products that run more than once, and how often
  large         buffers as large as [B,T,V] of the rows of a chip, or as a base matrix of all layers
                where no argument is
"""

import ast
import collections
import itertools
import math
import os
import pathlib
import re
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the TPU's compiler alone; arrays stay here
sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

import jax

from gemma_lora import ahead, hlo
from gemma_lora.arch import Arch, get_arch
from gemma_lora.config import default, flat, to_dict
from gemma_lora.lora import count
from gemma_lora.sharding import make_mesh

TRANSCENDENTAL = {"exponential", "exponential-minus-one", "log", "log-plus-one", "tanh", "rsqrt",
                  "sqrt", "logistic", "erf", "power", "cosine", "sine"}  # fmt: skip


def report(label: str, arch: Arch, compiled, mesh, rows: int, length: int, matrices: int) -> None:
    memory = compiled.memory_analysis()
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes + new
    program = hlo.parse(compiled.as_text())
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    tokens = rows * length // ways
    dots = hlo.products(program, ahead.letter_sizes(arch, mesh, rows, length))
    need = tokens * 2 * (2 * matrices + 2 * arch.vocab * arch.embed)
    twice = []
    for (path, eqn), flops in dots.items():
        if ".product" in path:
            letters = dict(D=arch.embed, F=arch.hidden, N=arch.heads, K=arch.kv_heads,
                           H=arch.head_dim)  # fmt: skip
            weight = re.split(",|->", eqn)[1]
            once = 2 * tokens * arch.layers * math.prod(letters[c] for c in weight)
            if round(flops / once, 2) > 1:
                twice.append(f"{path.rsplit('/', 1)[-1]} {eqn} x {flops / once:.2f}")
    slow = sum(
        op.elements * times for _, _, op, times in program.ops() if op.kind in TRANSCENDENTAL
    )
    gib = 2.0**30
    print(
        f"{label:<44} live {memory.peak_memory_in_bytes / gib:6.2f}"
        f" | peak {peak / gib:6.2f} = arguments {memory.argument_size_in_bytes / gib:5.2f}"
        f" + temporaries {memory.temp_size_in_bytes / gib:5.2f} + new outputs {new / gib:4.2f}"
        f" | host {memory.host_temp_size_in_bytes / gib:4.2f}"
        f" | dots {sum(dots.values()) / 1e12:7.3f}, of need {sum(dots.values()) / need:5.3f}"
        f" | transc. {slow / 1e9:6.2f}"
    )
    print(f"    twice: {'; '.join(twice) or 'none'}")
    print(f"    large: {'; '.join(large(program, arch, tokens)) or 'none'}")


def large(program: hlo.Program, arch: Arch, tokens: int) -> list[str]:
    """Buffers of [B,T,V] of a chip, and base matrices (of all layers, or the table) that were
    copied, converted or gathered whole; what is inside a fusion is no buffer."""
    fused = {op.called() for _, _, op, _ in program.ops() if op.kind == "fusion"}
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
    for computation, _, op, _ in program.ops():
        if op.kind in passing or computation in fused:
            continue
        of_loss = arch.vocab in op.shape and op.elements >= tokens * arch.vocab
        last = {arch.embed, arch.hidden, arch.vocab}
        is_base = op.elements in (stacked, arch.vocab * arch.embed) and set(op.shape) & last
        if of_loss or is_base:
            out[f"{op.dtype}{list(op.shape)} {op.kind}"] += 1
    return [f"{n} x {what}" for what, n in out.items()]


def main() -> None:
    if len(sys.argv) < 4:
        raise SystemExit(__doc__)
    name, topology, *rest = sys.argv[1:]
    arch = get_arch(name)
    shapes = [tuple(map(int, a.split("x"))) for a in rest if "=" not in a]
    choices = [(k, v.split(",")) for k, v in (a.split("=") for a in rest if "=" in a)]
    devices = ahead.devices_of(topology)
    mesh = make_mesh({"data": 1, "fsdp": -1, "tensor": 1}, devices)
    print(f"{name} on {topology}, {len(devices)} chips, fsdp; jax {jax.__version__}; GiB a chip")
    for rows, length in shapes:
        for values in itertools.product(*(v for _, v in choices)):
            config = default()
            settings = dict(zip((k for k, _ in choices), values, strict=True))
            known = flat(to_dict(config))
            # As on a command line: 2, 1e-3, True, ('q',), and text for what is text.
            typed = {
                k: v if isinstance(known[k], str) else ast.literal_eval(v)
                for k, v in settings.items()
            }
            config.update_from_flattened_dict(typed)
            label = " ".join([f"{rows}x{length}", *(f"{k}={v}" for k, v in settings.items())])
            start = time.monotonic()
            base = ahead.shapes(arch, config, mesh, rows, length)["base"]
            tables = count([base[k] for k in ("embed", "head") if k in base])
            compiled = ahead.lowered(arch, config, mesh, rows, length, "train").compile()
            report(label, arch, compiled, mesh, rows, length, count(base) - tables)
            print(f"    compiled in {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
