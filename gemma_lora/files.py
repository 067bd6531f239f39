"""Files: atomic writes (a reader sees the old file or the new one), the cache folder, hashes."""

import contextlib
import hashlib
import os
import pathlib
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def replace_file(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives a temporary path in the same directory; renamed to `path` if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = pathlib.Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: pathlib.Path, text: str) -> None:
    with replace_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def cache_dir() -> pathlib.Path:
    """The package's cache folder: $XDG_CACHE_HOME/gemma_lora, by default ~/.cache/gemma_lora."""
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(home) / "gemma_lora"


def sha256(path: pathlib.Path) -> str:
    """Hexadecimal SHA-256 of a file, read in chunks."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
