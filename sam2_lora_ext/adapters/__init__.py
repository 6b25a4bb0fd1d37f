"""Adapters and weights on disk: PEFT folders, sources, merging and its way back. torch and safetensors only."""
