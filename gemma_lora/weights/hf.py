"""Hugging Face safetensors, one file or shards, memory-mapped so that only used pages are read."""

import json
import math
import pathlib
import re
from typing import Any

import ml_dtypes
import numpy as np

from gemma_lora.errors import UserError

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F64": np.dtype(np.float64),
}
# Multimodal Gemma 3 puts the text model into a larger one, under names that transformers has moved.
_PREFIXES = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
}
_VISION = ("vision_tower.", "multi_modal_projector.")


class Safetensors:
    """Tensors of one .safetensors file, or of all the files of a directory.

    `read` returns views into the memory-mapped files (safetensors' own reader copies a tensor
    whole, which a host that needs one slice of it should not pay for). Names are those of the text
    model alone; `vision` counts the tensors of image parts, which are left out. Raises UserError
    for files that are missing, truncated, or hold a dtype that is not floating point.
    """

    def __init__(self, path: str | pathlib.Path):
        path = pathlib.Path(path)
        self._where: dict[str, tuple[pathlib.Path, dict[str, Any], int]] = {}
        self.vision = 0
        for file in _files(path):
            header, start = _header(file)
            for name, entry in header.items():
                if name.removeprefix("model.").startswith(_VISION):
                    self.vision += 1
                    continue
                for prefix, ours in _PREFIXES.items():
                    if name.startswith(prefix):
                        name = ours + name.removeprefix(prefix)
                if name in self._where:
                    raise UserError(f"tensor {name} is in {self._where[name][0]} and in {file}")
                self._where[name] = (file, entry, start)

    def names(self) -> list[str]:
        return list(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._where[name][1]["shape"])

    def read(self, name: str) -> np.ndarray:
        file, entry, start = self._where[name]
        if entry["dtype"] not in DTYPES:
            raise UserError(
                f"{file}: tensor {name} is {entry['dtype']}, expected one of {', '.join(DTYPES)}"
            )
        begin, end = entry["data_offsets"]
        # A map of its own for each tensor: its pages are given back when the tensor is dropped.
        data = np.memmap(file, np.uint8, "r", offset=start + begin, shape=(end - begin,))
        return data.view(DTYPES[entry["dtype"]]).reshape(entry["shape"])


def _files(path: pathlib.Path) -> list[pathlib.Path]:
    if path.is_file():
        found = re.search(r"-\d{5}-of-(\d{5})\.safetensors$", path.name)
        if found and int(found[1]) > 1:
            raise UserError(
                f"{path} is one of {int(found[1])} shards: expected the directory that has them all"
            )
        return [path]
    # Where both are there, transformers takes the one file, too.
    if (path / "model.safetensors").exists():
        return [path / "model.safetensors"]
    index = path / "model.safetensors.index.json"
    if index.exists():
        try:
            names = json.loads(index.read_text())["weight_map"].values()
            shards = sorted({path / name for name in names})
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise UserError(f"{index} is corrupt: expected an object with a weight_map") from e
        if not shards:
            raise UserError(f"{index} is corrupt: its weight_map is empty")
        if missing := [s.name for s in shards if not s.exists()]:
            raise UserError(f"{index} names shards that are not there: {', '.join(missing)}")
        return shards
    raise UserError(
        f"no weights in {path}: expected model.safetensors or model.safetensors.index.json"
    )


def _header(file: pathlib.Path) -> tuple[dict[str, Any], int]:
    """(name -> entry, offset of the data): 8 bytes of length, then JSON, then the tensors."""
    try:
        size = file.stat().st_size
        with file.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or 8 + length > size:
                raise UserError(f"{file} is no safetensors file, or is truncated ({size:,} bytes)")
            text = f.read(length)
    except OSError as e:
        raise UserError(f"cannot read {file}: {e.strerror}") from e
    try:
        header = json.loads(text)
    except ValueError as e:
        raise UserError(f"{file} is no safetensors file: its header is not JSON ({e})") from e
    try:
        header.pop("__metadata__", None)
        spans = [(n, e["dtype"], e["shape"], *e["data_offsets"][:2]) for n, e in header.items()]
        end = max((span[4] for span in spans), default=0)
        wrong = [
            f"{name} is {dtype} {shape} in {stop - begin:,} bytes"
            for name, dtype, shape, begin, stop in spans
            if dtype in DTYPES and math.prod(shape) * DTYPES[dtype].itemsize != stop - begin
        ]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as e:
        raise UserError(f"{file} is corrupt: its header does not describe tensors") from e
    if 8 + length + end != size:
        raise UserError(f"{file} is corrupt: {size:,} bytes, its header says {8 + length + end:,}")
    if wrong:
        raise UserError(f"{file} is corrupt: tensor {wrong[0]}")
    return header, 8 + length
