"""What a run left in its workdir, read and checked; a run that was killed left less."""

import dataclasses
import pathlib
from typing import Any

import numpy as np
import pyarrow.compute
import pyarrow.parquet

from gemma_lora.errors import UserError
from gemma_lora.evaluate import column_names, label_is_likeliest, read_table
from gemma_lora.workdir import ledger_files, read_config, read_records

SPLITS = ("validation", "train_probe")
MODEL = ("arch", "weights", "trainable_parameters", "base_parameters", "adapted_modules")
RUN = (
    "status",
    "steps",
    "best_step",
    "steps_planned",
    "steps_per_epoch",
    "tokens",
    "seconds",
    "examples",
)
CONFIG = ("data.loss_on", "data.labels", "optim.schedule", "train.eval_every")
STEP = ("step", "loss", "lr", "grad_norm", "tokens", "step_seconds")  # of a train line


@dataclasses.dataclass(frozen=True)
class Eval:
    """One eval: by split, the columns of `_eval` [examples], in id order.

    label_p is [examples, labels]: no labels, no columns. whole: it took all training examples, too.
    """

    step: int
    rows: dict[str, dict[str, np.ndarray]]
    whole: bool

    def mean(self, split: str, column: str) -> float:
        """Per token: 'nll' -> loss, 'correct' -> token accuracy."""
        return float(self.rows[split][column].sum() / self.rows[split]["tokens"].sum())

    def right(self, split: str) -> np.ndarray:
        """Per labelled example: is its own label the most probable one."""
        rows = self.rows[split]
        return label_is_likeliest(rows)[rows["label"] >= 0]

    def not_finite(self) -> list[str]:
        found = (r["id"][~np.isfinite(r["nll"])] for r in self.rows.values())
        return [i for ids in found for i in ids]


@dataclasses.dataclass(frozen=True)
class Workdir:
    """What a run left behind. evals are in the order of their steps, the first is step 0."""

    path: pathlib.Path
    config: dict[str, Any]
    run: dict[str, Any]
    train: dict[str, np.ndarray]  # STEP [train lines]; NaN where absent or not finite
    cut: bool  # the last line of metrics.jsonl was cut short
    lines: dict[int, dict[str, Any]]  # eval lines of metrics.jsonl by step
    evals: list[Eval]
    examples: dict[str, dict[str, dict[str, Any]]]  # by split and id: text, completion, length, ...
    has_pieces: bool  # the ledger holds the text of each loss token

    def token_losses(self, split: str, step: int, ids: list[str]) -> dict[str, np.ndarray]:
        """id -> the loss of each of its loss tokens at an eval."""
        path = self.path / "ledger" / f"eval_{step:06d}.parquet"
        return _chosen(path, split, ids, "token_nll")

    def pieces(self, split: str, ids: list[str]) -> dict[str, np.ndarray]:
        """id -> the text of each of its loss tokens; {} where the ledger has none."""
        path = self.path / "ledger" / "examples.parquet"
        return _chosen(path, split, ids, "pieces") if self.has_pieces else {}


def read(workdir: pathlib.Path) -> Workdir:
    """Raises UserError naming the file that is missing, damaged or at odds with the others."""
    config = read_config(workdir, CONFIG)
    [run], _ = read_records(workdir / "run.json", (*MODEL, *RUN))
    lines: dict[str, dict[int, Any]] = {"train": {}, "eval": {}}
    records, cut = read_records(workdir / "metrics.jsonl", ("kind", "step"))
    for record in records:
        lines.setdefault(record["kind"], {})[record["step"]] = record
    each = [lines["train"][step] for step in sorted(lines["train"])]
    train = {k: np.array([r.get(k) for r in each], float) for k in STEP}  # None becomes NaN
    ledger = workdir / "ledger"
    first = _eval(0, ledger / "eval_000000.parquet", None)
    evals = [_eval(step, p, first) for step, p in ledger_files(workdir, "eval").items()]
    if run["best_step"] not in (None, *(e.step for e in evals)):
        path = ledger / f"eval_{run['best_step']:06d}.parquet"
        raise UserError(f"{path} is missing: it is the best eval by run.json")
    path = ledger / "examples.parquet"
    names = ("id", "split", "text", "completion", "length", "prompt_targets")
    examples: dict[str, dict[str, Any]] = {s: {} for s in (*SPLITS, "train")}
    for e in read_table(path, names).to_pylist():
        examples.setdefault(e["split"], {})[e["id"]] = e
    for missing in set(first.rows["validation"]["id"]) - examples["validation"].keys():
        raise UserError(f"{path}: no text of validation example {missing!r}")
    has_pieces = "pieces" in column_names(path)
    return Workdir(workdir, config, run, train, cut, lines["eval"], evals, examples, has_pieces)


def _eval(step: int, path: pathlib.Path, first: Eval | None) -> Eval:
    names = ("id", "split", "tokens", "nll", "nll_max", "correct", "label", "label_p")
    table = read_table(path, names).sort_by("id")
    whole = pyarrow.compute.any(pyarrow.compute.equal(table["split"], "train")).as_py()
    table = table.filter(pyarrow.compute.is_in(table["split"], pyarrow.array(SPLITS)))
    columns = {k: table[k].to_numpy() for k in names[:-1]}
    columns["label_p"] = np.array(table["label_p"].to_pylist(), float).reshape(len(table), -1)
    rows = {s: {k: v[columns["split"] == s] for k, v in columns.items()} for s in SPLITS}
    for split, found in rows.items():
        if not len(found["id"]) or found["tokens"].min() < 1:
            raise UserError(f"{path}: no {split} rows, or one without tokens")
        for name in ("id", "tokens") if first else ():
            if not np.array_equal(found[name], first.rows[split][name]):
                raise UserError(f"{path}: {split} {name} differ from those of eval_000000.parquet")
    return Eval(step, rows, bool(whole))


def _chosen(path: pathlib.Path, split: str, ids: list[str], column: str) -> dict[str, np.ndarray]:
    table = read_table(path, ("id", "split", column))
    table = table.filter(pyarrow.compute.equal(table["split"], split))
    table = table.filter(pyarrow.compute.is_in(table["id"], pyarrow.array(ids, pyarrow.string())))
    return dict(zip(table["id"].to_pylist(), table[column].to_numpy(), strict=True))
