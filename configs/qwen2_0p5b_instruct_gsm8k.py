"""Qwen2 0.5B Instruct on GSM8K: question and answer as turns of its chat."""

from gemma_lora.config import default


def get_config():
    c = default()
    c.arch = "qwen2_0p5b"
    c.weights = "hf:Qwen/Qwen2-0.5B-Instruct"
    c.seed = 42
    c.data.source = "tfds:gsm8k"
    c.data.chat = True
    c.data.seq_len = 640  # the longest problem has 544 tokens in Gemma's vocabulary; and the turns
    return c
