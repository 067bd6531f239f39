"""A tokenizer of one token a character, for the tiny checkpoints with their 128 ids."""

from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from gemma_lora.tokenizer import Tokenizer

SPECIALS = ("<pad>", "<eos>", "<bos>", "<unk>")  # ids 0 to 3, as tiny.py's config.json says
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))  # ids 4 to 99; all others are <unk>


def write_tokenizer(directory: str | Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json; Tokenizer.from_dir reads them, add_bos."""
    vocab = {piece: i for i, piece in enumerate((*SPECIALS, *CHARACTERS))}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()  # the default joins tokens with spaces
    backend.add_special_tokens(list(SPECIALS))
    Path(directory).mkdir(parents=True, exist_ok=True)
    Tokenizer(backend, bos_id=2, eos_id=1, pad_id=0, add_bos=True).save(directory)
