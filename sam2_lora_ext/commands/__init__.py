"""The command lines `sam2-lora NAME`, which are also scripts in `tools/`."""
