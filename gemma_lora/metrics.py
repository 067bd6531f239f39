"""What a run tells while it runs: one line a step, metrics.jsonl, TensorBoard, a progress bar.

Process 0 speaks; the others are silent.
"""

import contextlib
import json
import math
import os
import pathlib
import resource
import sys
import textwrap
import time
from collections.abc import Iterator
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from gemma_lora import STARTED
from gemma_lora.files import remote, write_text
from gemma_lora.workdir import read_records


def say(text: str = "") -> None:
    """Prints a line, once over all processes."""
    if jax.process_index() == 0:
        print(text, flush=True)


def banner(title: str, facts: dict[str, Any]) -> None:
    """A section of the run's opening scroll: a title and one line a fact."""
    say(f"\n== {title} " + "=" * max(0, 76 - len(title)))
    for name, value in facts.items():
        lines = textwrap.wrap(str(value), 74, break_long_words=False, break_on_hyphens=False)
        for i, line in enumerate(lines):
            say(f"   {'' if i else name:<22} {line}")


def finite(record: dict[str, Any]) -> dict[str, Any]:
    """The record with None for every number that is not finite: JSON has no infinity."""
    return {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()
    }


def peak_memory() -> dict[str, int | None]:
    """Most bytes held so far: by this process on the host (mapped files count), and by one of its
    devices (None where the backend does not say: a CPU's memory is the host's)."""
    unit = 1 if sys.platform == "darwin" else 1024
    stats = [d.memory_stats() or {} for d in jax.local_devices()]
    device = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    return {
        "host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "device": max(device, default=None),
    }


class Metrics:
    """Writes records to <workdir>/metrics.jsonl and TensorBoard, lines to the terminal."""

    def __init__(
        self, workdir: pathlib.Path, start: int | None, total: int, eval_due: bool = False
    ):
        """Drops what was written after step `start` (None: everything), and, where it is due, the
        eval of that step: it comes again.

        spent: the seconds of the run that the records told of, those of the dropped among them.
        """
        self._on = jax.process_index() == 0
        self.spent = 0.0
        if not self._on:
            return
        self.path = workdir / "metrics.jsonl"
        old = read_records(self.path, ("kind", "step"))[0] if self.path.exists() else []
        first = 0 if start is None else start + 1
        again = ("eval", start) if eval_due else ()
        kept = [r for r in old if r["step"] < first and (r["kind"], r["step"]) != again]
        self.spent = max((r.get("seconds") or 0.0 for r in old), default=0.0)
        self._lines = [json.dumps(r) + "\n" for r in kept]
        write_text(self.path, "".join(self._lines))
        # Nothing can be appended to the objects of a bucket.
        self._file = None if remote(self.path) else self.path.open("a", encoding="utf-8")
        self._board = _Board(workdir / "tensorboard", first)
        self._bar = None
        if sys.stdout.isatty():
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                console=Console(file=sys.stdout),
                transient=True,
            )
            self._task = self._bar.add_task("train", total=total, completed=start or 0)
            self._bar.start()

    def write(self, record: dict[str, Any], line: str) -> None:
        """Appends a record (numbers that are not finite become null) and prints its line."""
        if not self._on:
            return
        clean = finite(record)
        text = json.dumps(clean) + "\n"
        if self._file is None:
            self._lines.append(text)
        else:
            self._file.write(text)
            self._file.flush()
        self._board.write(
            {k if "/" in k else f"{record['kind']}/{k}": v for k, v in clean.items()
             if isinstance(v, (int, float)) and k != "step"},
            record["step"],
        )  # fmt: skip
        if self._bar is not None:
            self._bar.update(self._task, completed=record["step"])
            self._bar.console.print(line, highlight=False, markup=False, soft_wrap=True)
        else:
            print(line, flush=True)

    def save(self) -> None:
        """Puts on the disk what is not there: before a checkpoint, as none of it comes again."""
        if self._on:
            if self._file is None:
                write_text(self.path, "".join(self._lines))
            else:
                os.fsync(self._file.fileno())
            self._board.flush()

    def close(self) -> None:
        if self._on and self._bar is not None:
            self._bar.stop()
        self.save()
        if self._on and self._file is not None:
            self._file.close()


class _Board:
    """TensorBoard's events, a convenience: metrics.jsonl is the record. So an error ends them,
    which is said, and not the run. tensorboardX's SummaryWriter is a thread: such an error would
    end it unseen, and what then waits for it waits for ever."""

    def __init__(self, directory: pathlib.Path, first: int):
        """TensorBoard forgets what earlier starts wrote from step `first` on."""
        # It imports torch where that is installed: seconds, which no other command need spend.
        from tensorboardX import event_file_writer, record_writer, summary
        from tensorboardX.proto import event_pb2

        self._event, self._scalar = event_pb2.Event, summary.scalar
        self._events: event_file_writer.EventsWriter | None = None
        # A bucket's object is written anew by each flush: only at a checkpoint.
        self._every = math.inf if remote(directory) else 30.0  # seconds
        self._flushed = time.monotonic()
        with self._trying():
            record_writer.directory_check(str(directory))
            suffix = f".{time.time_ns()}"  # names are of a second: it keeps two starts apart
            self._events = event_file_writer.EventsWriter(f"{directory}/events", suffix)
        self._add(first, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))

    @contextlib.contextmanager
    def _trying(self) -> Iterator[None]:
        try:
            yield
        except Exception as e:  # of the system, or of a bucket's library
            print(f"   TensorBoard's events end here: {type(e).__name__}: {e}", flush=True)
            self._events = None

    def _add(self, step: int, **what: Any) -> None:
        if self._events is not None:
            with self._trying():
                self._events.write_event(self._event(wall_time=time.time(), step=step, **what))

    def write(self, scalars: dict[str, float], step: int) -> None:
        for name, value in scalars.items():
            self._add(step, summary=self._scalar(name, value))
        if time.monotonic() - self._flushed > self._every:
            self.flush()

    def flush(self) -> None:
        self._flushed = time.monotonic()
        if self._events is not None:
            with self._trying():
                self._events.flush()


def clock(seconds: float) -> str:
    """3671.2 -> '1:01:11'."""
    m, s = divmod(round(seconds), 60)
    h, m = divmod(m, 60)
    return f"{h}:{m:02d}:{s:02d}" if h else f"{m}:{s:02d}"


class Timer:
    """Wall seconds of a run, over restarts, and between two events."""

    def __init__(self, before: float):
        """`before`: seconds spent by earlier starts of the run."""
        self._start = time.perf_counter() - before
        self._lap = time.perf_counter()

    def total(self) -> float:
        return time.perf_counter() - self._start

    def lap(self) -> float:
        """Seconds since the last call."""
        now = time.perf_counter()
        elapsed, self._lap = now - self._lap, now
        return elapsed


# Phases of the loop; WAIT and COPY are parts of STEPS.
STEPS, WAIT, COPY = "steps", "steps: wait for a batch", "steps: copy a batch"
LEDGER = "ledger"  # evals of all training examples


class Phases:
    """Seconds spent in named parts of a run, summed by name in `seconds`."""

    def __init__(self, imports: bool = False):
        """imports: the program has done nothing else so far; they are the first phase."""
        self._start = STARTED if imports else time.perf_counter()
        self.seconds: dict[str, float] = {}
        if imports:
            self.seconds["imports"] = self.since_start()

    def since_start(self) -> float:
        return time.perf_counter() - self._start

    @contextlib.contextmanager
    def mark(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - began)

    def add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def waited(self) -> str:
        """How much of the steps' time the loop waited for data; '' where no step was made."""
        steps, wait, copy = (self.seconds.get(k, 0.0) for k in (STEPS, WAIT, COPY))
        if not steps:
            return ""
        share = f"{100 * (wait + copy) / steps:.1f} % of the steps' {steps:.1f} s"
        return f"{share}: {wait:.2f} s for batches, {copy:.2f} s for copying them"

    def share(self, name: str) -> str:
        """'12.3 % of the run, 41.0 s'; '' where nothing has that name."""
        seconds = self.seconds.get(name, 0.0)
        return (
            f"{100 * seconds / self.since_start():.1f} % of the run, {seconds:.1f} s"
            if seconds
            else ""
        )

    def told(self) -> str:
        """'imports 2.1 s, compile 4.0 s, other 0.3 s': where the time since the start went."""
        other = {"other": self.since_start() - sum(self.seconds.values())}
        return ", ".join(f"{k} {v:.1f} s" for k, v in (self.seconds | other).items())
