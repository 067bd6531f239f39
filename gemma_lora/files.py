"""Files: atomic writes (a reader sees the old file or the new one), the cache folder, hashes.

A path is a pathlib.Path or, of a URL such as gs://bucket/run, an epath.Path, which has the methods
used here. An object of a bucket appears as a whole, but a directory of several does not.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

from etils import epath

from gemma_lora.errors import UserError, extra

# TensorFlow, which the extra keras brings, would else answer for gs://, and may lack the support.
os.environ.setdefault("EPATH_USE_TF", "false")

_URL = re.compile(r"[a-z0-9]+://|(gs|s3|https?|file):/")  # or one that lacks a slash


def path_of(text: str) -> pathlib.Path | epath.Path:
    """The path of a file or directory that a user names, which need not exist.

    Raises UserError for a URL without support, or of a bucket that nothing can be asked of.
    """
    if not _URL.match(text):
        return local_path(text)
    if not text.startswith("gs://"):
        raise UserError(f"{text}: expected a local path, or gs://bucket/...")
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{text}: Google Cloud Storage needs gcsfs; run: {extra('gs')}")
    path = epath.Path(text)
    try:
        path.exists()
    except Exception as e:  # of gcsfs, aiohttp or google.auth: no way there, no credentials
        raise UserError(
            f"{text} cannot be reached: {_first_line(e)}; expected a bucket that this "
            "host may use: see its network, and `gcloud auth application-default login`"
        ) from e
    return path


def _first_line(e: Exception) -> str:
    return f"{type(e).__name__}: {(str(e).splitlines() or [''])[0]}"


def check_bucket(directory: epath.Path) -> None:
    """Raises UserError where Orbax may not keep checkpoints in a directory of a bucket: before it
    lists or deletes some it asks what kind of bucket it is, which roles of objects do not allow."""
    bucket = directory.parts[2]
    try:
        storage = importlib.import_module("google.cloud.storage")
        storage.Client().get_bucket(bucket)
    except Exception as e:  # of google.cloud, google.auth, requests
        raise UserError(
            f"{directory}: checkpoints need storage.buckets.get of {bucket}, which was refused: "
            f"{_first_line(e)}; expected a role that has it, such as "
            "roles/storage.legacyBucketReader beside one for objects"
        ) from e


def local_path(text: str) -> pathlib.Path:
    """With the home directory for ~; raises UserError where there is none, for a URL and for ''."""
    if not text:
        raise UserError("expected a path, got ''")
    if _URL.match(text):
        raise UserError(f"{text}: expected a local path")
    try:
        return pathlib.Path(text).expanduser()
    except RuntimeError as e:
        raise UserError(f"{text}: {e}; expected a path, or ~ of a user with a home") from e


def path_argument(text: str) -> pathlib.Path | epath.Path:
    """path_of as a type of argparse, which would hide the message of a UserError."""
    try:
        return path_of(text)
    except UserError as e:
        raise argparse.ArgumentTypeError(str(e)) from e


def remote(path: pathlib.Path | epath.Path) -> bool:
    """Is the path that of a bucket?"""
    return not isinstance(path, pathlib.Path)


_UMASK = os.umask(0)  # which can only be read by setting it
os.umask(_UMASK)


@contextlib.contextmanager
def replace_file(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives a temporary path; its file becomes `path` if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if remote(path):
        with tempfile.TemporaryDirectory() as folder:
            temporary = pathlib.Path(folder) / path.name
            yield temporary
            path.write_bytes(temporary.read_bytes())
        return
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = pathlib.Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_UMASK)  # mkstemp makes files that only their owner can read
        with temporary.open("rb") as f:
            os.fsync(f.fileno())  # or the name may outlive a lost host without what it names
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def replace_directory(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives a new directory for files, which becomes `path` if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    where = None if remote(path) else path.parent
    temporary = pathlib.Path(tempfile.mkdtemp(dir=where, prefix=f".{path.name}."))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_UMASK)  # mkdtemp makes them so that only their owner can enter
        if not remote(path):
            old = temporary.with_name(f"{temporary.name}.old")
            if path.exists():
                os.replace(path, old)  # a directory that is full cannot be replaced
            try:
                os.replace(temporary, path)
            except BaseException:
                if old.exists():
                    os.replace(old, path)
                raise
            shutil.rmtree(old, ignore_errors=True)
            return
        if path.exists():
            path.rmtree()
        for file in temporary.iterdir():
            (path / file.name).write_bytes(file.read_bytes())
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def require_writable(path: pathlib.Path) -> None:
    """Raises UserError where no file can become `path`: asked before the work it is to hold."""
    if remote(path):
        return
    if path.is_dir():
        raise UserError(f"{path} is a directory, expected the name of a file")
    there = path.parent
    while not there.exists():
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{path} cannot be written: this user may not make files in {there}")


def write_text(path: pathlib.Path, text: str) -> None:
    with replace_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def cache_dir() -> pathlib.Path:
    """The package's cache folder: $XDG_CACHE_HOME/gemma_lora, by default ~/.cache/gemma_lora."""
    try:
        home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    except RuntimeError as e:
        raise UserError(f"the cache has no place: {e}; set XDG_CACHE_HOME to a directory") from e
    return pathlib.Path(home) / "gemma_lora"


def sha256(path: pathlib.Path) -> str:
    """Hexadecimal SHA-256 of a file, read in chunks."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in `path`; empty where there is no such file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is not valid JSON ({e}); get the file again") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} holds a JSON {type(found).__name__}, not an object; get it again")
    return found
