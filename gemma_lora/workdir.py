"""The directory of a run: may this run use it, and what does it hold.

config.json, run.json, metrics.jsonl, checkpoints/, ledger/ (Parquet), adapter/ (PEFT),
report.json, report.md, report.html, learning_curve.png, tensorboard/.
"""

import json
import pathlib
import shutil
from typing import Any

from gemma_lora.config import differences
from gemma_lora.errors import UserError
from gemma_lora.files import write_text


def claim(workdir: pathlib.Path, config: dict[str, Any], need_bytes: int) -> bool:
    """Makes the workdir this run's, before anything expensive; True if the run was begun before.

    A start that failed before its first checkpoint leaves config.json alone, which does not bind.
    Raises UserError when it belongs to another run (naming the keys that differ), is not a
    directory, cannot be written, or has less free space than `need_bytes`.
    """
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"workdir {workdir} is a file, expected a directory or a new name")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = workdir / "config.json"
        # Hidden files are no run: another process of this run may be writing config.json.
        begun = any(p != file and not p.name.startswith(".") for p in workdir.iterdir())
        if begun and not file.exists():
            raise UserError(f"workdir {workdir} is not empty and holds no run; give another one")
        if begun and (differ := differences(config, _read(file))):
            raise UserError(
                f"workdir {workdir} belongs to a run with another config: "
                f"{'; '.join(differ)}. Give another --workdir, or the same config"
            )
        require_space(workdir, need_bytes)
        write_text(file, json.dumps(config, indent=2, sort_keys=True) + "\n")
    except OSError as e:
        raise UserError(f"workdir {workdir} cannot be used: {e.strerror or e}") from e
    return begun


def forget_after(workdir: pathlib.Path, step: int | None) -> None:
    """Removes what the ledger has from after `step` (None: all), which comes again."""
    for file in (workdir / "ledger").glob("*_*.parquet"):
        if step is None or int(file.stem.split("_")[1]) > step:
            file.unlink()


def require_space(workdir: pathlib.Path, need_bytes: int) -> None:
    """Raises UserError when the disk of `workdir` has less than `need_bytes` free."""
    free = shutil.disk_usage(workdir).free
    if free < need_bytes:
        raise UserError(
            f"workdir {workdir} has {free / 2**20:,.0f} MiB free, "
            f"this run needs about {need_bytes / 2**20:,.0f} MiB"
        )


def _read(file: pathlib.Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as e:
        raise UserError(f"{file} is not JSON ({e}); give another --workdir") from e
    if not isinstance(found, dict):
        raise UserError(f"{file} is not the config of a run; give another --workdir")
    return found
