"""LoRA fine-tuning of Gemma and Qwen2 in JAX."""
