"""Evaluation: the command lines end to end, and its numbers against those of the run."""

import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import tiny_run
from common import read_json
from tiny_run import settings

from gemma_lora import evaluate, sharding
from gemma_lora.errors import UserError

CONFIG = """
from gemma_lora.config import default


def get_config():
    c = default()
    c.update_from_flattened_dict({values})
    return c
"""


def command(module: str, *arguments: str) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", f"gemma_lora.{module}", *arguments]
    cache = {"XDG_CACHE_HOME": os.environ[tiny_run.COMPILED]}
    return subprocess.run(line, env=os.environ | cache, capture_output=True, text=True)


@pytest.fixture(scope="module")
def config(inputs):
    values = {"arch": "auto", "weights": str(inputs), "dtype": "float32", "remat": "none"}
    values |= {"data.seq_len": 64, "data.batch_size": 4, "lora.rank": 4, "lora.targets": "qv"}
    path = inputs / "config.py"
    path.write_text(CONFIG.format(values=values))
    return f"--config={path}"


@pytest.fixture(scope="module")
def trained(inputs, config, tmp_path_factory):
    """The workdir of a run of the command line."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    done = command(
        "train",
        config,
        f"--workdir={workdir}",
        f"--config.data.path={inputs / 'train.jsonl'}",
        f"--config.data.validation_path={inputs / 'validation.jsonl'}",
        "--config.optim.lr=0.005",
        "--config.train.max_steps=6",
        "--config.train.eval_every=3",
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # nothing that a user would have to wonder about
    assert f"report                 {workdir / 'report.html'}" in done.stdout
    return workdir


def validation(inputs: Path, changes: dict):
    return settings(inputs, {"data.path": str(inputs / "validation.jsonl")} | changes)


def test_adapter_gives_the_best_validation_loss_of_its_run(trained, inputs, config, tmp_path):
    done = command(
        "evaluate",
        config,
        f"--adapter={trained / 'adapter'}",
        f"--config.data.path={inputs / 'validation.jsonl'}",
        f"--out={tmp_path}",
    )
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout.splitlines()[-1])
    validation = read_json(trained / "report.json")["validation"]
    assert validation["loss"]["best"] < validation["loss"]["start"]
    assert math.isclose(found["loss"], validation["loss"]["best"], rel_tol=1e-6)
    assert found["token_accuracy"] == validation["token_accuracy"]["best"]
    assert found["examples"] == 6 and found["truncated"] == found["dropped"] == 0
    table = pyarrow.parquet.read_table(tmp_path / "ledger" / "eval_000000.parquet")
    assert table.column_names == list(evaluate.COLUMNS)
    assert found["tokens"] == sum(table["tokens"].to_pylist())
    assert found["loss"] == sum(table["nll"].to_pylist()) / found["tokens"]


def test_base_model_gives_step_0_packed_or_not(trained, inputs, tmp_path):
    first = tiny_run.records(trained, "eval")[0]
    tables = []
    for changes in ({}, {"data.pack": True, "data.seq_len": 128}):
        out = tmp_path / str(len(tables))
        found = evaluate.evaluate(validation(inputs, changes), out, None)
        assert math.isclose(found["loss"], first["validation/loss"], rel_tol=1e-6)
        tables.append(pyarrow.parquet.read_table(out / "ledger" / "eval_000000.parquet"))
    plain, packed = tables
    for column in ("id", "tokens", "correct"):
        assert plain[column] == packed[column]
    for column in ("nll", "nll_max", "margin", "el2n"):
        assert np.allclose(plain[column], packed[column], rtol=1e-4, atol=1e-5), column


def test_margin_and_el2n_are_of_the_completion(inputs, tmp_path):
    tables = []
    for loss_on in ("all", "completion"):
        evaluate.evaluate(validation(inputs, {"data.loss_on": loss_on}), tmp_path / loss_on, None)
        path = tmp_path / loss_on / "ledger" / "eval_000000.parquet"
        tables.append(pyarrow.parquet.read_table(path))
    whole, part = tables
    assert np.all(whole["tokens"].to_numpy() > part["tokens"].to_numpy())
    for column in ("margin", "el2n"):
        assert np.allclose(whole[column], part[column], rtol=1e-4, atol=1e-5), column


def test_every_token_that_carries_loss_has_its_text(trained):
    ledger = trained / "ledger"
    names = ["id", "split", "token_nll"]
    rows = pyarrow.parquet.read_table(ledger / "eval_000000.parquet", columns=names).to_pylist()
    losses = {(r["id"], r["split"]): r["token_nll"] for r in rows}
    seen = 0
    for e in pyarrow.parquet.read_table(ledger / "examples.parquet").to_pylist():
        text = "".join(e["pieces"][:-1])  # the last is the stop token
        assert e["text"].endswith(text) and len(text) > 4 and e["pieces"][-1] not in text
        if nll := losses.get((e["id"], e["split"])):
            assert len(nll) == len(e["pieces"])
            seen += 1
    assert seen > 4


def test_counts_what_is_cut_and_left_out(inputs, tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [("short", "1 + 1", "2"), ("cut", "1 + 1", "It is " + "2" * 60), ("out", "1" * 60, "1")]
    tiny_run.write_rows(path, [{"id": i, "question": q, "answer": a} for i, q, a in rows])
    changes = {"data.path": str(path), "data.loss_on": "completion"}
    found = evaluate.evaluate(settings(inputs, changes), tmp_path / "out", None)
    assert [found[k] for k in ("examples", "truncated", "dropped")] == [2, 1, 1]


@pytest.mark.parametrize(
    "out,adapter,changes,message",
    [
        ("{tmp}", "{tmp}/none", {}, "no PEFT adapter in .*none"),
        ("{run}", None, {}, "is the workdir of a training run"),
        ("{run}/report.md/x", None, {}, "cannot be used: Not a directory"),
        ("{tmp}", None, {"data.seq_len": 8, "data.loss_on": "completion"}, "data.seq_len"),
    ],
)
def test_bad_input(out, adapter, changes, message, trained, inputs, tmp_path):
    before = tiny_run.left(trained)
    out, adapter = (x and Path(x.format(tmp=tmp_path, run=trained)) for x in (out, adapter))
    with pytest.raises(UserError, match=message):
        evaluate.evaluate(validation(inputs, changes), out, adapter)
    assert tiny_run.left(trained) == before and not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.path": "{tmp}/rows.jsonl"}, "rows.jsonl does not exist"),
        ({"data.path": "{tmp}/rows.csv"}, "ending '.csv' is unknown"),
        (
            {"data.path": "", "data.source": "tfd:gsm8k"},
            "'tfd:gsm8k' is unknown, did you mean",
        ),
        ({}, "no PEFT adapter in .*none: adapter_config.json and adapter_model"),
    ],
)
def test_what_is_not_there_is_said_before_the_weights_are_looked_for(
    changes, message, inputs, tmp_path, monkeypatch
):
    monkeypatch.setattr(evaluate, "open_weights", None)
    changes = {k: v.format(tmp=tmp_path) for k, v in changes.items()}
    with pytest.raises(UserError, match=message):
        evaluate.evaluate(validation(inputs, changes), tmp_path / "out", tmp_path / "none")
    assert not any(tmp_path.iterdir())


def test_rows_that_the_devices_cannot_share():
    mesh = types.SimpleNamespace(shape={"data": 2, "fsdp": 2, "tensor": 1})
    sharding.check_rows(8, mesh)
    with pytest.raises(UserError, match=r"data.batch_size is 6, expected a multiple of 4"):
        sharding.check_rows(6, mesh)
    with pytest.raises(UserError, match=r"multiple of 16: .* train.micro_batches=4"):
        sharding.check_rows(8, mesh, 4)
