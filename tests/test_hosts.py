"""Two processes with four devices each are one run: its numbers, its end, and how it goes on."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_run
from common import read_json
from tiny_run import left, records

from gemma_lora import distributed, evaluate
from gemma_lora.data.pipeline import load_data
from gemma_lora.weights.pretrained import open_weights

HEARTBEAT = 20  # seconds
HERE = Path(__file__).parent

# A run of tiny_run whose process `who` gets a signal when a train record is due; what each process
# read of the training examples, by step, is left in a file.
TRAIN = """
import faulthandler, json, os, pathlib, sys
import jax
import tiny_run
from gemma_lora import distributed, train
from gemma_lora.data.dataset import Dataset
from gemma_lora.metrics import Metrics

faulthandler.dump_traceback_later(540, exit=True)  # says where it hangs, if it does
inputs, workdir, changes, at, who, number = json.loads(sys.argv.pop(1))
write, batch_at = Metrics.write, Dataset.batch_at
found = {}

class Read(list):
    def __getitem__(self, i):
        found[self.step].add(int(i))
        return super().__getitem__(i)

def patched_batch_at(self, step):
    if not self._shuffle:
        return batch_at(self, step)
    self.examples = Read(self.examples)
    self.examples.step = step
    found[step] = set()
    return batch_at(self, step)

def patched_write(self, record, line):
    if (record["kind"], record["step"]) == ("train", at) and jax.process_index() == who:
        os.kill(os.getpid(), number)
    write(self, record, line)

def main():
    Metrics.write, Dataset.batch_at = patched_write, patched_batch_at
    with tiny_run.quick_compilation(), tiny_run.no_plots():
        train.train(tiny_run.settings(pathlib.Path(inputs), changes), pathlib.Path(workdir))
    read = {step: sorted(indices) for step, indices in found.items()}
    pathlib.Path(f"{workdir}.read{jax.process_index()}").write_text(json.dumps(read))

distributed.run(main)
"""


def start(script: str, arguments: list[str], flags: list[str], devices: int) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments, *flags],
        env={
            **os.environ,
            # The usual 40 s for a collective are short where other work shares the cores.
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} "
            "--xla_cpu_collective_timeout_seconds=500 "
            "--xla_cpu_collective_call_terminate_timeout_seconds=500",
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.pathsep.join((str(HERE), str(HERE.parent))),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def last_line(output: str) -> str:
    """Of ours: Gloo has a buffer of its own, which may come out as the process ends."""
    return [x for x in output.splitlines() if not x.startswith("[Gloo]")][-1]


def together(script: str, arguments: list[list[str]]) -> list[tuple[int, str, float]]:
    """(exit status, output, seconds since process 1 was gone) of two processes."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    flags = ["--coordinator", f"127.0.0.1:{port}", "--processes=2"]
    flags += [f"--heartbeat_timeout={HEARTBEAT}"]
    made = [start(script, a, [*flags, f"--process={i}"], 4) for i, a in enumerate(arguments)]
    with ThreadPoolExecutor() as pool:  # a full pipe stops who writes to it
        try:
            (first, end), (second, gone) = pool.map(last_words, made)
        finally:
            for p in made:
                p.kill()
    texts = (first, second)
    return [(p.returncode, text, end - gone) for p, text in zip(made, texts, strict=True)]


def last_words(process: subprocess.Popen) -> tuple[str, float]:
    return process.communicate(timeout=600)[0], time.monotonic()


MESH = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
CHANGES = {"data.batch_size": 8, "train.save_every": 1}


def two(inputs, workdir, at=0, who=0, number=0) -> list[tuple[int, str, float]]:
    one = [str(inputs), str(workdir), CHANGES | MESH, at, who, number]
    return together(TRAIN, [[json.dumps(one)]] * 2)


@pytest.fixture(scope="module")
def straight(inputs, tmp_path_factory):
    """The workdir of two processes that nothing disturbs."""
    workdir = tmp_path_factory.mktemp("runs") / "straight"
    for status, output, _ in two(inputs, workdir):
        assert status == 0, output[-3000:]
    return workdir


def close(a: Path, b: Path) -> None:
    """All losses of two runs are the same, within the rounding of sums in another order."""
    for kind, name in (
        ("train", "loss"),
        ("eval", "validation/loss"),
        ("eval", "train_probe/loss"),
    ):
        one, other = ([(r["step"], r[name]) for r in records(w, kind)] for w in (a, b))
        assert len(one) == len(other) > 3
        assert np.allclose(one, other, rtol=1e-5, atol=0), (kind, name)


def test_two_processes_are_one_run(straight, inputs, tmp_path):
    """The losses of one process with one device; each process touches the examples of its rows."""
    c = tiny_run.settings(inputs, CHANGES)
    tiny_run.run(tmp_path / "one", c)
    close(straight, tmp_path / "one")
    for name in ("train", "eval"):
        counts = [[r.get("tokens") for r in records(w, name)] for w in (straight, tmp_path / "one")]
        assert counts[0] == counts[1]
    pretrained = open_weights(c.weights, c.arch)
    train_set = load_data(c, pretrained.tokenizer(), pretrained.arch.vocab)[0]
    for process, rows in enumerate((slice(0, 4), slice(4, 8))):
        read = read_json(straight.parent / f"straight.read{process}")
        assert [int(step) for step in read] == list(range(8))
        for step, indices in read.items():
            epoch, i = divmod(int(step), train_set.steps_per_epoch)
            mine = train_set.plan(epoch)[8 * i : 8 * i + 8][rows]
            assert indices == sorted(m for row in mine for m in row)


@pytest.mark.once
def test_a_lost_process_stops_the_other_and_the_run_goes_on(straight, inputs, tmp_path):
    """SIGKILL, then SIGTERM, each on one of two processes: the end is that of a straight run, to
    the bit; and within rounding where one process with eight devices takes over."""
    run = tmp_path / "run"
    (status, output, seconds), (killed, other, _) = two(
        inputs, run, at=3, who=1, number=signal.SIGKILL
    )
    assert killed == -signal.SIGKILL, output[-3000:] + other[-3000:]
    assert seconds < 5 * HEARTBEAT
    assert status == distributed.LOST, output[-3000:]
    assert last_line(output).startswith("error: process 0 of 2 stops: another process")
    assert not (run / "report.json").exists()
    shutil.copytree(run, tmp_path / "eight")

    ended = two(inputs, run, at=5, who=1, number=signal.SIGTERM)
    assert [status for status, *_ in ended] == [130, 130], ended[0][1][-3000:]
    assert "continuing from the checkpoint of step" in ended[0][1]
    told = read_json(run / "run.json")
    assert told["status"] == "interrupted" and told["steps"] == 6
    assert [status for status, *_ in two(inputs, run)] == [0, 0]
    assert left(run) == left(straight)

    one = [str(inputs), str(tmp_path / "eight"), CHANGES, 0, 0, 0]
    alone = start(TRAIN, [json.dumps(one)], [], 8)
    output = alone.communicate(timeout=600)[0]
    assert alone.returncode == 0, output[-3000:]
    assert "continuing from the checkpoint of step" in output and "fsdp=8" in output
    close(straight, tmp_path / "eight")


EVALUATE = """
import json, pathlib, sys
import tiny_run
from gemma_lora import distributed, evaluate

inputs, out, changes = json.loads(sys.argv.pop(1))

def main():
    with tiny_run.quick_compilation():
        config = tiny_run.settings(pathlib.Path(inputs), changes)
        print(json.dumps(evaluate.evaluate(config, pathlib.Path(out), None)))

distributed.run(main)
"""


def test_an_evaluation_by_two_processes_is_that_of_one(inputs, tmp_path):
    changes = CHANGES | {"data.path": str(inputs / "validation.jsonl")}
    job = json.dumps([str(inputs), str(tmp_path / "two"), changes | MESH])
    ended = together(EVALUATE, [[job]] * 2)
    assert [status for status, *_ in ended] == [0, 0], ended[0][1][-3000:] + ended[1][1][-3000:]
    first, second = (json.loads(last_line(output)) for _, output, _ in ended)
    assert first == second
    one = evaluate.evaluate(tiny_run.settings(inputs, changes), tmp_path / "one", None)
    assert first["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert (first["tokens"], first["examples"]) == (one["tokens"], one["examples"])
    both = [tiny_run.ledger(tmp_path / name, 0, "eval") for name in ("one", "two")]
    assert np.allclose(both[0]["nll"], both[1]["nll"], rtol=1e-5)


# Every mesh gets the rows it should, whichever devices are neighbours; then a disagreement.
AGREE = """
import sys
import jax, numpy as np
from gemma_lora import distributed
from gemma_lora.sharding import make_mesh, replicated, rows_here, to_global

mine = sys.argv.pop(1)

def main():
    i, whole = jax.process_index(), np.arange(48.0).reshape(16, 3)
    mixed = [d for pair in zip(jax.devices()[:4], jax.devices()[4:]) for d in pair]
    held = []
    for devices in (jax.devices(), mixed):
        for sizes in ((8, 1, 1), (2, 2, 2), (1, 1, 8)):
            mesh = make_mesh(dict(zip(("data", "fsdp", "tensor"), sizes)), devices)
            rows = rows_here(16, mesh)
            x = to_global({"x": whole[rows]}, mesh)["x"]
            again = jax.jit(lambda x: x, out_shardings=replicated(mesh))(x)
            assert np.array_equal(np.asarray(again), whole)
            held.append(rows.tolist())
    some = [list(range(8 * i, 8 * i + 8)), [r for r in range(16) if r // 2 % 2 == i]]
    all_ = list(range(16))
    assert held == [some[0], some[0], all_, some[1], all_, all_], held
    assert distributed.from_first([mine, None]) == ["a", None]
    vote = distributed.Vote(mesh)
    print("votes", [vote(i == 1 and step == 2) for step in range(5)])
    distributed.agree("the weather", "fine")
    distributed.agree("the config", mine)

distributed.run(main)
"""


def test_processes_agree_or_say_on_what_not():
    for status, output, _ in together(AGREE, [["a"], ["b"]]):
        assert status == 2, output[-3000:]
        assert "votes [False, False, False, True, False]" in output
        assert last_line(output) == (
            "error: the config must be the same on all 2 processes; that of process 1 is another "
            "than that of process 0"
        )


@pytest.mark.parametrize("process", [0, 1])
def test_a_process_that_is_alone_says_so(process):
    flags = ["--processes=2", f"--process={process}", "--connect_timeout=2"]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        flags.append(f"--coordinator=127.0.0.1:{s.getsockname()[1]}")
    script = "from gemma_lora import distributed; distributed.run(lambda: print('never'))"
    done = start(script, [], flags, 1)
    output = done.communicate(timeout=120)[0]
    assert done.returncode == 2 and "never" not in output
    last = last_line(output)
    assert last.startswith(f"error: process {process} of 2 has not met all the others within 2 s")


@pytest.mark.parametrize(
    "flags,message",
    [
        ("--processes 2 --process 1", "given without --coordinator HOST:PORT"),
        ("--coordinator a:1 --process 1", "given without --processes: expected all three"),
        ("--coordinator a --processes 2 --process 1", "'a', expected HOST:PORT"),
        ("--coordinator a:99999 --processes 2 --process 1", "expected HOST:PORT"),
        ("--coordinator a:1 --processes 2 --process 2", "--process is 2 of --processes 2"),
        ("--coordinator a:1 --processes two --process 2", "invalid int value: 'two'"),
        ("--coordinator auto --process 2", "finds --processes and --process by itself"),
        ("--coordinator auto", "cannot join at --coordinator auto: "),
        ("--heartbeat_timeout 0", "--heartbeat_timeout is 0"),
        ("", "Slurm started 4 processes"),
    ],
)
def test_flags_that_do_not_go_together(flags, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train", *flags.split()])
    for name in [n for n in os.environ if n.startswith(("SLURM_", "OMPI_"))]:
        monkeypatch.delenv(name)
    if not flags:
        monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(SystemExit) as exit_:
        distributed.run(lambda: pytest.fail("the run must not begin"))
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and error.count("\n") == 1 and message in error


@pytest.mark.parametrize(
    "message,waits,code",
    [
        ("UNKNOWN: Gloo: Connection closed by peer", [17], 1),
        ("INVALID_ARGUMENT: a shape", [], 1),
        ("RESOURCE_EXHAUSTED: 9 GiB", [], 2),
    ],
)
def test_who_has_failed_is_heard_before_the_end(message, waits, code, monkeypatch):
    """A lost connection waits for JAX's service, which knows; a fault of its own does not."""
    slept = []

    def fails():
        raise jax.errors.JaxRuntimeError(message)

    def exits(code):
        raise SystemExit(code)

    monkeypatch.setattr(sys, "argv", ["train", "--heartbeat_timeout=7"])
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed.time, "sleep", slept.append)
    monkeypatch.setattr(distributed.os, "_exit", exits)
    with pytest.raises(SystemExit) as exit_:
        distributed.run(fails)
    assert exit_.value.code == code and slept == waits


def test_other_flags_are_left_to_the_program(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train", "--config", "x", "--heartbeat_timeout=5", "--w=1"])
    seen = []
    with pytest.raises(SystemExit) as exit_:
        distributed.run(lambda: seen.extend(sys.argv))
    assert exit_.value.code == 0 and seen == ["train", "--config", "x", "--w=1"]
