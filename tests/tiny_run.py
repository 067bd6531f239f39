"""Whole runs on a tiny model: its data, a config, a run in this process, and what a run left."""

import contextlib
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import common
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiny
import tiny_tokenizer
from jax.experimental.compilation_cache import compilation_cache

from gemma_lora import config, metrics, train
from gemma_lora.report import plots

COMPILED = "GEMMA_LORA_TESTS_COMPILED"  # names the directory of programs that the tests share


class KilledError(Exception):
    pass


@contextlib.contextmanager
def quick_compilation() -> Iterator[None]:
    """Compiles with few optimisations, and equal programs once in all processes of the tests."""
    try:
        with common.jax_settings(
            jax_compilation_cache_dir=os.environ[COMPILED],
            jax_compilation_cache_max_size=2**30,  # with a limit JAX locks what processes share
            jax_persistent_cache_min_compile_time_secs=0.1,
            jax_disable_most_optimizations=True,
        ):
            compilation_cache.reset_cache()  # JAX looks at its settings once
            yield
    finally:
        compilation_cache.reset_cache()


def write_inputs(directory: Path) -> Path:
    """A tiny model with its tokenizer, train.jsonl and validation.jsonl; returns the directory."""
    tiny.write_tiny("gemma", directory)
    tiny_tokenizer.write_tokenizer(directory)
    rows = [
        {"id": f"{a}+{b}", "question": f"{a} + {b}", "answer": f"It is {a + b}."}
        for a in range(4)
        for b in range(6)
    ]
    for name, part in (("train", rows[:18]), ("validation", rows[18:])):
        write_rows(directory / f"{name}.jsonl", part)
    return directory


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def settings(inputs: Path, changes: dict[str, Any] | None = None) -> Any:
    """Eight steps of four rows, evals at 0, 3, 6 and 8. changes: {'optim.lr': 1.0, ...}."""
    c = config.default()
    values = {
        "arch": "auto",
        "weights": str(inputs),
        "dtype": "float32",
        "remat": "none",
        "data.path": str(inputs / "train.jsonl"),
        "data.validation_path": str(inputs / "validation.jsonl"),
        "data.seq_len": 64,
        "data.batch_size": 4,
        "lora.rank": 4,
        "lora.targets": "qv",
        "optim.lr": 5e-3,
        "train.max_steps": 8,
        "train.eval_every": 3,
    }
    c.update_from_flattened_dict(values | (changes or {}))
    return c


def no_plots() -> contextlib.AbstractContextManager:
    """Leaves the report's plots out: they take longer than the steps."""
    blank = {"svg": lambda _: "data:,", "png": lambda _, path: path.touch()}
    return mock.patch.multiple(plots, **blank)


def run(workdir: Path, c: Any, drawn: bool = False) -> str:
    """Trains; returns what was printed. The report's plots are left out, but where `drawn`."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.nullcontext() if drawn else no_plots():
        train.train(c, workdir)
    return out.getvalue()


def on_every_record(monkeypatch, action: Callable[[dict[str, Any]], None]) -> None:
    """Calls `action` when a record is about to be written."""
    write = metrics.Metrics.write

    def patched(self, record, line):
        action(record)
        write(self, record, line)

    monkeypatch.setattr(metrics.Metrics, "write", patched)


def on_record(monkeypatch, kind: str, step: int, action: Callable[[], None]) -> None:
    """Calls `action` when the record of a step is about to be written."""
    on_every_record(monkeypatch, lambda r: (r["kind"], r["step"]) == (kind, step) and action())


def run_killed(workdir: Path, c: Any, kind: str, step: int) -> None:
    """Trains twice: the first start ends, unforeseen, when the record of a step is due."""

    def die():
        raise KilledError

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KilledError):
        on_record(patch, kind, step, die)
        run(workdir, c)
    run(workdir, c)


def records(workdir: Path, kind: str) -> list[dict[str, Any]]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == kind]


def ledger(workdir: Path, step: int, split: str) -> dict[str, np.ndarray]:
    table = pyarrow.parquet.read_table(workdir / "ledger" / f"eval_{step:06d}.parquet")
    columns = {k: table[k].to_numpy() for k in table.column_names}
    return {k: v[columns["split"] == split] for k, v in columns.items()}


def left(workdir: Path) -> dict[str, Any]:
    """All that a run left which must not depend on clock, memory or on how often it was started."""
    clocks = ("seconds", "step_seconds")
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    report = json.loads((workdir / "report.json").read_text())
    other = ("seconds", "earlier_seconds", "phases", "peak_memory")
    report["run"] = {k: v for k, v in report["run"].items() if k not in other}
    del report["cost"]
    files = [*workdir.glob("ledger/e*"), *workdir.glob("adapter/*")]
    # A start that was interrupted leaves a file of its own.
    seen = map(pyarrow.parquet.read_table, sorted(workdir.glob("ledger/seen_*")))
    return {
        "seen": pyarrow.concat_tables(seen).to_pylist(),
        "metrics": [{k: v for k, v in r.items() if k not in clocks} for r in lines],
        "report": report,
        **{str(f.relative_to(workdir)): f.read_bytes() for f in files},
    }
