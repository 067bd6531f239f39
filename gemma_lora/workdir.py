"""The directory of a run: may this run use it, and what does it hold.

config.json, run.json, metrics.jsonl, checkpoints/, ledger/ (Parquet), adapter/ (PEFT),
report.json, report.md, report.html, learning_curve.png, tensorboard/. What other commands leave:
folds/, unprompted.parquet, gradients.parquet, outliers.parquet, outliers.md, review.csv and
review.html. And .lock, which is held while a process trains there.
"""

import fcntl
import json
import pathlib
import shutil
import uuid
from typing import IO, Any

import jax

from gemma_lora import distributed
from gemma_lora.config import default, differences, flat, require_kind, to_dict
from gemma_lora.errors import UserError, nearest
from gemma_lora.files import check_bucket, remote, write_text

_locked: IO[str] | None = None


def claim(workdir: pathlib.Path, config: dict[str, Any], need_bytes: int) -> bool:
    """Makes the workdir this run's, before anything expensive; True if the run was begun before.

    A start that failed before its first evaluation had ended does not bind (one that a signal ended
    there does, as it has saved); nor does the mesh, so that a run can go on with other devices.
    Raises UserError when it belongs to another run (naming the keys that differ) or process, is not
    a directory, cannot be written, or has less free space than `need_bytes`; on several processes
    also where they have not all the same config, or where one of them sees another directory than
    process 0.
    """
    distributed.agree("the config", json.dumps(config, sort_keys=True))
    begun = _claim(workdir, config, need_bytes) if jax.process_index() == 0 else False
    if distributed.several():
        _check_shared(workdir)
    return distributed.from_first(begun)


def _check_shared(workdir: pathlib.Path) -> None:
    mark = workdir / distributed.from_first(f".{uuid.uuid4().hex}")
    if jax.process_index() == 0:
        mark.write_text("")
    distributed.wait_for_all()
    if not mark.exists():
        raise UserError(
            f"workdir {workdir} of process {jax.process_index()} is not that of process 0: "
            "expected a directory that all hosts share, on NFS or as gs://bucket/run"
        )
    distributed.wait_for_all()
    if jax.process_index() == 0:
        mark.unlink()


def has_checkpoint(workdir: pathlib.Path) -> bool:
    """Is there a whole one: in a bucket it is whole when the file stands there that ends it."""
    found = (p for p in (workdir / "checkpoints").glob("*") if p.name.isdigit())
    return any(not remote(p) or (p / "commit_success.txt").exists() for p in found)


def _claim(workdir: pathlib.Path, config: dict[str, Any], need_bytes: int) -> bool:
    if remote(workdir):
        check_bucket(workdir)
    try:
        if workdir.exists() and not workdir.is_dir():
            raise UserError(f"workdir {workdir} is a file, expected a directory or a new name")
        workdir.mkdir(parents=True, exist_ok=True)
        file = workdir / "config.json"
        # Hidden files are no run: a write that was cut off leaves one.
        there = workdir.iterdir() if workdir.exists() else ()  # a bucket has no empty directories
        begun = any(p != file and not p.name.startswith(".") for p in there)
        if begun and not file.exists():
            raise UserError(f"workdir {workdir} is not empty and holds no run; give another one")
        saved = (workdir / "run.json").exists() or has_checkpoint(workdir)
        theirs = _read(file) | {"mesh": config["mesh"]} if file.exists() else {}
        _lock(workdir)
        if saved and (differ := differences(config, theirs)):
            raise UserError(
                f"workdir {workdir} belongs to a run with another config: "
                f"{'; '.join(differ)}. Give another --workdir, or the same config"
            )
        require_space(workdir, need_bytes)
        write_text(file, json.dumps(config, indent=2, sort_keys=True) + "\n")
    except OSError as e:
        raise UserError(f"workdir {workdir} cannot be used: {e.strerror or e}") from e
    return begun


def _lock(workdir: pathlib.Path) -> None:
    """Refuses a local workdir in which a living process trains: two would undo each other's files.

    The lock is of the process, which trains in one workdir at a time, and goes with it. Of a bucket
    or a file system without locks nothing is known.
    """
    global _locked
    release()
    if remote(workdir):
        return
    _locked = (workdir / ".lock").open("w")
    try:
        fcntl.flock(_locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        raise UserError(
            f"another process trains in workdir {workdir}: wait for it, stop it, or give another "
            "--workdir"
        ) from e
    except OSError:
        pass  # a file system without locks


def release() -> None:
    """Lets go of the workdir that this process claimed last."""
    global _locked
    if _locked:
        _locked.close()
        _locked = None


def ledger_files(workdir: pathlib.Path, kind: str) -> dict[int, pathlib.Path]:
    """Step -> ledger/{kind}_{step}.parquet, in the order of steps; kind: 'eval' or 'seen'."""
    found = {}
    for file in (workdir / "ledger").glob(f"{kind}_*.parquet"):
        if (step := file.stem.removeprefix(f"{kind}_")).isdigit():  # others are copies of someone's
            found[int(step)] = file
    return dict(sorted(found.items()))


def require(workdir: pathlib.Path) -> None:
    """Raises UserError where `workdir` is no run's: not there, or without a config.json."""
    file = workdir / "config.json"
    if file.exists():
        return
    why = f"{file} is missing" if workdir.is_dir() else "there is no such directory"
    # Other directories have a config.json, too. A bucket would list all that is below its root.
    runs = [] if remote(workdir) else [p.parent.name for p in workdir.parent.glob("*/run.json")]
    near = f"; {nearest(workdir.name, runs)}" if runs else ""
    raise UserError(f"{workdir} is not the workdir of a run: {why}{near}")


def read_config(workdir: pathlib.Path, keys: tuple[str, ...]) -> dict[str, Any]:
    """The config.json of a run; UserError where it is missing or damaged.

    It must have the keys, such as 'data.path', with values of the types that the default has.
    """
    require(workdir)
    path, usual = workdir / "config.json", flat(to_dict(default()))
    [found], _ = read_records(path, ())
    there = flat(found)
    if missing := [k for k in keys if k not in there]:
        raise UserError(f"{path} is not the config of a run: it lacks {', '.join(missing)}")
    for k in keys:
        require_kind(f"{path} is damaged: {k}", there[k], usual[k])
    return found


def read_records(path: pathlib.Path, keys: tuple[str, ...]) -> tuple[list[dict[str, Any]], bool]:
    """The objects of a JSON lines file, or the one of a JSON file; each must have the keys.

    And whether a last line was cut short by a kill, which does not count: it has no newline. Raises
    UserError where anything else is missing or damaged.
    """
    found: list[dict[str, Any]] = []
    try:
        text = path.read_text(encoding="utf-8")
        *parts, rest = text.split("\n") if path.suffix == ".jsonl" else [text, ""]
        for part in parts:
            found.append(json.loads(part))
    except (OSError, ValueError, RecursionError) as e:
        where = f", after {len(found)} whole lines" if found else ""
        raise UserError(f"{path} is missing or damaged{where}: {e}") from e
    if not all(isinstance(x, dict) and x.keys() >= set(keys) for x in found):
        named = f" with the keys {', '.join(keys)}" if keys else ""
        raise UserError(f"{path} is damaged: expected objects{named}")
    return found, bool(rest)


def forget_after(workdir: pathlib.Path, step: int | None) -> None:
    """Removes what the ledger has from after `step` (None: all), which comes again."""
    for kind in ("eval", "seen"):
        for at, file in ledger_files(workdir, kind).items():
            if step is None or at > step:
                file.unlink()


def require_space(workdir: pathlib.Path, need_bytes: int) -> None:
    """Raises UserError when the disk of `workdir` has less than `need_bytes` free."""
    if remote(workdir):
        return  # a bucket is never full
    free = shutil.disk_usage(workdir).free
    if free < need_bytes:
        raise UserError(
            f"workdir {workdir} has {free / 2**20:,.0f} MiB free, "
            f"this run needs about {need_bytes / 2**20:,.0f} MiB"
        )


def _read(file: pathlib.Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise UserError(f"{file} is not JSON ({e}); give another --workdir") from e
    # A model's directory has a config.json, too.
    if not isinstance(found, dict) or not {"data", "lora", "train"} <= found.keys():
        raise UserError(f"{file} is not the config of a run; give another --workdir")
    return found
