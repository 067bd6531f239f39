"""Gemma 3 270M on GSM8K: the shared recipe on the smallest real model."""

from gemma_lora.config import default


def get_config():
    c = default()
    c.arch = "gemma3_270m"
    c.weights = "demo"
    c.data.source = "tfds:gsm8k"
    c.data.seq_len = 256
    c.data.batch_size = 8
    c.train.eval_examples = 100  # of each set: minutes an evaluation on a CPU; 0 takes all
    return c
