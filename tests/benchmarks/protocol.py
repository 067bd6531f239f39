"""How speed.py and its workers speak: one process a competitor, one JSON line an answer.

A worker gets one argument, the path of a job (JSON, beside a .npz of its batches), makes itself
ready, and then does one unit of work for every line it reads.
"""

import json
import pathlib
import sys
import time
from collections.abc import Callable

import numpy as np


def job() -> tuple[dict, list[dict[str, np.ndarray]]]:
    """(the job, its batches: arrays by name)."""
    path = pathlib.Path(sys.argv[1])
    found = json.loads(path.read_text())
    arrays = np.load(path.with_suffix(".npz"))
    batches = [
        {name.split("/")[1]: arrays[name] for name in arrays.files if name.startswith(f"{i}/")}
        for i in range(found["batches"])
    ]
    return found, batches


def write_job(path: pathlib.Path, settings: dict, batches: list[dict[str, np.ndarray]]) -> None:
    arrays = {f"{i}/{name}": x for i, b in enumerate(batches) for name, x in b.items()}
    np.savez(path.with_suffix(".npz"), **arrays)
    path.write_text(json.dumps({**settings, "batches": len(batches)}))


def serve(work: Callable[[int], float], batches: int, **facts: float) -> None:
    """Says 'ready' after one warm-up of each shape; then answers each line with one measurement.

    work(i) does the i-th batch and returns its loss. The peak of memory is that from the warm-up
    on: what loading took before, as of a file that is dequantised, is not the work's.
    """
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    began = time.perf_counter()
    for i in range(batches):
        work(i)
    # What the warm-up costs beyond the work itself is compilation.
    tell(ready=True, warm_up_seconds=time.perf_counter() - began, **facts)
    for n, _ in enumerate(sys.stdin):
        wall, cpu = time.perf_counter(), time.process_time()
        value = work(n % batches)
        tell(
            batch=n % batches,
            seconds=time.perf_counter() - wall,
            cpu_seconds=time.process_time() - cpu,
            loss=value,
            peak_bytes=_peak(),
        )


def _peak() -> int:
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def tell(**answer: object) -> None:
    print(json.dumps(answer), flush=True)
