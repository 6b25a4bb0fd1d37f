"""The command lines: `sam2-lora NAME`, and the same as scripts in `tools/`."""
