"""Small tokenizers: one token a character, Gemma's SentencePiece kind, Qwen2's byte-level kind."""

import json
import random
from pathlib import Path
from typing import Any

import common
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from gemma_lora.tokenizer import Tokenizer

SPECIALS = ("<pad>", "<eos>", "<bos>", "<unk>")  # ids 0 to 3, as tiny.py's config.json says
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))  # ids 4 to 99; all others are <unk>
TURNS = ("<start_of_turn>", "<end_of_turn>")  # ids 100 and 101: such a vocabulary has chat
CORPUS = [
    "The cat sat on the mat, and the dog sat on the log.",
    "def add(a, b):\n    return a + b\n",
    "Café naïve: 12 + 30 = 42; 漢字かな 😀",
    "  two  spaces\tand tabs\n\nand newlines",
]


def write_tokenizer(directory: str | Path) -> None:
    """A token a character, for the tiny checkpoints with their 128 ids; from_dir adds BOS."""
    vocab = {piece: i for i, piece in enumerate((*SPECIALS, *CHARACTERS, *TURNS))}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()  # the default joins tokens with spaces
    backend.add_special_tokens([*SPECIALS, *TURNS])
    Path(directory).mkdir(parents=True, exist_ok=True)
    Tokenizer(backend, bos_id=2, eos_id=1, pad_id=0, add_bos=True).save(directory)


def write_sentencepiece(path: Path) -> Path:
    """A small tokenizer.model trained with Gemma's settings."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as f:
        common.needs("sentencepiece").SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS * 5),
            model_writer=f,
            model_type="bpe",
            vocab_size=424,
            hard_vocab_limit=False,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            user_defined_symbols=[*TURNS, "\n", "\n\n", "▁▁", "▁▁▁", "</iframe>"],
            pad_id=0,
            eos_id=1,
            bos_id=2,
            unk_id=3,
            pad_piece="<pad>",
            eos_piece="<eos>",
            bos_piece="<bos>",
            minloglevel=2,
        )
    return path


def qwen_metadata() -> dict[str, Any]:
    """GGUF metadata of a small byte-level vocabulary with Qwen2's special tokens."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.train_from_iterator(
        CORPUS * 5,
        trainers.BpeTrainer(
            vocab_size=400,
            show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        ),
    )
    model = json.loads(backend.to_str())["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].get)
    n = len(pieces)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [*pieces, "<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        "tokenizer.ggml.token_type": np.array([1] * n + [3] * 3, np.int32),
        "tokenizer.ggml.merges": [" ".join(m) for m in model["merges"]],
        "tokenizer.ggml.bos_token_id": n,
        "tokenizer.ggml.eos_token_id": n + 2,
        "tokenizer.ggml.padding_token_id": n,
        "tokenizer.ggml.add_bos_token": False,
    }


def write_qwen(folder: Path, vocab: str = "vocab.json") -> list[str]:
    """The same vocabulary as `vocab` and merges.txt; returns its special tokens.

    vocab.json is Hugging Face's, without the special tokens, which its tokenizer_config.json has.
    """
    metadata = qwen_metadata()
    pieces, n = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.bos_token_id"]
    special = pieces[n:]
    folder.mkdir(parents=True, exist_ok=True)
    if vocab == "vocab.json":
        pieces = pieces[:n]
        config = {
            "tokenizer_class": "Qwen2Tokenizer",
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "added_tokens_decoder": {
                str(n + i): {"content": token, "special": True} for i, token in enumerate(special)
            },
        }
        write_json(folder / "tokenizer_config.json", config)
    write_json(folder / vocab, {p: i for i, p in enumerate(pieces)})
    lines = ["#version: 0.2", *metadata["tokenizer.ggml.merges"], ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    return special


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def noise(n: int, seed: int = 0) -> list[str]:
    """Random texts of characters that tokenizers get wrong."""
    rng = random.Random(seed)
    alphabet = " \n\tab<>/div1é漢😀\U00013000e\u0301th"
    return ["".join(rng.choices(alphabet, k=rng.randint(1, 40))) for _ in range(n)]
