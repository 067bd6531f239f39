"""Evaluation: the command lines end to end, and its numbers against those of a run."""

import contextlib
import io
import json
import subprocess
import sys
import types

import numpy as np
import pytest
import tiny_run
from absl import flags
from common import read_json
from tiny_run import ledger, records, settings

from gemma_lora import evaluate
from gemma_lora.errors import UserError

CONFIG = """
from gemma_lora.config import default


def get_config():
    c = default()
    c.update_from_flattened_dict({values})
    return c
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    with tiny_run.quick_compilation(tmp_path_factory.mktemp("compiled")):
        yield tiny_run.write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def config_file(inputs, tmp_path_factory):
    values = {"arch": "auto", "weights": str(inputs), "dtype": "float32", "remat": "none"}
    values |= {"data.seq_len": 64, "data.batch_size": 4, "lora.rank": 4, "lora.targets": "qv"}
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text(CONFIG.format(values=values))
    return path


@pytest.fixture(scope="module")
def trained(inputs, tmp_path_factory):
    """The workdir of a run on train.jsonl, validated on validation.jsonl."""
    workdir = tmp_path_factory.mktemp("run")
    tiny_run.run(workdir, settings(inputs, {"train.patience": 0}))
    return workdir


def run_main(monkeypatch, config_file, *arguments) -> dict:
    """The JSON that evaluate prints last, run in this process."""
    monkeypatch.setattr(sys, "argv", ["evaluate", "--config", str(config_file), *arguments])
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        evaluate.main()
    return json.loads(out.getvalue().splitlines()[-1])
