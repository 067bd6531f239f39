"""Vocabulary files -> `tokenizers` backends whose ids are those of transformers.

Gemma's vocabularies are SentencePiece BPE, Qwen2's byte-level BPE. Either may come from GGUF
metadata; else Gemma's is a `tokenizer.model`, Qwen2's a vocabulary with its merges, and a
`tokenizer.json` can hold both kinds.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers

from gemma_lora.errors import UserError, nearest
from gemma_lora.files import cache_dir, read_json, replace_file

# Piece types, numbered alike in SentencePiece's ModelProto and in GGUF's tokenizer.ggml.token_type.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4

# The pattern in Qwen2's own tokenizer.json.
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_CACHE_VERSION = 1  # part of the cache key; raise it when _sentencepiece_json changes its output


class Vocabulary(NamedTuple):
    """A backend, and what its source says of special ids; None where it says nothing."""

    backend: tokenizers.Tokenizer
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    first_id: int | None = None  # the id put before every text


def from_json(path: Path) -> Vocabulary:
    """A Hugging Face tokenizer.json; its truncation and padding are left out."""
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as e:  # tokenizers raises nothing narrower
        raise UserError(f"{path} cannot be read as a tokenizer ({e}); get the file again") from None
    backend.no_truncation()
    backend.no_padding()
    return Vocabulary(backend, first_id=next(iter(backend.encode("").ids), None))


def from_sentencepiece(path: Path) -> Vocabulary:
    """A SentencePiece model of Gemma's kind: BPE, no normalisation, no space added."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}; give a tokenizer.model") from None
    except Exception as e:  # protobuf's DecodeError differs between its implementations
        raise UserError(f"{path} is not a SentencePiece model ({e}); get the file again") from None
    train, norm = proto.trainer_spec, proto.normalizer_spec
    found = {
        "model type": (train.model_type, train.BPE),
        "add_dummy_prefix": (norm.add_dummy_prefix, False),
        "remove_extra_whitespaces": (norm.remove_extra_whitespaces, False),
        "normalisation rules": (bool(norm.precompiled_charsmap), False),
    }
    if wrong := [name for name, (got, wanted) in found.items() if got != wanted]:
        raise UserError(
            f"{path} is not a SentencePiece model of Gemma's kind: its {', '.join(wrong)} "
            "differ; use the model's tokenizer.json instead"
        )
    bos, eos, pad = (i if i >= 0 else None for i in (train.bos_id, train.eos_id, train.pad_id))
    if eos is None:
        raise UserError(f"{path} names no end-of-text piece; use a model trained with eos_id")
    backend = sentencepiece_backend(
        [p.piece for p in proto.pieces],
        [p.score for p in proto.pieces],
        [p.type for p in proto.pieces],
        check_ids(bos, eos, pad, size=len(proto.pieces)),
        bos,
    )
    return Vocabulary(backend, bos, eos, pad, first_id=bos)


def from_merges(vocab: Path, merges: Path, added: Mapping[str, tuple[int, bool]]) -> Vocabulary:
    """Qwen2's vocabulary as JSON {piece: id} and its merges, one a line.

    added: tokens matched whole in the text -> (id, is it a special token).
    """
    pieces = {**read_json(vocab), **{token: i for token, (i, _) in added.items()}}
    try:
        lines = merges.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeError) as e:
        raise UserError(f"cannot read {merges} ({e}), the merges of {vocab}") from None
    pairs = [line for line in lines if line and not line.startswith("#version")]
    return Vocabulary(_byte_level(pieces, pairs, added, None, source=str(merges)))


def from_gguf(metadata: Mapping[str, Any]) -> Vocabulary:
    """GGUF metadata: tokenizer.ggml.model 'llama' (SentencePiece), or 'gpt2' of Qwen2."""

    def get(key: str) -> Any:
        try:
            return metadata[f"tokenizer.ggml.{key}"]
        except KeyError:
            raise UserError(
                f"the GGUF metadata has no tokenizer.ggml.{key}; use a complete GGUF of a "
                "Gemma or Qwen2 model"
            ) from None

    kind, pieces, types, eos = (get(k) for k in ("model", "tokens", "token_type", "eos_token_id"))
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    pad = metadata.get("tokenizer.ggml.padding_token_id")
    add_bos = bos is not None and metadata.get("tokenizer.ggml.add_bos_token", kind == "llama")
    first = bos if add_bos else None
    named = check_ids(bos, eos, pad, size=len(pieces))
    if kind == "llama":
        if metadata.get("tokenizer.ggml.add_space_prefix", False):
            raise UserError(
                "the GGUF's tokenizer puts a space before the text (add_space_prefix); only "
                "Gemma's, which does not, is supported: use the model's tokenizer.json instead"
            )
        backend = sentencepiece_backend(pieces, get("scores"), types, named, first)
    elif kind != "gpt2":
        raise UserError(
            f"the GGUF's tokenizer.ggml.model is {kind!r}: {nearest(kind, ['llama', 'gpt2'])}"
        )
    elif (pre := get("pre")) != "qwen2":
        raise UserError(
            f"the GGUF's tokenizer.ggml.pre is {pre!r}; of the byte-level vocabularies only "
            "'qwen2' is supported: use the model's tokenizer.json instead"
        )
    else:
        vocab = {p: i for i, p in enumerate(pieces)}
        added = _added(pieces, types, named)
        backend = _byte_level(vocab, get("merges"), added, first, source="the GGUF metadata")
    return Vocabulary(backend, bos, eos, pad, first)


def check_ids(*ids: int | None, size: int) -> set[int]:
    """The ids that are not None, as a set; UserError for one outside the vocabulary."""
    found = {i for i in ids if i is not None}
    if wrong := [i for i in found if not 0 <= i < size]:
        raise UserError(
            f"special token id {wrong[0]} is outside the vocabulary of {size} pieces; use the "
            "tokenizer files of one model"
        )
    return found


def sentencepiece_backend(
    pieces: Sequence[str],
    scores: Sequence[float] | np.ndarray,
    types: Sequence[int] | np.ndarray,
    named: set[int],
    first: int | None,
) -> tokenizers.Tokenizer:
    """A SentencePiece-BPE vocabulary without prefix space, as every Gemma has it.

    named: ids of the special tokens; first: the id put before every text. The backend is kept in
    the cache folder under a hash of its inputs; a damaged or unwritable cache only costs the time
    to build it again.
    """
    types, scores = np.asarray(types), np.asarray(scores)
    if not len(pieces) == len(types) == len(scores):
        raise UserError(
            f"the vocabulary has {len(pieces)} pieces, {len(scores)} scores and {len(types)} "
            "types; expected as many of each: get the file again"
        )
    if (np.diff(scores[types == _NORMAL]) > 0).any():
        # Merges are ranked by id, which is SentencePiece's rule only while scores fall with it.
        raise UserError(
            "the vocabulary's scores do not fall from one piece to the next, as those of "
            "SentencePiece BPE do; use the model's tokenizer.json instead"
        )
    # GGUF spells runs of spaces with spaces; the normaliser turns those of the text into "▁".
    pieces = ["▁" * len(p) if p and not p.strip(" ") else p for p in pieces]
    added = _added(pieces, types, named)
    inputs = json.dumps([_CACHE_VERSION, pieces, added, first], ensure_ascii=False)
    digest = hashlib.sha256(inputs.encode()).hexdigest()
    return _cached(
        cache_dir() / f"tokenizer-{digest[:32]}.json",
        lambda: _sentencepiece_json(pieces, added, first),
        size=len(pieces),
    )


def _added(pieces: Sequence[str], types: Any, named: set[int]) -> dict[str, tuple[int, bool]]:
    """Pieces matched whole in the text -> (id, is it a special token).

    Runs of spaces are left to the merges, which the normaliser's "▁" reaches.
    """
    special = named.union(np.flatnonzero(np.isin(types, (_UNKNOWN, _CONTROL))).tolist())
    whole = special.union(np.flatnonzero(np.equal(types, _USER_DEFINED)).tolist())
    return {pieces[i]: (i, i in special) for i in sorted(whole) if pieces[i].strip("▁")}


def _cached(path: Path, build: Callable[[], str], *, size: int) -> tokenizers.Tokenizer:
    """The tokenizer kept in `path`, or the built one, which is then kept there where possible."""
    with contextlib.suppress(Exception):  # tokenizers raises nothing narrower
        backend = tokenizers.Tokenizer.from_file(str(path))
        if backend.get_vocab_size() == size:
            return backend
    text = build()
    with contextlib.suppress(OSError), replace_file(path) as temp:
        temp.write_text(text, encoding="utf-8")
    return tokenizers.Tokenizer.from_str(text)


def _sentencepiece_json(
    pieces: Sequence[str], added: Mapping[str, tuple[int, bool]], first: int | None
) -> str:
    """tokenizer.json of a SentencePiece-BPE vocabulary, with the merges its pieces imply.

    SentencePiece joins whichever neighbours make the best piece; the same choice as merges is every
    way to cut a piece in two pieces, ranked by the joined piece, then longest left part first. This
    is the order transformers uses, so ids agree with it, and with SentencePiece but for runs of
    spaces longer than the longest such piece, which SentencePiece cuts from the left.
    """
    vocab = {p: i for i, p in enumerate(pieces)}
    merges = [
        f"{left} {right}"
        for p in pieces
        if " " not in p  # the normaliser leaves no space to join
        for i in range(len(p) - 1, 0, -1)
        if (left := p[:i]) in vocab and (right := p[i:]) in vocab
    ]
    return _backend_json(
        vocab,
        merges,
        added,
        first,
        model={"byte_fallback": True, "fuse_unk": True},
        normalizer={"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        pre_tokenizer=None,
        decoder={
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
    )


def _byte_level(
    vocab: Mapping[str, int],
    merges: Sequence[str],
    added: Mapping[str, tuple[int, bool]],
    first: int | None,
    *,
    source: str,
) -> tokenizers.Tokenizer:
    """Qwen2's byte-level BPE; `source` is what an error calls the vocabulary's origin."""
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    split = {
        "type": "Split",
        "pattern": {"Regex": _QWEN2_SPLIT},
        "behavior": "Isolated",
        "invert": False,
    }
    text = _backend_json(
        vocab,
        merges,
        added,
        first,
        model={"byte_fallback": False, "fuse_unk": False},
        normalizer={"type": "NFC"},  # as in Qwen2's tokenizer.json; no other format can say so
        pre_tokenizer={"type": "Sequence", "pretokenizers": [split, byte_level]},
        decoder=byte_level,
    )
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as e:  # tokenizers raises nothing narrower
        raise UserError(f"{source}: no byte-level vocabulary ({e}); get the files again") from None


def _backend_json(
    vocab: Mapping[str, int],
    merges: Sequence[str],
    added: Mapping[str, tuple[int, bool]],
    first: int | None,
    *,
    model: Mapping[str, Any],
    **parts: Any,
) -> str:
    """A tokenizer.json; `added` as from `_added`, `parts` its other entries.

    Merges are 'left right' strings: the file loads a third faster than with pairs.
    """
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    post = None
    if first is not None:
        token = next(p for p, i in vocab.items() if i == first)
        start = {"SpecialToken": {"id": token, "type_id": 0}}
        a, b = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
        post = {
            "type": "TemplateProcessing",
            "single": [start, a],
            "pair": [start, a, b],
            "special_tokens": {token: {"id": token, "ids": [first], "tokens": [token]}},
        }
    spec = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": token, "special": special, **flags}
            for token, (i, special) in added.items()
        ],
        "post_processor": post,
        "model": {
            "type": "BPE",
            "unk_token": None,
            **model,
            "vocab": dict(vocab),
            "merges": list(merges),
        },
        **parts,
    }
    return json.dumps(spec, ensure_ascii=False, separators=(",", ":"))
