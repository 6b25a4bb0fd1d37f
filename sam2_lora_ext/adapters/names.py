"""Formats and precisions of written weights, for command lines that must not import torch."""

WEIGHT_FORMATS = ("pt", "safetensors")
DTYPES = ("float32", "float16", "bfloat16")
LARGEST_ERROR = 0.01
"""Of a recovered layer, as a share of its change: `unmerge`."""
