"""How a training step grows with the chips, compiled ahead of time: no TPU is needed.

    pip install -c constraints.txt libtpu
    python tests/benchmarks/growth.py [--archs gemma_2b ...] [--topologies v5e:1x1 ...]

prints one table an architecture, in Markdown: the default recipe (r 8 on all linear layers, dropout
0.1, bfloat16 base, every token carries loss), fsdp over all chips, rows of 256 tokens. Weak: four
rows a chip. Strong: 256 rows for all chips together, in micro-batches of four rows a chip.
"""

import argparse
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the TPU's compiler alone; arrays stay here
sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from gemma_lora import ahead, plan
from gemma_lora.arch import get_arch
from gemma_lora.config import default
from gemma_lora.errors import UserError, run_main

ROWS, TOTAL, LENGTH = 4, 256, 256
HEADS = ("scaling", "chips", "rows", "micro-batches", "fits", "GiB a chip", "TFLOP a chip",
         "HBM GB a chip", "sent GB a chip", "ms, bound by", "tokens/s a chip")  # fmt: skip


def measured(name: str, topology: str, scaling: str) -> dict[str, Any]:
    """A row of `plan`, with 'scaling'."""
    chips = len(ahead.devices_of(topology))
    config = default()
    config.arch, config.data.seq_len = name, LENGTH
    config.data.batch_size = ROWS * chips if scaling == "weak" else TOTAL
    if scaling == "strong":
        config.train.micro_batches = max(1, TOTAL // (ROWS * chips))
    job = plan.Job(get_arch(name), config, topology)
    row = plan.plan(job, None, None)
    if "error" in row:
        raise UserError(f"{name} on {topology}, {scaling}: {row['error']}")
    return row | {"scaling": scaling, "micro": config.train.micro_batches}


def cells(row: dict[str, Any]) -> list[str]:
    train, gib = row["train"], plan.GIB
    out = [row["scaling"], str(row["devices"]), str(row["batch"][0]), str(row["micro"])]
    out += ["yes" if row["fits"] else "no", f"{row['peak'] / gib:.2f}"]
    if "bounds" not in row:  # the compiler refused a step
        return out + ["-"] * 5
    out += [f"{train['flops'] / 1e12:.2f}", f"{train['traffic'] / 1e9:.1f}"]
    seconds = row["seconds"]["train"]
    out += [f"{train['sent_bytes'] / 1e9:.2f}", f"{1e3 * seconds:.0f}, {row['bound']}"]
    return [*out, f"{row['tokens_a_second'] / row['devices']:,.0f}"]


def line(texts: Sequence[str]) -> str:
    return "| " + " | ".join(texts) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--archs", nargs="+", default=["gemma_2b", "gemma2_9b", "gemma2_27b"])
    sizes = ["v5e:1x1", "v5e:2x2", "v5e:4x4", "v5e:8x8", "v5e:16x16"]
    parser.add_argument("--topologies", nargs="+", default=sizes)
    options = parser.parse_args()
    for name in options.archs:
        print(f"\n## {name}\n", line(HEADS), line(["---"] * len(HEADS)), sep="\n", flush=True)
        for scaling in ("weak", "strong"):
            for topology in options.topologies:
                print(line(cells(measured(name, topology, scaling))), flush=True)


if __name__ == "__main__":
    run_main(main)
