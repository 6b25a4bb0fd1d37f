"""Adapters and weights on disk: PEFT folders, sources, merging and unmerging. torch and safetensors only."""
