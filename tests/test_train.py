"""Whole runs: what they leave, that they repeat and resume to the bit, and what they refuse."""

import concurrent.futures
import fcntl
import io
import math
import os
import shutil
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pyarrow.parquet
import pytest
import tiny_run
from common import one_device, read_json, tiny_arch
from safetensors.numpy import load_file, save_file
from tiny_run import ledger, left, on_record, records, settings

from gemma_lora import evaluate, outliers, train
from gemma_lora.data.pipeline import dataset, load_data
from gemma_lora.errors import UserError
from gemma_lora.loss import Sweep
from gemma_lora.metrics import Metrics
from gemma_lora.model import no_wrap
from gemma_lora.step import make_eval_step
from gemma_lora.weights import peft
from gemma_lora.weights.pretrained import build_model, load_base, open_weights


@pytest.fixture(scope="module")
def diverged(inputs, tmp_path_factory):
    """(workdir, message) of a run with another seed whose first update ruins the adapter."""
    workdir = tmp_path_factory.mktemp("runs") / "diverged"
    c = settings(
        inputs, {"seed": 1, "optim.lr": 3e38, "train.eval_every": 8, "train.save_every": 1}
    )
    with pytest.raises(UserError) as error:
        tiny_run.run(workdir, c)
    return workdir, str(error.value)


def adapter(workdir: Path) -> dict:
    return peft.read(workdir / "adapter", tiny_arch("gemma"))[1]


def checkpoint(workdir: Path, step: int) -> dict:
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(workdir / "checkpoints" / str(step) / "state")


def equal(x, y) -> bool:
    return jax.tree.all(jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), x, y))


def test_what_a_run_leaves(straight):
    workdir, _ = straight
    for name in ("config.json", "run.json", "report.md", "report.html", "checkpoints"):
        assert (workdir / name).exists(), name
    assert sorted(p.name for p in (workdir / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    evals = [f"eval_{step:06d}.parquet" for step in (0, 3, 6, 8)]
    seen = [f"seen_{step:06d}.parquet" for step in (3, 6, 8)]
    files = sorted(p.name for p in (workdir / "ledger").iterdir())
    assert files == [*evals, "examples.parquet", *seen]
    rest = [p.name for p in workdir.rglob("*") if p.name.startswith(".") or "tmp" in p.name]
    assert rest == [".lock"]
    steps = [r["step"] for r in records(workdir, "train")]
    assert steps == list(range(1, 9))
    report = read_json(workdir / "report.json")
    assert report["run"]["status"] == "finished" and report["run"]["steps"] == 8
    assert report["run"]["tokens"] == sum(r["tokens"] for r in records(workdir, "train"))
    assert report["run"]["seconds"] > 0
    assert report["model"]["arch"] == "gemma"
    seconds = report["run"]["phases"]
    waits = [seconds[f"steps: {part} a batch"] for part in ("wait for", "copy")]
    assert 0 < sum(waits) < seconds["steps"] < report["run"]["seconds"]
    assert 0 < seconds["save"] < report["run"]["seconds"] - seconds["steps"]
    stored = sum(x.size for x in jax.tree.leaves(adapter(workdir)))
    assert report["model"]["trainable_parameters"] == stored
    for split in ("train_probe", "validation"):
        loss = report[split]["loss"]
        assert loss["best"] < loss["start"] and loss["decrease_pct"] > 0
        assert {"start", "best"} <= report[split]["token_accuracy"].keys()
    assert report["validation"]["loss"]["interval"][1] < 0
    for o in report["outliers"]:
        assert "".join(o["pieces"]) == o["text"] + "<eos>" and len(o["token_nll"]) == o["tokens"]


def test_metrics_are_sums_of_the_ledger(straight):
    workdir, _ = straight
    for record in records(workdir, "eval"):
        for split in ("validation", "train_probe"):
            rows = ledger(workdir, record["step"], split)
            tokens, nll, correct = rows["tokens"], rows["nll"], rows["correct"]
            got = {k.removeprefix(f"{split}/"): v for k, v in record.items()}
            assert got["tokens"] == tokens.sum() and got["examples"] == len(tokens) == 6
            assert got["loss"] == nll.sum() / tokens.sum()
            assert got["token_accuracy"] == correct.sum() / tokens.sum()
            batches = [slice(0, 4), slice(4, 6)]
            means = [nll[b].sum() / tokens[b].sum() for b in batches]
            by_rows = (4 * means[0] + 2 * means[1]) / 6
            assert math.isclose(got["trl_compat/eval_loss"], by_rows, rel_tol=1e-12)
            shares = [correct[b].sum() / tokens[b].sum() for b in batches]
            assert got["trl_compat/eval_mean_token_accuracy"] == np.mean(shares)


def test_one_line_a_step(straight):
    lines = straight[1].splitlines()
    sections = [line.split()[1] for line in lines if line.startswith("==")]
    assert sections == ["model", "data", "step", "finished"]
    [told] = [line for line in lines if "before the first step" in line]
    assert "open weights" in told and "read data" in told
    [told] = [line for line in lines if "waiting for data" in line]
    assert "% of the steps'" in told
    told = [" ".join(line.split()[:2]) for line in lines if line.startswith(("step", "eval"))]
    order = [(s, kind) for s in range(9) for kind in ("step", "eval")]
    assert told == [f"{k} {s}/8" for s, k in order if s in (0, 3, 6, 8) or k == "step"][1:]
    assert max(map(len, lines)) <= 110


def test_progress_bar_does_not_break_lines(inputs, tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    metrics = Metrics(tmp_path, None, 3)
    line = "step 1/3  " + "x" * 100
    for step in (1, 2, 3):
        metrics.write({"kind": "train", "step": step, "loss": math.nan}, line)
    metrics.close()
    assert out.getvalue().count(f"{line}\n") == 3
    assert [r["loss"] for r in records(tmp_path, "train")] == [None] * 3


def test_same_seed_same_bits(straight, diverged, inputs, tmp_path):
    tiny_run.run(str(tmp_path / "again"), settings(inputs))
    assert left(tmp_path / "again") == left(straight[0])
    first = [records(w, "train")[0]["loss"] for w in (straight[0], diverged[0])]
    assert first[0] != first[1]


def test_logged_learning_rates_are_those_of_the_updates(straight, inputs):
    of = train.schedule(settings(inputs).optim, 8)
    got = [r["lr"] for r in records(straight[0], "train")]
    assert got == pytest.approx([float(of(step)) for step in range(8)], rel=1e-6)
    assert len(set(got)) > 1


def test_the_loop_computes_no_learning_rate(inputs, tmp_path, monkeypatch):
    """On the device it would wait for the step under way. The updates' own falls as the logged."""
    calls, planned = [], []
    schedule, optimizer = train.schedule, train.optimizer

    def of_the_run(optim, steps):
        planned.append(steps)
        return optimizer(optim, steps)

    def counted(*arguments):
        made = schedule(*arguments)
        return lambda step: calls.append(step) or made(step)

    monkeypatch.setattr(train, "schedule", counted)
    monkeypatch.setattr(train, "optimizer", of_the_run)
    tiny_run.run(tmp_path, settings(inputs))
    assert len(calls) == 1 and calls[0].shape == (8,)
    assert planned == [8]


def give_losses(monkeypatch, losses):
    """The validation losses of the evals to come."""
    true_metrics = evaluate.metrics

    def metrics(rows, batch_size):
        found = true_metrics(rows, batch_size)
        return found | ({"loss": next(losses)} if rows["split"][0] == "validation" else {})

    monkeypatch.setattr(evaluate, "metrics", metrics)


def test_early_stopping_counts_evals_and_keeps_the_best(inputs, tmp_path, monkeypatch):
    # Of the evals; equal is not better.
    give_losses(monkeypatch, iter([5.0, 4.0, 3.0, 3.0, 3.5]))
    c = settings(inputs, {"train.eval_every": 1, "train.patience": 2})
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        on_record(patch, "train", 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        tiny_run.run(tmp_path, c)
    out = tiny_run.run(tmp_path, c)
    assert "2 without a better one" in out
    run = read_json(tmp_path / "run.json")
    assert (run["status"], run["steps"], run["best_step"]) == ("stopped early", 4, 2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "4"]
    best, last = (checkpoint(tmp_path, step)["lora"] for step in (2, 4))
    assert equal(adapter(tmp_path), best) and not equal(best, last)


def test_a_look_of_the_ledger_stops_no_run_and_the_last_step_is_looked_at(
    inputs, tmp_path, monkeypatch
):
    losses = iter([5.0, 4.0, 4.5, 1.0, 4.5])  # of steps 0, 2, 4, 5, which is a look alone, and 6
    give_losses(monkeypatch, losses)
    changes = {"train.eval_every": 2, "train.ledger_every": 5, "train.patience": 2}
    tiny_run.run(tmp_path, settings(inputs, changes))
    run = read_json(tmp_path / "run.json")
    assert (run["status"], run["steps"], run["best_step"]) == ("stopped early", 6, 2)
    assert outliers.read_ledger(tmp_path).steps == [0, 5, 6]


def test_not_finite_stops_and_says_where(diverged):
    workdir, message = diverged
    run = read_json(workdir / "run.json")
    assert run["status"] == "nan" and run["steps"] == 2
    ids = run["nan"]["ids"]
    assert len(ids) == 4 and all(i in message for i in ids)
    assert "at step 2" in message and message.endswith("the adapter is that of step 0")
    assert (workdir / "report.md").exists()
    assert not any(np.any(leaves["b"]) for leaves in adapter(workdir)["layers"]["attn"].values())
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["0", "1"]
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(checkpoint(workdir, 1)))


def test_base_weights_that_are_not_finite(inputs, tmp_path, monkeypatch):
    def poisoned(*args):
        base = load_base(*args)
        return base | {"embed": jax.tree.map(lambda w: w.at[4:].set(math.nan), base["embed"])}

    monkeypatch.setattr(train, "load_base", poisoned)
    named = r"at step 0, .* and 4 more; no adapter was written. The base weights embed/w are not"
    with pytest.raises(UserError, match=named):
        tiny_run.run(tmp_path, settings(inputs))
    assert read_json(tmp_path / "run.json")["status"] == "nan"
    assert read_json(tmp_path / "report.json")["validation"]["loss"]["start"] is None


def test_an_eval_with_a_loss_that_is_not_finite_is_not_the_best(inputs, tmp_path, monkeypatch):
    """Here of an example of the probe: the validation loss is finite, and the smallest so far."""
    splits = []

    def not_finite(rows):
        splits.append(rows["split"][0])
        return list(rows["id"][:1]) if splits.count("train_probe") == 2 else []

    monkeypatch.setattr(evaluate, "not_finite", not_finite)
    with pytest.raises(UserError, match=r"at step 3, .*the adapter is that of step 0"):
        tiny_run.run(tmp_path, settings(inputs))
    first, second = (r["validation/loss"] for r in records(tmp_path, "eval"))
    assert second < first and read_json(tmp_path / "run.json")["best_step"] == 0


def test_a_run_in_another_thread(straight, inputs, tmp_path):
    """Which hears no signals; when it has ended its workdir is free."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        pool.submit(tiny_run.run, tmp_path / "run", settings(inputs)).result()
    assert left(tmp_path / "run") == left(straight[0])
    with (tmp_path / "run" / ".lock").open() as f:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_workdir_of_another_run(straight, inputs):
    before = left(straight[0])
    with pytest.raises(UserError, match=r"lora.rank: 2 here, 4 there.*seed: 5 here, 0 there"):
        tiny_run.run(straight[0], settings(inputs, {"lora.rank": 2, "seed": 5}))
    assert left(straight[0]) == before


def test_data_or_weights_that_changed_since_the_run_began(straight, inputs, tmp_path):
    workdir, other = tmp_path / "run", tmp_path / "inputs"
    shutil.copytree(inputs, other)
    c = settings(other)
    shutil.copytree(straight[0], workdir)
    (workdir / "config.json").write_text(c.to_json())
    path = other / "validation.jsonl"
    path.write_text(path.read_text().replace("It is", "That is"))
    with pytest.raises(UserError, match="the data are no longer those of the run in"):
        tiny_run.run(workdir, c)
    shutil.copy(inputs / "validation.jsonl", path)
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 0] += 1e-3
    save_file(tensors, other / "model.safetensors")
    with pytest.raises(UserError, match="the weights are no longer those of the run in"):
        tiny_run.run(workdir, c)
    assert left(workdir) == left(straight[0])


def test_damaged_checkpoint(straight, inputs, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(straight[0], workdir)
    (workdir / "checkpoints" / "8" / "state" / "_METADATA").unlink()
    with pytest.raises(UserError, match="checkpoints/8 cannot be restored"):
        tiny_run.run(workdir, settings(inputs))
    shutil.rmtree(workdir / "checkpoints" / "8")  # as the message says; there is no earlier one
    tiny_run.run(workdir, settings(inputs))
    assert left(workdir) == left(straight[0])


@pytest.mark.once
def test_buckets(inputs, tmp_path, monkeypatch):
    """One program a row length and kind of step, compiled before the first step; the losses of
    step 0 are those without buckets; killed and rerun equals straight."""
    path = tmp_path / "train.jsonl"
    rows = [
        {"id": f"r{n}", "question": "1" * (n % 3 * 12 + 1), "answer": "2" * (n % 5)}
        for n in range(24)
    ]
    tiny_run.write_rows(path, rows)
    c = settings(inputs, {"data.path": str(path), "data.buckets": (32, 48), "lora.dropout": 0.0})
    names, ahead = [], []

    def listener(event, seconds, **facts):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(str(facts.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(listener)
    on_record(monkeypatch, "eval", 0, lambda: ahead.extend(names))
    out = tiny_run.run(tmp_path / "straight", c)
    jax.monitoring.unregister_event_duration_listener(listener)
    pretrained = open_weights(c.weights, c.arch)
    sets = load_data(c, pretrained.tokenizer(), pretrained.arch.vocab)[:3]
    used = [list(data.steps_by_length()) for data in sets]
    assert used[0] == [32, 48, 64] and "for 3 row lengths" in out
    steps = len(used[0]) + len({*used[1], *used[2]})
    for found in (ahead, names):
        assert sum("step" in name for name in found) == steps, found
    plain = settings(inputs, {"data.path": str(path), "lora.dropout": 0.0, "train.max_steps": 1})
    tiny_run.run(tmp_path / "plain", plain)
    for split in ("validation", "train_probe"):
        one, two = (ledger(tmp_path / w, 0, split) for w in ("straight", "plain"))
        assert one["id"].tolist() == two["id"].tolist()
        assert np.allclose(one["nll"], two["nll"], rtol=1e-5)

    tiny_run.run_killed(tmp_path / "run", c, "train", 5)
    assert left(tmp_path / "run") == left(tmp_path / "straight")


def test_packed_micro_batches(inputs, tmp_path, monkeypatch):
    """It learns, compiles nothing after the second step, and TRL's accuracy is that of the rows."""
    changes = {"data.pack": True, "data.seq_len": 128, "lora.dropout": 0.0}
    c = settings(inputs, changes | {"train.micro_batches": 2})
    events = []

    def listener(event, seconds, **facts):
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(facts)

    jax.monitoring.register_event_duration_secs_listener(listener)
    on_record(monkeypatch, "train", 2, events.clear)
    on_record(monkeypatch, "eval", 8, lambda: events.append("end"))
    tiny_run.run(tmp_path, c)
    jax.monitoring.unregister_event_duration_listener(listener)
    assert events[0] == "end"
    first, *_, last = [r["validation/loss"] for r in records(tmp_path, "eval")]
    assert last < first

    # The adapter is zero in the first step: its numbers are those of the base model.
    pretrained = open_weights(c.weights, c.arch)
    train_set = load_data(c, pretrained.tokenizer(), pretrained.arch.vocab)[0]
    model, mesh = build_model(pretrained.arch, c, no_wrap), one_device()
    step = jax.jit(make_eval_step(model, Sweep(c.head.chunk)))
    fixed = dataset(train_set.examples, c, train_set.shapes, (), shuffle=False)
    base = load_base(pretrained, model, mesh)
    rows = evaluate.ledger_rows(step, {}, base, fixed, mesh, "train", 0)
    batch = train_set.plan(0)[:4]
    assert max(map(len, batch)) > 1
    halves = [[i for row in batch[k::2] for i in row] for k in (0, 1)]
    shares = [rows["correct"][h].sum() / rows["tokens"][h].sum() for h in halves]
    record = records(tmp_path, "train")[0]
    assert math.isclose(record["trl_compat/mean_token_accuracy"], np.mean(shares), rel_tol=1e-6)
    members = [i for half in halves for i in half]
    seen = pyarrow.parquet.read_table(tmp_path / "ledger" / "seen_000003.parquet").to_pylist()
    seen = {r["id"]: r for r in seen if r["step"] == 1}
    assert seen.keys() == {train_set.examples[i].id for i in members}
    for i in members:
        e = train_set.examples[i]
        nll = rows["token_nll"][i][e.prompt_targets :].astype(np.float64)
        assert e.prompt_targets > 0 and len(nll) == seen[e.id]["tokens"]
        got = [seen[e.id][k] for k in ("nll", "nll_max")]
        np.testing.assert_allclose(got, [nll.sum(), nll.max()], rtol=1e-5)
    tokens, nll = (rows[k][members].sum() for k in ("tokens", "nll"))
    assert record["loss_tokens"] == tokens
    assert math.isclose(record["loss"], nll / tokens, rel_tol=1e-5)
