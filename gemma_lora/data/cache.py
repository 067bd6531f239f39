"""Arrays kept on disk under a hash of all that decides them; what is unused for long goes first."""

import contextlib
import hashlib
import os
import pathlib
from collections.abc import Iterable

import numpy as np

from gemma_lora.files import cache_dir, replace_file

_LIMIT = 2 * 2**30  # bytes of the folder


def key(parts: Iterable[str]) -> str:
    """A hash of texts, of their order and of where one ends."""
    h = hashlib.sha256()
    for part in parts:
        text = part.encode()
        h.update(f"{len(text)}:".encode() + text)
    return h.hexdigest()


def load(name: str) -> dict[str, np.ndarray] | None:
    """The arrays kept under a key; None where there are none, or the file is damaged or foreign."""
    path = _path(name)
    # The arrays' bytes are under a checksum; what a damaged header raises is anybody's guess.
    with contextlib.suppress(Exception):
        with np.load(path, allow_pickle=False) as file:
            arrays = {k: file[k] for k in file.files}
        if arrays.pop("stamp").item() == _stamp(name, arrays):
            os.utime(path)  # used now
            return arrays
    return None


def save(name: str, arrays: dict[str, np.ndarray]) -> None:
    """Keeps the arrays; a folder that cannot be written only costs the time to make them again."""
    path = _path(name)
    with contextlib.suppress(OSError):
        with replace_file(path) as temporary, temporary.open("wb") as f:
            np.savez(f, allow_pickle=False, stamp=np.array(_stamp(name, arrays)), **arrays)
        _forget(path.parent)


def _forget(folder: pathlib.Path) -> None:
    """Removes the files that were not used for longest, until the others are within the limit."""
    files = [(p.stat(), p) for p in folder.glob("*.npz")]
    left = sum(stat.st_size for stat, _ in files)
    for stat, path in sorted(files, key=lambda pair: pair[0].st_mtime_ns):
        if left <= _LIMIT:
            break
        path.unlink(missing_ok=True)
        left -= stat.st_size


def _stamp(name: str, arrays: dict[str, np.ndarray]) -> str:
    """What tells a whole file of this key: a damaged list of contents may lack some arrays."""
    return f"{name} {','.join(sorted(arrays))}"


def _path(name: str) -> pathlib.Path:
    return cache_dir() / "tokens" / f"{name[:32]}.npz"
