"""Gemma 2B on IMDB: the sentiment of a review as a word; class accuracy beside token accuracy."""

from gemma_lora.config import default


def get_config():
    c = default()
    c.arch = "gemma_2b"
    c.weights = "hf:google/gemma-2b"
    c.seed = 42
    c.data.source = "tfds:imdb_reviews"
    c.data.labels = ("negative", "positive")
    c.data.seq_len = 1024  # TRL's default; longer reviews lose their end, never their label
    return c
