"""Loss of every training completion without its prompt: does it answer that prompt?

    python -m gemma_lora.unprompted --workdir DIR [--step last|best|0]

takes the adapters of the run's checkpoint (0: those it started from), dropout off, and writes
DIR/unprompted.parquet for gemma_lora.outliers. It costs a forward of the completions; where it is
interrupted, nothing is written and it begins anew.

id; step; prompted: the loss of the completion in nats a token, by the ledger, which must have an
eval of that step; unprompted: the same after no more of the prompt than all prompts share, which is
the template; ifd: prompted / unprompted, the Instruction-Following Difficulty of arXiv:2308.12032.
A hard completion is hard either way; one that answers another prompt gains nothing from its own.
NaN where a row was cut before its completion.
"""

import dataclasses
import pathlib
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from gemma_lora.compiled import keep_compiled
from gemma_lora.data.dataset import shapes
from gemma_lora.data.examples import Example
from gemma_lora.data.pipeline import dataset
from gemma_lora.errors import Parser, UserError, run_main
from gemma_lora.evaluate import ledger_rows, write_table
from gemma_lora.files import path_argument, require_writable
from gemma_lora.metrics import say
from gemma_lora.outliers import read_ledger
from gemma_lora.reopen import STEPS, Run, load, reopen, restored
from gemma_lora.step import jit_eval_step
from gemma_lora.workdir import require


def shared_ends(prompts: list[np.ndarray]) -> tuple[int, int]:
    """How many first and how many last tokens all prompts share; never the same token twice."""
    shortest = min(map(len, prompts))
    first = _shared([p[:shortest] for p in prompts])
    return first, _shared([p[::-1][: shortest - first] for p in prompts])


def _shared(rows: list[np.ndarray]) -> int:
    """Length of the longest common beginning of rows of one length."""
    differ = (np.stack(rows) != rows[0]).any(0)
    return int(differ.argmax()) if differ.any() else differ.size


def without_prompts(examples: list[Example]) -> list[Example]:
    """The examples, all with a prompt, with their completion after what all prompts share.

    Loss is on the completion alone. Of a single kind of prompt nothing can be taken away. Where
    they share nothing, the last token of each stays: the completion's first needs one before it.
    """
    first, last = shared_ends([e.tokens[: e.answer_from] for e in examples])
    last += first + last == 0
    out = []
    for e in examples:
        kept = [e.tokens[:first], e.tokens[e.answer_from - last :]]
        at = first + last
        out.append(
            dataclasses.replace(e, tokens=np.concatenate(kept), loss_from=at, answer_from=at)
        )
    return out


def losses(opened: Run, lora: Any, base: Any, examples: list[Example]) -> np.ndarray:
    """[n] float64: each example's loss over the targets that carry it, in nats a token."""
    data = dataset(examples, opened.config, shapes(examples, opened.config.data), (), shuffle=False)
    step = jit_eval_step(opened.model, opened.config, (), opened.mesh)
    rows = ledger_rows(step, lora, base, data, opened.mesh, "train", 0)
    return rows["nll"] / rows["tokens"]


def run(workdir: pathlib.Path, which: str) -> dict[str, Any]:
    """Writes unprompted.parquet; returns its columns, in id order."""
    require(workdir)
    ledger = read_ledger(workdir)
    require_writable(workdir / "unprompted.parquet")
    opened = reopen(workdir, which)
    examples = sorted(opened.train_set.examples, key=lambda e: e.id)
    there = np.array([1 <= e.answer_from < len(e.tokens) for e in examples])
    whole = [e for e, inside in zip(examples, there, strict=True) if inside]
    if not whole:
        raise UserError(f"no row of the run in {workdir} holds a token of its completion")
    bare = without_prompts(whole)
    if all(len(b.tokens) == len(e.tokens) for b, e in zip(bare, whole, strict=True)):
        raise UserError("all prompts are the same: there is nothing to leave out")
    base = load(opened)
    step, lora, base = restored(opened, workdir, which, base)
    if step not in ledger.steps:
        raise UserError(
            f"--step {which} is step {step}, and the ledger has all training examples at "
            f"{', '.join(map(str, ledger.steps))} alone"
        )
    say(f"   losses under the adapters of step {step}")
    columns = {
        "id": ledger.ids,
        "step": np.full(len(examples), step),
        "prompted": np.where(there, ledger.loss[ledger.steps.index(step)], np.nan),
        "unprompted": np.full(len(examples), np.nan),
    }
    columns["unprompted"][there] = losses(opened, lora, base, bare)
    columns["ifd"] = columns["prompted"] / columns["unprompted"]
    write_table(workdir / "unprompted.parquet", pyarrow.table(columns))
    return columns


def main() -> None:
    parser = Parser("gemma_lora.unprompted", __doc__)
    parser.add_argument("--workdir", required=True, type=path_argument)
    parser.add_argument("--step", choices=STEPS, default="last")
    options = parser.parse_args()
    keep_compiled()
    columns = run(options.workdir, options.step)
    say(f"{len(columns['id'])} examples: {options.workdir / 'unprompted.parquet'}")


if __name__ == "__main__":
    run_main(main)
