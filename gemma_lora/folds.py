"""Out-of-fold loss: every training example under an adapter that was not trained on it.

    python -m gemma_lora.folds --workdir DIR [--folds K]

trains K adapters from the run's base model and config, one epoch each, every one without its part
of the run's training examples, and writes DIR/folds/scores.parquet for gemma_lora.outliers.
Folds that are done are kept: the same command continues. On several hosts each process gets it,
with the flags of gemma_lora/distributed.py.
"""

import hashlib
import pathlib
from typing import Any

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
from ml_collections import ConfigDict

from gemma_lora import distributed, evaluate
from gemma_lora.compiled import keep_compiled
from gemma_lora.data.dataset import Dataset
from gemma_lora.data.examples import plain
from gemma_lora.data.pipeline import dataset
from gemma_lora.errors import Parser, UserError
from gemma_lora.evaluate import completion_part
from gemma_lora.files import path_argument, require_writable
from gemma_lora.metrics import say
from gemma_lora.optim import optimizer
from gemma_lora.reopen import load, reopen
from gemma_lora.sharding import to_global
from gemma_lora.step import init_state, jit_eval_step, jit_train_step

COLUMNS = ("id", "fold_loss", "fold_label", "label_p")


def fold_of(text: str, folds: int, seed: int) -> int:
    """The fold of an example, from a hash of (seed, text): rows may come in any order, and no copy
    of a row, but for white space and case, trains the model that scores it."""
    digest = hashlib.sha256(f"fold/{seed}/{plain(text)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % folds


def parts(train_set: Dataset, config: Any, folds: int) -> list[tuple[Dataset, Dataset]]:
    """(what fold k trains on, what it holds out) for every k; UserError where one is empty."""
    examples = train_set.examples
    if not 2 <= folds <= len(examples):
        raise UserError(f"--folds is {folds}, expected 2 to {len(examples)} training examples")
    whose = [fold_of(e.text, folds, config.seed) for e in examples]
    out = []
    for k in range(folds):
        kept = [e for e, fold in zip(examples, whose, strict=True) if fold != k]
        held = [e for e, fold in zip(examples, whose, strict=True) if fold == k]
        if not kept or not held:
            raise UserError(
                f"fold {k} of {folds} is empty (equal texts share one): expected fewer --folds, or "
                "more different texts"
            )
        rows, labels = train_set.shapes, train_set.label_tokens
        fit = dataset(kept, config, rows, labels, shuffle=True)
        out.append((fit, dataset(held, config, rows, labels, shuffle=False)))
    return out


def _is_of(path: pathlib.Path, held: Dataset) -> bool:
    """Is the file there, and of these examples? Folds were cut otherwise once."""
    if not path.exists():
        return False
    found = evaluate.read_table(path, ("id",))["id"].to_pylist()
    return sorted(found) == sorted(e.id for e in held.examples)


def run(workdir: pathlib.Path, folds: int) -> dict[str, np.ndarray]:
    """Makes the folds that are missing; returns the columns of scores.parquet, in id order."""
    distributed.agree("--folds", str(folds))
    if folds < 2:
        raise UserError(f"--folds is {folds}, expected at least 2")
    opened = reopen(workdir)
    require_writable(workdir / "folds" / "scores.parquet")
    config, wrap, mesh = opened.config, opened.wrap, opened.mesh
    model, train_set = opened.model, opened.train_set
    if wrap.reads_base:
        raise UserError(
            f"the run's adapters, {wrap.variant} with init {wrap.init}, start from base weights: "
            "folds are made for plain LoRA"
        )
    made = parts(train_set, config, folds)
    paths = [workdir / "folds" / f"{k}_of_{folds}.parquet" for k in range(folds)]
    distributed.agree("the data", train_set.fingerprint())
    # Process 0 alone asks: what another one has not found it may not find soon after.
    first = jax.process_index() == 0
    done = [
        distributed.from_first(first and _is_of(path, held))
        for path, (_, held) in zip(paths, made, strict=True)
    ]
    base = None
    evaluating = jit_eval_step(model, config, train_set.label_tokens, mesh)
    for k, ((fit, held), path, kept) in enumerate(zip(made, paths, done, strict=True)):
        if kept:
            say(f"   fold {k} of {folds}: kept from {path}")
            continue
        if base is None:
            base = load(opened)
        total = fit.steps_per_epoch
        # The run may be longer than an epoch, and its warmup longer than the fold.
        warmup = min(config.optim.warmup_steps, total - 1)
        tx = optimizer(ConfigDict(config.optim.to_dict() | {"warmup_steps": warmup}), total)
        state = init_state(model, tx, config.seed, mesh)
        step = jit_train_step(model, tx, config, state, mesh)
        for batch in fit.batches(0, total):
            state, sums = step(state, base, to_global(batch.arrays, mesh))
        loss = float(np.sum(jax.device_get(sums["nll"])) / np.sum(jax.device_get(sums["tokens"])))
        if not np.isfinite(loss):
            raise UserError(f"fold {k} of {folds}: the loss is {loss} at step {total}")
        rows = evaluate.ledger_rows(evaluating, state.lora, base, held, mesh, "train", total)
        if jax.process_index() == 0:
            evaluate.write_table(path, pyarrow.table(_scores(rows, held)))
        say(f"   fold {k} of {folds}: {total} steps, {len(held.examples)} examples held out")
    distributed.wait_for_all()  # process 0 has written
    tables = [evaluate.read_table(path, COLUMNS) for path in paths]
    table = pyarrow.concat_tables(tables).sort_by("id")
    columns = {name: table[name].to_numpy() for name in COLUMNS}
    if columns["id"].tolist() != sorted(e.id for e in train_set.examples):
        raise UserError(f"{workdir / 'folds'} holds folds of other examples; remove it")
    if jax.process_index() == 0:
        evaluate.write_table(workdir / "folds" / "scores.parquet", table)
    distributed.wait_for_all()
    return columns


def _scores(rows: dict[str, np.ndarray], held: Dataset) -> dict[str, Any]:
    """A fold's columns: loss of the completion in nats a token; -log p of the label, or NaN.

    label_p: the probabilities of all labels, a list a row; empty without labels.
    """
    each = zip(rows["token_nll"], held.examples, strict=True)
    loss = [np.mean(completion_part(x, e.prompt_targets), dtype=np.float64) for x, e in each]
    label = np.full(len(loss), np.nan)
    known = rows["label"] >= 0
    if known.any():
        p = rows["label_p"][known, rows["label"][known]]
        with np.errstate(divide="ignore"):
            label[known] = -np.log(p)
    label_p = pyarrow.array(list(rows["label_p"]), evaluate.COLUMNS["label_p"])
    out = {"id": rows["id"], "fold_loss": np.array(loss), "fold_label": label}
    return out | {"label_p": label_p}


def main() -> None:
    parser = Parser("gemma_lora.folds", __doc__, elsewhere=tuple(distributed.FLAGS))
    parser.add_argument("--workdir", required=True, type=path_argument)
    parser.add_argument("--folds", type=int, default=2)
    options = parser.parse_args()
    keep_compiled()
    columns = run(options.workdir, options.folds)
    say(f"{len(columns['id'])} examples scored out of fold: {options.workdir / 'folds'}")


if __name__ == "__main__":
    distributed.run(main)
