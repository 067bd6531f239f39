"""Pretrained weights: one module a format, each a lazy set of named tensors; one mapping."""
