"""Runs that end before their time: what is saved, and that the same command goes on to the bit."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_run
from common import read_json
from tiny_run import left, on_every_record, on_record, settings

from gemma_lora import evaluate, manifest, reopen
from gemma_lora.checkpoint import Checkpoints
from gemma_lora.errors import UserError


def test_rerun_of_a_finished_run_changes_nothing(straight, inputs, tmp_path):
    workdir = tmp_path / "copy"
    shutil.copytree(straight[0], workdir)
    before = left(workdir)
    assert "continuing from the checkpoint of step 8" in tiny_run.run(workdir, settings(inputs))
    assert left(workdir) == before


@pytest.mark.parametrize("kind,step", [("train", 1), ("eval", 6)])
def test_killed_and_rerun_equals_straight(kind, step, straight, inputs, tmp_path):
    tiny_run.run_killed(tmp_path / "run", settings(inputs), kind, step)
    assert left(tmp_path / "run") == left(straight[0])
    cost = json.loads((tmp_path / "run" / "report.json").read_text())["cost"]
    assert cost["continued"]  # also where the first start left no checkpoint
    assert not json.loads((straight[0] / "report.json").read_text())["cost"]["continued"]


@pytest.mark.parametrize(
    "changes",
    [
        {"lora.variant": "dora", "lora.init": "pissa", "lora.rank_pattern": (("v_proj", 2),)},
        {"lora.variant": "dora", "quantize": "int8"},
    ],
    ids=["dora of pissa", "dora on int8"],
)
def test_adapters_that_read_the_base(changes, inputs, tmp_path):
    """Killed and rerun equals straight; the exported adapter is what was evaluated last."""
    c = settings(inputs, changes | {"optim.b_lr_ratio": 4.0})
    tiny_run.run(tmp_path / "straight", c)

    tiny_run.run_killed(tmp_path / "run", c, "train", 5)
    assert left(tmp_path / "run") == left(tmp_path / "straight")
    c.data.path = c.data.validation_path
    found = evaluate.evaluate(c, tmp_path / "out", tmp_path / "run" / "adapter")
    loss = read_json(tmp_path / "run" / "report.json")["validation"]["loss"]
    assert loss["best"] < loss["start"] - 0.1
    assert math.isclose(found["loss"], loss["best"], rel_tol=1e-5)


SIGKILL = """
import os, pathlib, signal, sys
sys.path.insert(0, sys.argv[1])
import tiny_run
from gemma_lora.metrics import Metrics
write = Metrics.write
def patched(self, record, line):
    if record["kind"] == "train" and record["step"] == 7:
        self._file.write('{"kind": "train", "st')  # a line cut short
        self._file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, record, line)
Metrics.write = patched
with tiny_run.quick_compilation():
    tiny_run.run(pathlib.Path(sys.argv[3]), tiny_run.settings(pathlib.Path(sys.argv[2])))
"""


def test_sigkill_and_rerun_equals_straight(straight, inputs, tmp_path):
    """A save may be under way when the process dies."""
    workdir = tmp_path / "run"
    arguments = [str(Path(__file__).parent), str(inputs), str(workdir)]
    done = subprocess.run([sys.executable, "-c", SIGKILL, *arguments], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    (workdir / "checkpoints" / "7.orbax-checkpoint-tmp").mkdir()  # what a dying save leaves
    tiny_run.run(workdir, settings(inputs))
    assert left(workdir) == left(straight[0])
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["8"]


def test_sigterm_saves_and_rerun_equals_straight(straight, inputs, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit_:
        on_record(patch, "train", 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
        tiny_run.run(workdir, settings(inputs))
    assert exit_.value.code == 130
    run = read_json(workdir / "run.json")
    assert run["status"] == "interrupted" and run["steps"] == 5
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert "step 5" in tiny_run.run(workdir, settings(inputs))
    assert left(workdir) == left(straight[0])


@pytest.mark.parametrize("step", [0, 3, 8])
def test_sigterm_during_an_evaluation_saves_the_step(straight, inputs, tmp_path, monkeypatch, step):
    """Its steps are not made again, the evaluation is; of its first half nothing is kept."""
    workdir = tmp_path / "run"
    evals = iter([0, 3, 6, 8])
    true_metrics = evaluate.metrics

    def metrics(rows, batch_size):  # between the two sets
        if rows["split"][0] == "validation" and next(evals) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return true_metrics(rows, batch_size)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit_:
        patch.setattr(evaluate, "metrics", metrics)
        tiny_run.run(workdir, settings(inputs))
    assert exit_.value.code == 130
    run = read_json(workdir / "run.json")
    assert (run["status"], run["steps"]) == ("interrupted", step)
    assert str(step) in [p.name for p in (workdir / "checkpoints").iterdir()]
    assert not (workdir / "ledger" / f"eval_{step:06d}.parquet").exists()
    made = []
    with monkeypatch.context() as patch:
        on_every_record(patch, lambda r: made.append((r["kind"], r["step"])))
        tiny_run.run(workdir, settings(inputs))
    assert made[0] == ("eval", step) and ("train", step) not in made
    assert left(workdir) == left(straight[0])
    opened = reopen.reopen(workdir, "best")
    assert reopen.restored(opened, workdir, "best", reopen.load(opened))[0] == 8
    if step == 8:  # which every later start of this run evaluates again
        evals, told = iter([8]), (workdir / "run.json").read_text()
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(evaluate, "metrics", metrics)
            tiny_run.run(workdir, settings(inputs))
        assert (workdir / "run.json").read_text() == told and next(evals, None) is None


def test_starts_with_other_code_are_told_apart(inputs, tmp_path, monkeypatch):
    """The report says which commit made which steps; a start that makes none changes nothing."""
    workdir = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(manifest, "commit", lambda root: "first")
        on_record(patch, "train", 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
        tiny_run.run(workdir, settings(inputs))
    run = read_json(workdir / "run.json")
    most = {"host": 10 * run["peak_memory"]["host"], "device": None}
    (workdir / "run.json").write_text(json.dumps(run | {"peak_memory": most}))
    monkeypatch.setattr(manifest, "commit", lambda root: "second")
    tiny_run.run(workdir, settings(inputs))
    run = read_json(workdir / "run.json")
    assert run["commit"] == "second"
    assert [(e["steps"], e["commit"]) for e in run["earlier"]] == [(5, "first")]
    assert run["peak_memory"] == most
    monkeypatch.setattr(manifest, "commit", lambda root: "third")
    tiny_run.run(workdir, settings(inputs))
    assert read_json(workdir / "run.json") == run
    assert '"first"' in (workdir / "report.md").read_text()


def test_no_room_for_a_checkpoint_is_said(tmp_path, monkeypatch):
    """The words are tensorstore's, which has no error of its own for it."""
    checkpoints = Checkpoints(tmp_path)

    def full(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: Error writing local file: No space left on device")

    monkeypatch.setattr(checkpoints._manager, "save", full)
    with pytest.raises(UserError, match=f"{tmp_path}: no space is left for a checkpoint; make"):
        checkpoints.save(1, {"x": np.ones(3)}, {"best_step": None})
    checkpoints.close()
