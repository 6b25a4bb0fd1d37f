"""The cost of a training step by model, resolution, batch, dtype and method: a table and `runs/bench/train_step.json`.

    python -m benchmarks.train_step                                              all cases, counted
    python -m benchmarks.train_step --cases tiny:1024 --methods full lean --batches 1x2 --types bfloat16       two rows
    python -m benchmarks.train_step --cases tiny:512 --batches 1x2 --types float32 --timed tiny:512
        times on this CPU too

Kernels, bytes and FLOPs are counted on fake tensors, so they repeat exactly on any machine and need no memory (tests
compare them with real ones); see `benchmarks.kernels` for the definition of a kernel. GPU times are modelled from them
(`benchmarks.roofline`), not measured. Waits for the device are counted on a real step of the small model through the
Trainer (`benchmarks.waits`). `--timed` adds seconds of real steps on this CPU (`benchmarks.timing`), which do not
predict a GPU's.
"""

from sam2_lora_ext.utils.command_line import catch_interrupts, run_cli
from sam2_lora_ext.utils.errors import UserError

if __name__ == "__main__":
    catch_interrupts()  # before the slow imports

import argparse
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.counting import count
from benchmarks.methods import COMPARED, CONFIGS, METHODS
from benchmarks.output import add_out, check_out, write_result
from benchmarks.table import add_ratios, table
from benchmarks.timing import apart, resident, step_times
from benchmarks.waits import count_waits
from sam2_lora_ext.settings.arguments import COUNT, THREADS, number

CASES = ("tiny:1024", "base_plus:1024", "large:1024")
BATCHES = ("1x2", "8x3")
TYPES = ("float32", "bfloat16")


def main(argv: Sequence[str] | None = None) -> None:
    """Counts, measures and prints; see the module."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_step", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--cases", nargs="+", default=CASES, metavar="MODEL:RESOLUTION", help=f"of {', '.join(CONFIGS)}"
    )
    parser.add_argument("--methods", nargs="+", default=COMPARED, choices=METHODS)
    parser.add_argument("--batches", nargs="+", default=BATCHES, metavar="IMAGESxOBJECTS", help="objects of each image")
    parser.add_argument("--types", nargs="+", default=TYPES, choices=TYPES, help="bfloat16: under autocast")
    parser.add_argument(
        "--timed", nargs="*", default=(), metavar="MODEL:RESOLUTION", help="cases to time on real tensors, or none"
    )
    parser.add_argument("--rounds", type=number(COUNT), default=12, help="timed steps of each method")
    parser.add_argument("--threads", type=number(THREADS), default=torch.get_num_threads())
    parser.add_argument("--jobs", type=number(COUNT), default=2, help="processes that count")
    add_out(parser, Path("runs/bench/train_step.json"))
    args = parser.parse_args(argv)
    check_out(args)
    batches = [parse_batch(batch) for batch in args.batches]
    timed = {parse_case(case) for case in args.timed if case != "none"}
    rows = []
    for size, resolution in map(parse_case, args.cases):
        found = counted_rows(size, resolution, args.methods, batches, args.types, args.jobs)
        for row in found:
            row["threads"] = args.threads
        if (size, resolution) in timed:
            add_times(found, size, resolution, args)
        rows += add_ratios(found)
        print(table(found), flush=True)
        write_result(args, rows)
    print(f"written {args.out}")


def parse_case(case: str) -> tuple[str, int]:
    """`tiny:512` as ("tiny", 512)."""
    size, _, resolution = case.partition(":")
    if size not in CONFIGS or not resolution.isdigit() or int(resolution) % 128 or resolution == "0":
        raise UserError(
            f"{case!r} is not a case: expected MODEL:RESOLUTION with a model of {', '.join(CONFIGS)} and a "
            "resolution that 128 divides, such as tiny:512"
        )
    return size, int(resolution)


def parse_batch(batch: str) -> tuple[int, int]:
    """`8x3` as (8, 3)."""
    images, _, objects = batch.partition("x")
    if not (images.isdigit() and objects.isdigit() and int(images) and int(objects)):
        raise UserError(f"{batch!r} is not a batch: expected IMAGESxOBJECTS, the objects of each image, such as 8x3")
    return int(images), int(objects)


def counted_rows(
    size: str,
    resolution: int,
    methods: Sequence[str],
    batches: Sequence[tuple[int, int]],
    types: Sequence[str],
    jobs: int,
) -> list[dict[str, Any]]:
    """A row for each type, batch and method, counted in `jobs` processes."""
    wanted = list(product(types, batches, methods))
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        counts = [
            pool.submit(count, method, size, resolution, *batch, kind == "bfloat16") for kind, batch, method in wanted
        ]
        waits = {key: pool.submit(count_waits, *key) for key in product(methods, batches)}
        results = [future.result() for future in tqdm(counts, desc=f"{size}:{resolution}", unit="row", leave=False)]
        found = {key: future.result().total() for key, future in waits.items()}
    return [
        {
            "model": size,
            "resolution": resolution,
            "images": images,
            "objects": objects,
            "autocast": kind == "bfloat16",
            "method": method,
            "step_seconds": None,
            "peak_rss_bytes": None,
            "torch": torch.__version__,
            "waits": found[method, (images, objects)],
            **result,
        }
        for (kind, (images, objects), method), result in zip(wanted, results, strict=True)
    ]


def add_times(rows: list[dict[str, Any]], size: str, resolution: int, args: argparse.Namespace) -> None:
    """Adds real steps on this CPU to the rows of one image, two objects, float32; in place."""
    rows = [row for row in rows if (row["images"], row["objects"], row["autocast"]) == (1, 2, False)]
    builds = {row["method"]: {"method": row["method"], "size": size, "resolution": resolution} for row in rows}
    if not builds:
        raise UserError("--timed needs rows of --batches 1x2 and --types float32")
    seconds = step_times(builds, args.rounds, args.threads)
    for row in rows:
        row |= {
            "step_seconds": statistics.median(seconds[row["method"]]),
            "rounds_seconds": seconds[row["method"]],
            "peak_rss_bytes": apart(resident, row["method"], size, resolution, args.threads),
        }


if __name__ == "__main__":
    run_cli(main)
