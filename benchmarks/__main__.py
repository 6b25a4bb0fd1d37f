"""`python -m benchmarks`, or `make bench`: the cost of a training step by method."""

from benchmarks.train_step import main
from sam2_lora_ext.errors import run_cli

if __name__ == "__main__":
    run_cli(main)
