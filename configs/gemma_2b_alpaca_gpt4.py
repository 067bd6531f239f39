"""Gemma 2B on alpaca-gpt4: instructions, the loss on all tokens."""

from gemma_lora.config import default


def get_config():
    c = default()
    c.arch = "gemma_2b"
    c.weights = "hf:google/gemma-2b"
    c.seed = 42
    c.data.source = "tfds:huggingface:vicgalle/alpaca-gpt4"
    c.data.seq_len = 1024  # TRL's default
    return c
