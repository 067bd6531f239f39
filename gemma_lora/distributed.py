"""Several processes, one run: how they join, what they must agree on, how they end together.

Every process gets the same command and, as flags of their own,

    --coordinator HOST:PORT --processes N --process I    process 0 listens there
    --coordinator auto                                   as Cloud TPU, Slurm or Open MPI say
    --connect_timeout SECONDS     how long they wait for one another at the start (300)
    --heartbeat_timeout SECONDS   after so long without a sign of life one counts as lost (100)
"""

import argparse
import ctypes
import hashlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gemma_lora.errors import Parser, UserError, run_main

LOST = 75  # exit status of a process whose companions are gone; EX_TEMPFAIL: try again
# What XLA says of a program of this process alone.
_OWN_FAULTS = ("INVALID_ARGUMENT", "UNIMPLEMENTED")
FLAGS: dict[str, tuple[type, Any]] = {  # type and default
    "--coordinator": (str, None),
    "--processes": (int, None),
    "--process": (int, None),
    "--connect_timeout": (int, 300),
    "--heartbeat_timeout": (int, 100),
}
_first = False  # is this process 0; known once all have joined


def run(main: Callable[[], None]) -> NoReturn:
    """errors.run_main for a program that may run on several hosts; takes its flags off sys.argv.

    A process that fails leaves at once, and the others hear of it; one whose companions are gone
    says so and exits with LOST.
    """
    heartbeat_timeout = 0

    def joined() -> None:
        nonlocal heartbeat_timeout
        options, sys.argv[1:] = _options(sys.argv[1:])
        heartbeat_timeout = options.heartbeat_timeout
        if options.coordinator:
            _join(options)
        main()

    code: Any = 1
    try:
        run_main(joined)
    except SystemExit as e:
        if e.code == 0 or not jax.distributed.is_initialized():
            raise
        code = e.code
    except Exception as e:
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        if isinstance(e, jax.errors.JaxRuntimeError) and not str(e).startswith(_OWN_FAULTS):
            # The devices hear of a lost process before JAX's service does, which then ends this one
            # (see _at_abort). If it does not, the fault was here.
            print("waiting to hear whether another process was lost", file=sys.stderr, flush=True)
            time.sleep(heartbeat_timeout + 10)
    # The usual exit waits for all processes, and the others may be waiting for this one.
    sys.stdout.flush()
    sys.stderr.flush()
    if _first:  # a device that failed cannot be asked again
        time.sleep(2)  # its end is that of the others: what failed on them, too, they say first
    os._exit(code)


def _options(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """(these flags, the other arguments); UserError for flags that do not go together."""
    parser = Parser(add_help=False)
    for name, (kind, usual) in FLAGS.items():
        parser.add_argument(name, type=kind, default=usual)
    options, rest = parser.parse_known_args(arguments)
    n, i = options.processes, options.process
    for name in ("connect_timeout", "heartbeat_timeout"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} is {getattr(options, name)}, expected at least 1 second")
    if options.coordinator == "auto":
        if (n, i) != (None, None):
            raise UserError("--coordinator auto finds --processes and --process by itself")
        return options, rest
    given = {"--coordinator HOST:PORT": options.coordinator, "--processes": n, "--process": i}
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < 3:
        there = " and ".join(sorted(given.keys() - set(missing)))
        raise UserError(f"{there} given without {' and '.join(missing)}: expected all three")
    if missing:
        if (tasks := os.environ.get("SLURM_STEP_NUM_TASKS", "1")) != "1":
            raise UserError(
                f"Slurm started {tasks} processes, each would be a run of its own; add "
                "--coordinator auto"
            )
        return options, rest
    host, _, port = options.coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(
            f"--coordinator is {options.coordinator!r}, expected HOST:PORT, such as 10.0.0.2:8476, "
            "or auto"
        )
    if not 0 <= i < n:
        raise UserError(f"--process is {i} of --processes {n}, expected 0 to {n - 1}")
    return options, rest


def _join(options: argparse.Namespace) -> None:
    """Waits for all processes; UserError where that cannot work."""
    global _first
    auto = options.coordinator == "auto"
    who = "this process" if auto else f"process {options.process} of {options.processes}"
    _at_abort(
        f"error: {who} has not met all the others within {options.connect_timeout} s at the "
        f"coordinator ({options.coordinator}): is each of them running, and can they reach the port"
        " of process 0?",
        2,
    )
    place = {} if auto else {
        "coordinator_address": options.coordinator,
        "num_processes": options.processes,
        "process_id": options.process,
        "cluster_detection_method": "deactivate",
    }  # fmt: skip
    try:
        jax.distributed.initialize(
            **place,
            initialization_timeout=options.connect_timeout,
            heartbeat_timeout_seconds=options.heartbeat_timeout,
        )
    except (ValueError, RuntimeError) as e:
        why = " ".join(str(e).split())[:300]
        raise UserError(f"{who} cannot join at --coordinator {options.coordinator}: {why}") from e
    # JAX has put its own handler there, under which a SIGTERM before the first step were lost.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if not auto and jax.process_count() != options.processes:
        raise UserError(
            f"{options.processes} processes have met, but the devices are those of "
            f"{jax.process_count()}: the {jax.default_backend()} backend does not join them"
        )
    _first = jax.process_index() == 0
    _at_abort(
        f"error: process {jax.process_index()} of {jax.process_count()} stops: another process "
        "has failed or was lost, its own output may say why; the same command on all of them "
        "continues from the last checkpoint",
        LOST,
    )


_aborting = None  # the handler, which ctypes does not keep alive


def _at_abort(line: str, code: int) -> None:
    """What to say last, and how to exit, where JAX's service ends the process by abort().

    That happens on a thread without Python while the others wait for the devices, so no handler of
    Python's signal module would run.
    """
    global _aborting

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def handler(number: int) -> None:
        os.write(2, f"{line}\n".encode())
        os._exit(code)

    ctypes.CDLL(None).signal(int(signal.SIGABRT), handler)
    _aborting = handler


# ---- together -------------------------------------------------------------------------------


def several() -> bool:
    """Is this run more than one process? Raises UserError where they have not joined."""
    if jax.process_count() == 1:
        return False
    if not jax.distributed.is_initialized():
        raise UserError(
            f"the devices belong to {jax.process_count()} processes that have not joined: start "
            "the command on every host, with --coordinator auto"
        )
    return True


def wait_for_all() -> None:
    """Returns when every process has come here."""
    if several():
        multihost_utils.sync_global_devices("gemma_lora")


def from_first(value: Any) -> Any:
    """Process 0's value on every process: anything that JSON holds in at most 1024 bytes."""
    if not several():
        return value
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    buffer = np.zeros(1024, np.uint8)
    buffer[: len(text)] = text
    return json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(buffer))).rstrip(b"\0"))


def agree(what: str, text: str) -> None:
    """Raises UserError on every process where not all have the same text."""
    if not several():
        return
    mine = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    found = np.asarray(multihost_utils.process_allgather(mine))
    if others := np.flatnonzero((found != found[0]).any(1)).tolist():
        raise UserError(
            f"{what} must be the same on all {len(found)} processes; that of process "
            f"{', '.join(map(str, others))} is another than that of process 0"
        )


class Vote:
    """Was any process asked? All get the same answer at the same call.

    Of several processes, that to the votes of the call before: the devices add them up behind the
    step under way, so that nobody waits for more than the step before. One process pays nothing.
    """

    def __init__(self, mesh: Mesh):
        self._votes: jax.Array | None = None
        if several():
            self._where = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
            whole = NamedSharding(mesh, PartitionSpec())
            self._sum = jax.jit(jnp.sum, out_shardings=whole)

    def __call__(self, asked: bool) -> bool:
        if not several():
            return asked
        mine = jax.make_array_from_callback(
            (self._where.mesh.size,), self._where, lambda _: np.full(1, asked, np.int32)
        )
        before, self._votes = self._votes, self._sum(mine)
        return before is not None and int(before) > 0
