"""Text to token ids and back, and conversations to text, with the ids of transformers."""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import tokenizers

from gemma_lora import chat, vocabulary
from gemma_lora.errors import UserError
from gemma_lora.files import read_json, replace_file, write_text
from gemma_lora.vocabulary import Vocabulary


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A vocabulary with its special ids and its chat template.

    `pad_id` is `eos_id` where the vocabulary names no padding token. `add_bos` says whether the
    model was trained with BOS before every text; no method here adds it.
    """

    backend: tokenizers.Tokenizer = dataclasses.field(repr=False)
    bos_id: int | None
    eos_id: int
    pad_id: int
    add_bos: bool
    chat_template: str | None = dataclasses.field(default=None, repr=False)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of all that decides the ids of a text or of a conversation."""
        rest = [self.bos_id, self.eos_id, self.add_bos, self.chat_template]
        return hashlib.sha256(f"{rest}{self.backend.to_str()}".encode()).hexdigest()

    @functools.cached_property
    def control_ids(self) -> frozenset[int]:
        """Ids of special tokens and of tokens that the chat template writes, e.g. <end_of_turn>."""
        template = self.chat_template or ""
        return frozenset(
            i
            for i, token in self.backend.get_added_tokens_decoder().items()
            if token.special or (token.content in template and not token.content.isspace())
        )

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

    def render_chat(
        self,
        messages: Sequence[chat.Message],
        *,
        tools: Sequence[Any] = (),
        add_generation_prompt: bool = False,
    ) -> str:
        """The conversation as text, control tokens written out; BOS too where the model has it.

        tools: the schemas of functions that the template may name.

        Raises UserError where there is no chat template, or it refuses the messages.
        """
        if self.chat_template is None:
            raise UserError(
                "the tokenizer has no chat template: give one as chat_template in "
                "tokenizer_config.json or as chat_template.jinja beside it, or set data.chat=False "
                f"(built in for vocabularies with {' or '.join(chat.BUILT_IN)})"
            )
        return chat.render(
            self.chat_template,
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            bos_token="" if self.bos_id is None else self.backend.id_to_token(self.bos_id),
            eos_token=self.backend.id_to_token(self.eos_id),
        )

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
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        with replace_file(Path(folder) / "tokenizer.json") as temp:
            self.backend.save(str(temp))
        text = json.dumps(config, indent=2, ensure_ascii=False)
        write_text(Path(folder) / "tokenizer_config.json", text)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Self:
        """From GGUF metadata: tokenizer.ggml.model 'llama' (SentencePiece), or 'gpt2' of Qwen2."""
        template = metadata.get("tokenizer.chat_template")
        return cls._from_vocabulary(vocabulary.from_gguf(metadata), template)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Self:
        """From a SentencePiece `tokenizer.model` of Gemma's kind: BPE, identity, no space added."""
        return cls._from_vocabulary(vocabulary.from_sentencepiece(Path(path)), None)

    @classmethod
    def from_dir(cls, folder: str | os.PathLike[str]) -> Self:
        """From a folder of Hugging Face files, a Keras preset, or one of official Flax weights.

        Special ids come from tokenizer_config.json, special_tokens_map.json, then config.json; the
        chat template from chat_template.jinja, then tokenizer_config.json.
        """
        folder = Path(folder)
        config = read_json(folder / "tokenizer_config.json")
        found, origin = _find(folder, config)
        tokens = (config, read_json(folder / "special_tokens_map.json"))
        numbers = read_json(folder / "config.json")
        ids = {}
        for name in ("bos", "eos", "pad"):
            ids[f"{name}_id"] = getattr(found, f"{name}_id")
            token = next((t for c in tokens if (t := c.get(f"{name}_token"))), None)
            number = numbers.get(f"{name}_token_id")
            if token is not None:
                content = token.get("content") if isinstance(token, dict) else token
                if not isinstance(content, str):
                    raise UserError(f"{folder}: its {name}_token is {token!r}, expected text")
                ids[f"{name}_id"] = found.backend.token_to_id(content)
                if ids[f"{name}_id"] is None:
                    raise UserError(
                        f"{folder} names {content!r} as its {name} token, but {origin.name} has no "
                        "such token; use the two files of one model"
                    )
            elif name == "bos" and "bos_token" in config:
                ids["bos_id"] = None  # Qwen2 has none, whatever its config.json says
            elif ids[f"{name}_id"] is None and number is not None:
                first = number[0] if isinstance(number, list) and number else number
                if not isinstance(first, int):
                    raise UserError(
                        f"{folder}: {name}_token_id of config.json is {number!r}, expected a number"
                    )
                ids[f"{name}_id"] = first
        if ids["eos_id"] is None:
            raise UserError(
                f"no end-of-text token in {folder}: looked for eos_token in tokenizer_config.json "
                "and special_tokens_map.json and eos_token_id in config.json; add one of them"
            )
        # Where the config says nothing, what the file itself puts before a text counts.
        add_bos = config.get("add_bos_token")
        if add_bos is None:
            add_bos = found.first_id == ids["bos_id"]
        first = ids["bos_id"] if add_bos else None
        return cls._from_vocabulary(
            found._replace(first_id=first, **ids), _chat_template(folder, config)
        )

    @classmethod
    def _from_vocabulary(cls, found: Vocabulary, template: str | None) -> Self:
        vocabulary.check_ids(*found[1:], size=found.backend.get_vocab_size())
        if template is None:
            template = next(
                (t for m, t in chat.BUILT_IN.items() if found.backend.token_to_id(m) is not None),
                None,
            )
        pad = found.eos_id if found.pad_id is None else found.pad_id
        add_bos = found.first_id is not None
        return cls(found.backend, found.bos_id, found.eos_id, pad, add_bos, template)


def _find(folder: Path, config: Mapping[str, Any]) -> tuple[Vocabulary, Path]:
    """(the vocabulary of a folder, the file that it comes from); UserError where there is none."""
    keras = folder / "assets" / "tokenizer"
    plain = folder / "tokenizer.json"
    if plain.is_file():
        # A Keras preset has a file of that name, too: the settings of a class.
        settings = read_json(plain) if (folder / "assets").is_dir() else {}
        if "class_name" not in settings:
            return vocabulary.from_json(plain), plain
        if (path := keras / "vocabulary.spm").is_file():
            return vocabulary.from_sentencepiece(path), path
        path = keras / "vocabulary.json"
        known = read_json(path)
        special = ["<|endoftext|>", *(settings.get("config", {}).get("unsplittable_tokens") or ())]
        added = {token: (known[token], True) for token in special if token in known}
        found = vocabulary.from_merges(path, keras / "merges.txt", added)
        # Keras' Qwen2 tokenizer ends texts so, and its settings do not say it.
        return found._replace(eos_id=known.get("<|endoftext|>")), path
    stated = {
        token["content"]: (int(i), bool(token.get("special")))
        for i, token in config.get("added_tokens_decoder", {}).items()
    }
    listed = read_json(folder / "added_tokens.json")
    if (path := folder / "vocab.json").is_file():
        added = {**{token: (i, True) for token, i in listed.items()}, **stated}
        return vocabulary.from_merges(path, folder / "merges.txt", added), path
    # Official Flax weights have it in the folder, or beside the folder of the arrays.
    for path in (folder / "tokenizer.model", folder.parent / "tokenizer.model"):
        if path.is_file():
            found = vocabulary.from_sentencepiece(path)
            more = [t for t in {**listed, **stated} if found.backend.token_to_id(t) is None]
            if more:
                raise UserError(
                    f"{folder} adds tokens that {path.name} has not ({', '.join(more[:5])}): "
                    "expected tokenizer.json, which transformers' save_pretrained of a fast "
                    "tokenizer writes"
                )
            return found, path
    raise UserError(
        f"no tokenizer in {folder}: looked for tokenizer.json, vocab.json with merges.txt, and "
        "tokenizer.model (also in the folder above); give a folder that has one of them"
    )


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, or the config's: a string, or a list of which 'default' counts."""
    if (path := folder / "chat_template.jinja").is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeError as e:
            raise UserError(f"{path} is not UTF-8 ({e}); get the file again") from e
    found = config.get("chat_template")
    if isinstance(found, list) and all(isinstance(t, dict) for t in found):
        named = {t.get("name"): t.get("template") for t in found}
        if "default" not in named:
            raise UserError(
                f"{folder / 'tokenizer_config.json'}: none of the chat templates is named default "
                f"({', '.join(map(str, named))}); put the one to be taken into chat_template.jinja"
            )
        found = named["default"]
        if "tool_use" in named:  # transformers' choice for rows with tools
            found = f"{{% if tools %}}{named['tool_use']}{{% else %}}{found}{{% endif %}}"
    if not isinstance(found, str | None):
        raise UserError(
            f"{folder / 'tokenizer_config.json'}: chat_template is a {type(found).__name__}, "
            "expected text or a list of {name, template}"
        )
    return found
