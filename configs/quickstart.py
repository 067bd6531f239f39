"""Gemma 3 270M on generated word problems: minutes on two CPU cores."""

from gemma_lora.config import default


def get_config():
    c = default()
    c.arch = "gemma3_270m"
    c.weights = "demo"
    c.data.source = "generated:600"
    c.data.loss_on = "completion"
    c.dtype = "float32"  # the faster one on a CPU without bfloat16 matrix units
    c.data.seq_len = 192
    c.data.batch_size = 4
    c.data.pack = True
    c.train.max_steps = 20
    c.train.eval_every = 10
    c.train.eval_examples = 24
    c.train.patience = 0
    return c
