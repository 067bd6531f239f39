"""LoRA fine-tuning of Gemma and Qwen2 in JAX."""

import time

STARTED = time.perf_counter()  # when the program began, but for the interpreter's own start
