"""Where rows come from: local files, TensorFlow Datasets, or the generated problems.

A source yields rows, plain dicts of fields, each with a stable string 'id'. A new source is one
function here and one line in SOURCES.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pyarrow.parquet
from etils import epath

from gemma_lora.data import generated
from gemma_lora.errors import UserError, nearest

Row = dict[str, Any]


def read(source: str, path: str, limit: int) -> list[Row]:
    """The first `limit` rows (0: all) of `path`, or, when path is empty, of `source`.

    source is 'name' or 'name:argument', e.g. 'tfds:gsm8k', 'tfds:gsm8k/test', 'generated:600'.
    Every row has a unique string 'id': its own 'id' field, or the file's stem and row number.
    Raises UserError naming file and line.
    """
    if path:
        rows, stem = read_file(path), epath.Path(path).stem
    else:
        kind, _, argument = source.partition(":")
        if kind not in SOURCES:
            raise UserError(f"data.source {source!r} is unknown, {nearest(kind, SOURCES)}")
        rows, stem = SOURCES[kind](argument), argument.replace("/", "-") or kind
    out: list[Row] = []
    seen: set[str] = set()
    for i, row in enumerate(rows):
        if limit and i >= limit:
            break
        ident = str(row.get("id", f"{stem}-{i:06d}"))
        if ident in seen:
            raise UserError(f"{path or source}: the id {ident!r} occurs twice (row {i})")
        seen.add(ident)
        out.append({**row, "id": ident})
    if not out:
        raise UserError(f"{path or source} holds no rows")
    return out


def read_file(path: str) -> Iterator[Row]:
    """Rows of a .jsonl, .json (a list of objects) or .parquet file; local or gs://."""
    file = epath.Path(path)
    readers = {".jsonl": _jsonl, ".json": _json, ".parquet": _parquet}
    if file.suffix not in readers:
        raise UserError(f"data file {path}: ending {file.suffix!r}, {nearest(path, readers)}")
    if not file.exists():
        there = [p.name for p in file.parent.iterdir()] if file.parent.exists() else []
        raise UserError(f"data file {path} does not exist; {nearest(file.name, there)}")
    return readers[file.suffix](file)


def _jsonl(file: epath.Path) -> Iterator[Row]:
    with file.open("r", encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as e:
                raise UserError(f"{file}, line {number}: not JSON: {e}") from e
            if not isinstance(row, dict):
                raise UserError(f"{file}, line {number}: expected an object, got {line[:60]!r}")
            yield row


def _json(file: epath.Path) -> Iterable[Row]:
    try:
        rows = json.loads(file.read_text())
    except ValueError as e:
        raise UserError(f"{file}: not JSON: {e}") from e
    if not isinstance(rows, list) or not all(isinstance(r, dict) for r in rows):
        raise UserError(f"{file}: expected a list of objects (one object a line is .jsonl)")
    return rows


def _parquet(file: epath.Path) -> Iterable[Row]:
    try:
        with file.open("rb") as f:
            return pyarrow.parquet.read_table(f).to_pylist()
    except pyarrow.ArrowInvalid as e:
        raise UserError(f"{file}: not a Parquet file: {e}") from e


def _generated(argument: str) -> Iterable[Row]:
    if not argument.isdigit():
        raise UserError(f"data.source 'generated:{argument}': expected a count, e.g. generated:600")
    return generated.problems(int(argument))


def _tfds(argument: str) -> Iterator[Row]:
    """'name' or 'name/split' (default train), through tfds' TensorFlow-free reader."""
    import tensorflow_datasets as tfds  # takes seconds to import

    name, _, split = argument.partition("/")
    try:
        builder = tfds.builder(name, file_format="array_record")
        builder.download_and_prepare()
        rows = builder.as_data_source(split=split or "train")
    except Exception as e:  # tfds has no common base of its errors
        raise UserError(
            f"TensorFlow Datasets cannot give {argument!r}: {type(e).__name__}: {e}. "
            "A local copy can be read with data.path"
        ) from e
    for i, row in enumerate(rows):
        fields = {k: v.decode() if isinstance(v, bytes) else v for k, v in row.items()}
        yield {"id": f"{name}-{split or 'train'}-{i:06d}", **fields}


SOURCES: dict[str, Callable[[str], Iterable[Row]]] = {"tfds": _tfds, "generated": _generated}
