"""Out-of-fold loss: every training example under an adapter that was not trained on it.

    python -m gemma_lora.folds --workdir DIR [--folds K]

trains K adapters from the run's base model and config, one epoch each, every one without its part
of the run's training examples, and writes DIR/folds/scores.parquet for gemma_lora.outliers.
Folds that are done are kept: the same command continues.
"""

import argparse
import hashlib
import json
import pathlib
from typing import Any

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
from ml_collections import ConfigDict

from gemma_lora import evaluate
from gemma_lora.compiled import keep_compiled
from gemma_lora.config import check
from gemma_lora.data.dataset import Dataset
from gemma_lora.data.pipeline import dataset, load_data
from gemma_lora.errors import UserError, run_main
from gemma_lora.evaluate import completion_part
from gemma_lora.files import replace_file
from gemma_lora.lora import LoRAConfig
from gemma_lora.loss import Sweep
from gemma_lora.metrics import say
from gemma_lora.optim import optimizer
from gemma_lora.outliers import read_examples
from gemma_lora.sharding import batch_sharding, make_mesh, replicated, to_global
from gemma_lora.step import init_state, make_eval_step, make_train_step
from gemma_lora.weights.pretrained import build_model, load_base, open_weights

COLUMNS = ("id", "fold_loss", "fold_label")


def fold_of(example_id: str, folds: int, seed: int) -> int:
    """The fold of an example, from a hash of (seed, id): rows may come in any order."""
    digest = hashlib.sha256(f"fold/{seed}/{example_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % folds


def parts(train_set: Dataset, config: Any, folds: int) -> list[tuple[Dataset, Dataset]]:
    """(what fold k trains on, what it holds out) for every k; UserError where one is empty."""
    examples = train_set.examples
    if not 2 <= folds <= len(examples):
        raise UserError(f"--folds is {folds}, expected 2 to {len(examples)} training examples")
    whose = [fold_of(e.id, folds, config.seed) for e in examples]
    out = []
    for k in range(folds):
        kept = [e for e, fold in zip(examples, whose, strict=True) if fold != k]
        held = [e for e, fold in zip(examples, whose, strict=True) if fold == k]
        if not kept or not held:
            raise UserError(f"fold {k} of {folds} is empty: expected fewer --folds")
        rows, labels = train_set.shapes, train_set.label_tokens
        fit = dataset(kept, config, rows, labels, shuffle=True)
        out.append((fit, dataset(held, config, rows, labels, shuffle=False)))
    return out


def run(workdir: pathlib.Path, folds: int) -> dict[str, np.ndarray]:
    """Makes the folds that are missing; returns the columns of scores.parquet, in id order."""
    config = read_config(workdir)
    pretrained = open_weights(config.weights, config.arch, config.weights_sha256, config.tokenizer)
    wrap = LoRAConfig(**config.lora)
    if wrap.reads_base:
        raise UserError(
            f"the run's adapters, {wrap.variant} with init {wrap.init}, start from base weights: "
            "folds are made for plain LoRA"
        )
    mesh = make_mesh(config.mesh)
    model = build_model(pretrained.arch, config, wrap, mesh)
    train_set = load_data(config, pretrained.tokenizer(), pretrained.arch.vocab)[0]
    ids = [e["id"] for e in read_examples(workdir, "train")]
    if sorted(e.id for e in train_set.examples) != ids:
        raise UserError(f"the data has changed since the run in {workdir}")
    made = parts(train_set, config, folds)
    paths = [workdir / "folds" / f"{k}_of_{folds}.parquet" for k in range(folds)]
    base = None
    sweep = Sweep(**config.head)
    evaluating = jax.jit(
        make_eval_step(model, sweep, train_set.label_tokens), out_shardings=batch_sharding(mesh)
    )
    for k, ((fit, held), path) in enumerate(zip(made, paths, strict=True)):
        if path.exists():
            say(f"   fold {k} of {folds}: kept from {path}")
            continue
        if base is None:
            base = jax.block_until_ready(load_base(pretrained, model, mesh))
        total = fit.steps_per_epoch
        tx = optimizer(config.optim, total)
        state = init_state(model, tx, config.seed, mesh)
        step = jax.jit(
            make_train_step(model, tx, config.train.micro_batches, sweep, config.seed),
            donate_argnums=0,
            out_shardings=(jax.tree.map(lambda x: x.sharding, state), replicated(mesh)),
        )
        for batch in fit.batches(0, total):
            state, sums = step(state, base, to_global(batch.arrays, mesh))
        loss = float(np.sum(jax.device_get(sums["nll"])) / np.sum(jax.device_get(sums["tokens"])))
        if not np.isfinite(loss):
            raise UserError(f"fold {k} of {folds}: the loss is {loss} at step {total}")
        rows = evaluate.ledger_rows(evaluating, state.lora, base, held, mesh, "train", total)
        if jax.process_index() == 0:
            _write(path, _scores(rows, held))
        say(f"   fold {k} of {folds}: {total} steps, {len(held.examples)} examples held out")
    tables = [evaluate.read_table(path, COLUMNS) for path in paths]
    table = pyarrow.concat_tables(tables).sort_by("id")
    columns = {name: table[name].to_numpy() for name in COLUMNS}
    if columns["id"].tolist() != ids:
        raise UserError(f"{workdir / 'folds'} holds folds of other examples; remove it")
    if jax.process_index() == 0:
        _write(workdir / "folds" / "scores.parquet", columns)
    return columns


def _scores(rows: dict[str, np.ndarray], held: Dataset) -> dict[str, np.ndarray]:
    """A fold's columns: loss of the completion in nats a token; -log p of the label, or NaN."""
    each = zip(rows["token_nll"], held.examples, strict=True)
    loss = [np.mean(completion_part(x, e.prompt_targets), dtype=np.float64) for x, e in each]
    label = np.full(len(loss), np.nan)
    known = rows["label"] >= 0
    if known.any():
        p = rows["label_p"][known, rows["label"][known]]
        with np.errstate(divide="ignore"):
            label[known] = -np.log(p)
    return {"id": rows["id"], "fold_loss": np.array(loss), "fold_label": label}


def _write(path: pathlib.Path, columns: dict[str, np.ndarray]) -> None:
    with replace_file(path) as temporary:
        pyarrow.parquet.write_table(pyarrow.table(columns), temporary)


def read_config(workdir: pathlib.Path) -> ConfigDict:
    """The config of the run in a workdir; UserError where it is missing or of another version."""
    try:
        config = ConfigDict(json.loads((workdir / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError) as e:
        raise UserError(f"{workdir / 'config.json'} is missing or damaged: {e}") from e
    # JSON has no tuples.
    pairs = {k: tuple(v) for k, v in config.data.items() if isinstance(v, list)}
    config.data.update(pairs)
    for k in ("rank_pattern", "alpha_pattern"):
        config.lora[k] = tuple(map(tuple, config.lora[k]))
    check(config)
    return config


def main() -> None:
    parser = argparse.ArgumentParser(description="Out-of-fold losses of a run's examples.")
    parser.add_argument("--workdir", required=True, type=pathlib.Path)
    parser.add_argument("--folds", type=int, default=2)
    options = parser.parse_args()
    keep_compiled()
    columns = run(options.workdir, options.folds)
    say(f"{len(columns['id'])} examples scored out of fold: {options.workdir / 'folds'}")


if __name__ == "__main__":
    run_main(main)
