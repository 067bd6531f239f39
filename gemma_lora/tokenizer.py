"""Text to token ids and back: Gemma's SentencePiece vocabularies and Qwen2's byte-level BPE.

A vocabulary comes from GGUF metadata, a SentencePiece `tokenizer.model` or a Hugging Face
`tokenizer.json`; all three end as one `tokenizers` backend, whose ids are those of transformers.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import tokenizers

from gemma_lora.errors import UserError, nearest
from gemma_lora.files import cache_dir, replace_file

# Piece types, numbered alike in SentencePiece's ModelProto and in GGUF's tokenizer.ggml.token_type.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4

# The pattern in Qwen2's own tokenizer.json.
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_CACHE_VERSION = 1  # part of the cache key; raise it when _sentencepiece_json changes its output


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A vocabulary with its special ids.

    `pad_id` is `eos_id` where the vocabulary names no padding token. `add_bos` says whether the
    model was trained with BOS before every text; no method here adds it.
    """

    backend: tokenizers.Tokenizer = dataclasses.field(repr=False)
    bos_id: int | None
    eos_id: int
    pad_id: int
    add_bos: bool

    @property
    def vocab_size(self) -> int:
        """Number of ids; the embedding may have more rows."""
        return self.backend.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; adds nothing, but `<eos>` written in the text is the EOS token."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[tokenizers.Encoding]:
        """As `encode`, in parallel; each result has `.ids` and `.offsets`.

        `offsets[i]` is token i's (start, end) in characters of the text. Tokens that share a
        character each get all of it; of characters that Qwen2's NFC joins, only the first counts.
        """
        return self.backend.encode_batch(list(texts), add_special_tokens=False)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD, unknown ids nothing."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes tokenizer.json and tokenizer_config.json, for `from_dir` and for transformers."""
        piece = self.backend.id_to_token
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": None if self.bos_id is None else piece(self.bos_id),
            "eos_token": piece(self.eos_id),
            "pad_token": piece(self.pad_id),
            "add_bos_token": self.add_bos,
            "clean_up_tokenization_spaces": False,
        }
        with replace_file(Path(folder) / "tokenizer.json") as temp:
            self.backend.save(str(temp))
        with replace_file(Path(folder) / "tokenizer_config.json") as temp:
            temp.write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def from_pieces(
        cls,
        pieces: Sequence[str],
        scores: Sequence[float] | np.ndarray,
        types: Sequence[int] | np.ndarray,
        *,
        bos_id: int | None,
        eos_id: int,
        pad_id: int | None,
        add_bos: bool,
    ) -> Self:
        """A SentencePiece-BPE vocabulary without prefix space, as every Gemma has it.

        The backend is kept in the cache folder under a hash of its inputs; a damaged or unwritable
        cache only costs the time to build it again.
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
        named = _check_ids(bos_id, eos_id, pad_id, size=len(pieces))
        # GGUF spells runs of spaces with spaces; the normaliser turns those of the text into "▁".
        pieces = ["▁" * len(p) if p and not p.strip(" ") else p for p in pieces]
        added = _added(pieces, types, named)
        bos = bos_id if add_bos else None
        inputs = json.dumps([_CACHE_VERSION, pieces, added, bos], ensure_ascii=False)
        digest = hashlib.sha256(inputs.encode()).hexdigest()
        backend = _cached(
            cache_dir() / f"tokenizer-{digest[:32]}.json",
            lambda: _sentencepiece_json(pieces, added, bos),
            size=len(pieces),
        )
        return cls(backend, bos_id, eos_id, eos_id if pad_id is None else pad_id, add_bos)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Self:
        """From GGUF metadata: tokenizer.ggml.model 'llama' (SentencePiece), or 'gpt2' of Qwen2."""

        def get(key: str) -> Any:
            try:
                return metadata[f"tokenizer.ggml.{key}"]
            except KeyError:
                raise UserError(
                    f"the GGUF metadata has no tokenizer.ggml.{key}; use a complete GGUF of a "
                    "Gemma or Qwen2 model"
                ) from None

        kind, pieces, types, eos_id = (
            get(k) for k in ("model", "tokens", "token_type", "eos_token_id")
        )
        bos_id = metadata.get("tokenizer.ggml.bos_token_id")
        pad_id = metadata.get("tokenizer.ggml.padding_token_id")
        add_bos = bos_id is not None and bool(
            metadata.get("tokenizer.ggml.add_bos_token", kind == "llama")
        )
        if kind == "llama":
            if metadata.get("tokenizer.ggml.add_space_prefix", False):
                raise UserError(
                    "the GGUF's tokenizer puts a space before the text (add_space_prefix); only "
                    "Gemma's, which does not, is supported: use the model's tokenizer.json instead"
                )
            return cls.from_pieces(
                pieces,
                get("scores"),
                types,
                bos_id=bos_id,
                eos_id=eos_id,
                pad_id=pad_id,
                add_bos=add_bos,
            )
        if kind != "gpt2":
            raise UserError(
                f"the GGUF's tokenizer.ggml.model is {kind!r}: {nearest(kind, ['llama', 'gpt2'])}"
            )
        if (pre := get("pre")) != "qwen2":
            raise UserError(
                f"the GGUF's tokenizer.ggml.pre is {pre!r}; of the byte-level vocabularies only "
                "'qwen2' is supported: use the model's tokenizer.json instead"
            )
        added = _added(pieces, types, _check_ids(bos_id, eos_id, pad_id, size=len(pieces)))
        text = _backend_json(
            pieces,
            get("merges"),
            added,
            bos_id if add_bos else None,
            model={"byte_fallback": False, "fuse_unk": False},
            # Qwen2's tokenizer.json has NFC; a GGUF cannot say so.
            normalizer={"type": "NFC"},
            pre_tokenizer={
                "type": "Sequence",
                "pretokenizers": [
                    {
                        "type": "Split",
                        "pattern": {"Regex": _QWEN2_SPLIT},
                        "behavior": "Isolated",
                        "invert": False,
                    },
                    _BYTE_LEVEL,
                ],
            },
            decoder=_BYTE_LEVEL,
        )
        backend = tokenizers.Tokenizer.from_str(text)
        return cls(backend, bos_id, eos_id, eos_id if pad_id is None else pad_id, add_bos)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Self:
        """From a SentencePiece `tokenizer.model` of Gemma's kind: BPE, identity, no space added."""
        from sentencepiece import sentencepiece_model_pb2

        proto = sentencepiece_model_pb2.ModelProto()
        try:
            proto.ParseFromString(Path(path).read_bytes())
        except OSError as e:
            raise UserError(f"cannot read {path}: {e.strerror}; give a tokenizer.model") from None
        except Exception as e:  # protobuf's DecodeError differs between its implementations
            raise UserError(
                f"{path} is not a SentencePiece model ({e}); get the file again"
            ) from None
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
        return cls.from_pieces(
            [p.piece for p in proto.pieces],
            [p.score for p in proto.pieces],
            [p.type for p in proto.pieces],
            bos_id=bos,
            eos_id=eos,
            pad_id=pad,
            add_bos=bos is not None,
        )

    @classmethod
    def from_dir(cls, folder: str | os.PathLike[str]) -> Self:
        """From a Hugging Face folder: tokenizer.json, or else tokenizer.model.

        Special ids come from tokenizer_config.json, special_tokens_map.json, then config.json.
        """
        folder = Path(folder)
        if (path := folder / "tokenizer.json").is_file():
            try:
                backend = tokenizers.Tokenizer.from_file(str(path))
            except Exception as e:  # tokenizers raises nothing narrower
                raise UserError(
                    f"{path} cannot be read as a tokenizer ({e}); get the file again"
                ) from None
            backend.no_truncation()
            backend.no_padding()
            ids = {"bos": None, "eos": None, "pad": None}
            # Without a say in the config, what the file itself puts before a text counts.
            before = backend.encode("").ids
        elif (path := folder / "tokenizer.model").is_file():
            model = cls.from_file(path)
            backend = model.backend
            ids = {"bos": model.bos_id, "eos": model.eos_id, "pad": model.pad_id}
            before = [model.bos_id]
        else:
            raise UserError(
                f"no tokenizer in {folder}: looked for tokenizer.json and tokenizer.model; give a "
                "folder that has one of them"
            )
        config = _read_json(folder / "tokenizer_config.json")
        tokens = (config, _read_json(folder / "special_tokens_map.json"))
        numbers = _read_json(folder / "config.json")
        for name in ids:
            token = next((t for c in tokens if (t := c.get(f"{name}_token"))), None)
            number = numbers.get(f"{name}_token_id")
            if token is not None:
                content = token["content"] if isinstance(token, dict) else token
                ids[name] = backend.token_to_id(content)
                if ids[name] is None:
                    raise UserError(
                        f"{folder} names {content!r} as its {name} token, but {path.name} has no "
                        "such token; use the two files of one model"
                    )
            elif ids[name] is None and number is not None:
                ids[name] = number[0] if isinstance(number, list) else number
        if ids["eos"] is None:
            raise UserError(
                f"no end-of-text token in {folder}: looked for eos_token in tokenizer_config.json "
                "and special_tokens_map.json and eos_token_id in config.json; add one of them"
            )
        _check_ids(*ids.values(), size=backend.get_vocab_size())
        add_bos = config.get("add_bos_token")
        if add_bos is None:
            add_bos = before[:1] == [ids["bos"]]
        return cls(
            backend,
            ids["bos"],
            ids["eos"],
            ids["eos"] if ids["pad"] is None else ids["pad"],
            ids["bos"] is not None and add_bos,
        )


_BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": False,
    "use_regex": False,
}


def _check_ids(bos_id: int | None, eos_id: int, pad_id: int | None, *, size: int) -> set[int]:
    """The ids that are not None, as a set; UserError for one outside the vocabulary."""
    ids = {i for i in (bos_id, eos_id, pad_id) if i is not None}
    if wrong := [i for i in ids if not 0 <= i < size]:
        raise UserError(
            f"special token id {wrong[0]} is outside the vocabulary of {size} pieces; use the "
            "tokenizer files of one model"
        )
    return ids


def _added(pieces: Sequence[str], types: Any, named: set[int]) -> dict[int, bool]:
    """Ids of pieces matched whole in the text, each with whether it is a special token.

    Runs of spaces are left to the merges, which the normaliser's "▁" reaches.
    """
    special = named.union(np.flatnonzero(np.isin(types, (_UNKNOWN, _CONTROL))).tolist())
    whole = special.union(np.flatnonzero(np.equal(types, _USER_DEFINED)).tolist())
    return {i: i in special for i in sorted(whole) if pieces[i].strip("▁")}


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


def _sentencepiece_json(pieces: Sequence[str], added: Mapping[int, bool], bos: int | None) -> str:
    """tokenizer.json of a SentencePiece-BPE vocabulary, with the merges its pieces imply.

    SentencePiece joins whichever neighbours make the best piece; the same choice as merges is every
    way to cut a piece in two pieces, ranked by the joined piece, then longest left part first. This
    is the order transformers uses, so ids agree with it, and with SentencePiece but for runs of
    spaces longer than the longest such piece, which SentencePiece cuts from the left.
    """
    vocab = set(pieces)
    merges = [
        f"{left} {right}"
        for p in pieces
        if " " not in p  # the normaliser leaves no space to join
        for i in range(len(p) - 1, 0, -1)
        if (left := p[:i]) in vocab and (right := p[i:]) in vocab
    ]
    return _backend_json(
        pieces,
        merges,
        added,
        bos,
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


def _backend_json(
    pieces: Sequence[str],
    merges: Sequence[str],
    added: Mapping[int, bool],
    bos: int | None,
    *,
    model: Mapping[str, Any],
    **parts: Any,
) -> str:
    """A tokenizer.json; `added` as from `_added`, `parts` its other entries.

    Merges are 'left right' strings: the file loads a third faster than with pairs.
    """
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    post = None
    if bos is not None:
        token = pieces[bos]
        start = {"SpecialToken": {"id": token, "type_id": 0}}
        a, b = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
        post = {
            "type": "TemplateProcessing",
            "single": [start, a],
            "pair": [start, a, b],
            "special_tokens": {token: {"id": token, "ids": [bos], "tokens": [token]}},
        }
    spec = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": pieces[i], "special": special, **flags}
            for i, special in added.items()
        ],
        "post_processor": post,
        "model": {
            "type": "BPE",
            "unk_token": None,
            **model,
            "vocab": {p: i for i, p in enumerate(pieces)},
            "merges": list(merges),
        },
        **parts,
    }
    return json.dumps(spec, ensure_ascii=False, separators=(",", ":"))


def _read_json(path: Path) -> dict[str, Any]:
    """The object in `path`; empty where there is no such file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as e:
        raise UserError(f"{path} is not valid JSON ({e}); get the file again") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} holds a JSON {type(found).__name__}, not an object; get it again")
    return found
