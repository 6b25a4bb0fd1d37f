"""Formats and precisions of written weights, for command lines that must not import torch."""

WEIGHT_FORMATS = ("pt", "safetensors")
DTYPES = ("float32", "float16", "bfloat16")
LARGEST_ERROR = 0.01
"""Largest error of a layer that `unmerge` recovers, as a share of its change."""
