"""Gemma 2B on GSM8K: maths word problems, the loss on all tokens."""

from gemma_lora.config import default


def get_config():
    c = default()
    c.arch = "gemma_2b"
    c.weights = "hf:google/gemma-2b"
    c.seed = 42
    c.data.source = "tfds:gsm8k"
    c.data.seq_len = 576  # holds every problem: the longest has 544 tokens in Gemma's vocabulary
    return c
