"""Where rows come from: local files, TensorFlow Datasets, or the generated problems.

A source yields rows, plain dicts of fields, each with a stable string 'id'. A new source is one
function here and one line in SOURCES.
"""

import importlib
import itertools
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow.parquet

from gemma_lora.data import generated
from gemma_lora.errors import UserError, nearest, one_line
from gemma_lora.files import path_of

Row = dict[str, Any]
HUB = "huggingface:"  # before the name of a data set in a tfds source
LINE = "__line__"  # a field of rows from .jsonl files: the number of their line


def place(row: Row, where: str) -> str:
    """How an error names a row: by the line of its file if it has one, else by its id."""
    return f"{where}, line {row[LINE]}" if LINE in row else f"{where}, row {row['id']}"


def field_names(row: Row) -> str:
    """The names of a row's fields, as an error lists them."""
    return ", ".join(k for k in row if k != LINE)


def read(source: str, path: str, limit: int) -> list[Row]:
    """The first `limit` rows (0: all) of `path`, or, when path is empty, of `source`.

    source is 'name' or 'name:argument', e.g. 'tfds:gsm8k', 'tfds:gsm8k/test', 'generated:600',
    'tfds:huggingface:vicgalle/alpaca-gpt4'.
    Every row has a unique string 'id': its own 'id' field, or the file's stem and row number.
    Raises UserError naming file and line.
    """
    check_place(source, path)
    if path:
        file = path_of(path)
        reader, what, stem = _READERS[file.suffix], file, file.stem
    else:
        kind, _, argument = source.partition(":")
        reader, what, stem = SOURCES[kind], argument, re.sub("[/:]", "-", argument) or kind
    out: list[Row] = []
    seen: set[str] = set()
    try:
        for i, row in enumerate(itertools.islice(reader(what), limit or None)):
            given = row.get("id")
            ident = f"{stem}-{i:06d}" if given is None else str(given)
            text = ident.encode(errors="ignore").decode()  # without halves of surrogate pairs
            if [ident] != text.strip().splitlines():
                raise UserError(
                    f"{path or source}: the id {ident!r} (row {i}) cannot be a line of a list of "
                    "ids: expected text without line breaks and outer white space"
                )
            if ident in seen:
                raise UserError(f"{path or source}: the id {ident!r} occurs twice (row {i})")
            seen.add(ident)
            out.append({**row, "id": ident})
    except OSError as e:
        raise UserError(f"{path or source} cannot be read: {one_line(e)}") from e
    if not out:
        raise UserError(f"{path or source} holds no rows")
    return out


def divided(place: str) -> tuple[str, str]:
    """(source, path) of a place that may be either: a source by its name, else a path."""
    return (place, "") if place.partition(":")[0] in SOURCES else ("", place)


def check_place(source: str, path: str) -> None:
    """Raises UserError where `read` would find nothing to open: of what costs more than a look at
    a directory it says nothing."""
    if not path:
        if (kind := source.partition(":")[0]) not in SOURCES:
            raise UserError(
                f"data.source {source!r} is unknown, {nearest(kind, SOURCES)}; "
                "a file is given as data.path"
            )
        return
    file = path_of(path)
    if file.suffix not in _READERS:
        raise UserError(
            f"data file {path}: ending {file.suffix!r} is unknown, {nearest(file.suffix, _READERS)}"
        )
    if not file.exists():
        if not file.parent.is_dir():
            raise UserError(f"data file {file} does not exist, nor does its directory")
        there = [p.name for p in file.parent.iterdir() if not p.name.startswith(".")]
        raise UserError(f"data file {file} does not exist, {nearest(file.name, there)}")
    if file.is_dir():
        raise UserError(f"data file {file} is a directory")


def _jsonl(file: pathlib.Path) -> Iterator[Row]:
    with file.open("rb") as f:  # bytes, so that a line that is not UTF-8 is named as well
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as e:
                raise UserError(f"{file}, line {number}: not JSON: {one_line(e)}") from e
            if not isinstance(row, dict):
                shown = line.strip()[:60].decode(errors="replace")
                raise UserError(f"{file}, line {number}: expected an object, got {shown!r}")
            yield {LINE: number, **row}


def _json(file: pathlib.Path) -> Iterable[Row]:
    try:
        rows = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as e:
        raise UserError(f"{file}: not JSON: {one_line(e)} (one object a line is .jsonl)") from e
    if not isinstance(rows, list) or not all(isinstance(r, dict) for r in rows):
        raise UserError(f"{file}: expected a list of objects (one object a line is .jsonl)")
    return rows


def _parquet(file: pathlib.Path) -> Iterable[Row]:
    try:
        with file.open("rb") as f:
            return pyarrow.parquet.read_table(f).to_pylist()
    except (pyarrow.ArrowException, ValueError, OverflowError) as e:  # text that is no UTF-8, ...
        raise UserError(f"{file}: not a Parquet file: {one_line(e)}") from e


def _generated(argument: str) -> Iterable[Row]:
    if not argument.isdecimal():
        raise UserError(f"data.source 'generated:{argument}': expected a count, e.g. generated:600")
    return generated.problems(int(argument))


def _tfds(argument: str) -> Iterator[Row]:
    """'NAME[[/CONFIG]/SPLIT]' or 'huggingface:ORG/NAME[[/CONFIG]/SPLIT]', the split 'train' if none
    is given; downloaded and prepared where it is not yet.

    array_record is the one file format that tfds reads and writes without TensorFlow.
    """
    import tensorflow_datasets as tfds

    # tfds' own import of these stops, silently, at the first module that needs TensorFlow.
    for part in ("text", "question_answering", "summarization", "translate"):
        importlib.import_module(f"tensorflow_datasets.{part}")
    hub = argument.startswith(HUB)
    parts = argument.removeprefix(HUB).split("/")
    own = 2 if hub else 1  # how many parts name the data set itself
    split = parts.pop() if len(parts) > own else "train"
    name = "/".join(parts)
    if hub and len(parts) < 2:
        raise UserError(f"data.source 'tfds:{argument}': expected tfds:{HUB}ORG/NAME[/SPLIT]")
    try:
        if hub:
            builder = _hub_builder("/".join(parts[:2]), "/".join(parts[2:]) or None)
        else:
            builder = tfds.builder(name, file_format="array_record")
        try:
            builder.download_and_prepare()
        except Exception:  # another process of this run may have been first
            if not builder.data_path.exists():
                raise
        rows = builder.as_data_source(split=split)
    except tfds.core.DatasetNotFoundError as e:
        known = nearest(name, tfds.list_builders(with_community_datasets=False))
        raise UserError(f"TensorFlow Datasets has no {name!r}, {known}") from e
    except Exception as e:  # tfds has no common base of its errors
        causes = dict.fromkeys(f"{type(x).__name__}: {one_line(x)}" for x in (e, e.__cause__) if x)
        raise UserError(
            f"TensorFlow Datasets cannot give {argument!r}, split {split!r} (the last part, behind "
            f"any configuration): {'; '.join(causes)}; a local copy can be read with data.path"
        ) from e
    for i, row in enumerate(rows):
        fields = {k: _plain(v) for k, v in row.items()}
        yield {"id": f"{name.replace('/', '-')}-{split}-{i:06d}", **fields}


def _hub_builder(repository: str, config: str | None) -> Any:
    """tfds' builder of a Hugging Face data set; made directly, because tfds.builder would list
    every data set of the hub to find out how the name is capitalised."""
    from tensorflow_datasets.core.dataset_builders import huggingface_dataset_builder

    return huggingface_dataset_builder.HuggingfaceDatasetBuilder(
        hf_repo_id=repository, hf_config=config, file_format="array_record"
    )


def _plain(value: Any) -> Any:
    """A field of tfds as text, a plain number, or lists and objects of them."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value  # a template that uses it says that it is no text
    if isinstance(value, (np.ndarray, np.generic)):
        return _plain(value.tolist())
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, dict):
        columns = {k: _plain(v) for k, v in value.items()}
        lengths = {len(v) if isinstance(v, list) else None for v in columns.values()}
        if len(lengths) == 1 and None not in lengths:  # tfds' form of a list of objects
            return [
                dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)
            ]
        return columns
    return value


SOURCES: dict[str, Callable[[str], Iterable[Row]]] = {"tfds": _tfds, "generated": _generated}
_READERS: dict[str, Callable[[pathlib.Path], Iterable[Row]]] = {
    ".jsonl": _jsonl,  # one object a line
    ".json": _json,  # a list of objects
    ".parquet": _parquet,
}
