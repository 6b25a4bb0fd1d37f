"""Steps per second of decoder-only training: stock, ours, and ours with the encoder's features from disk, in turns.

    python -m benchmarks.features [--model large] [--resolution 1024] [--rounds 3]

Stock is HF PEFT's LoRA in stock `SAM2Train` with the stock loss. One fixed image, whose features are cached by the
warm-up step. Prints a table and writes `runs/bench/features.json`.
"""

from sam2_lora_ext.utils.command_line import catch_interrupts, run_cli

if __name__ == "__main__":
    catch_interrupts()  # before the slow imports

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.methods import CONFIGS
from benchmarks.output import add_out, check_out, write_result
from benchmarks.timing import step_times
from sam2_lora_ext.settings.arguments import COUNT, RESOLUTION, number

METHODS = {"decoder": "stock", "decoder_lean": "ours", "decoder_cached": "ours, features from disk"}


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints; see the module."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.features", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=CONFIGS, default="large")
    parser.add_argument("--resolution", type=number(RESOLUTION), default=1024)
    parser.add_argument("--rounds", type=number(COUNT), default=3)
    add_out(parser, Path("runs/bench/features.json"))
    args = parser.parse_args(argv)
    check_out(args)
    with tempfile.TemporaryDirectory() as folder:
        shared = {"size": args.model, "resolution": args.resolution}
        builds = {method: {"method": method.replace("cached", "lean"), **shared} for method in METHODS}
        builds["decoder_cached"]["feature_cache"] = {"folder": folder, "max_gb": 1}
        times = step_times(builds, args.rounds, torch.get_num_threads())
        seconds = {method: statistics.median(values) for method, values in times.items()}
        stored = sum(path.stat().st_size for path in Path(folder).iterdir())
    print(
        f"{args.model} {args.resolution} px, decoder-only, {torch.get_num_threads()} threads; "
        f"features of an image: {stored / 1e6:.1f} MB"
    )
    rows = [
        {
            "method": method,
            "what": what,
            "step_seconds": seconds[method],
            "speed_to_stock": seconds["decoder"] / seconds[method],
        }
        for method, what in METHODS.items()
    ]
    for row in rows:
        print(
            f"  {row['what']:<26} {row['step_seconds']:8.2f} s a step   "
            f"{row['speed_to_stock']:6.2f} times stock's steps per second"
        )
    write_result(args, {"model": args.model, "resolution": args.resolution, "bytes_per_image": stored, "rows": rows})
    print(f"written {args.out}")


if __name__ == "__main__":
    run_cli(main)
