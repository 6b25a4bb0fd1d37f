"""Measures seconds, images per second, memory and launches of training steps on a GPU, beside the modelled times.

    python -m benchmarks.gpu [--cases tiny:1024 base_plus:1024 large:1024] [--minutes 6]

Needs no network: weights are random, the batch is fixed. Part of `make gpu`. Writes `runs/bench/gpu.json`: a row for
each case, method and batch, with `modelled_ms` of every card in `benchmarks.roofline`. `--device cpu` runs the
same on a small model, to test it.
"""

from sam2_lora_ext.utils.command_line import catch_interrupts, run_cli
from sam2_lora_ext.utils.errors import UserError

if __name__ == "__main__":
    catch_interrupts()  # before the slow imports

import argparse
import gc
import statistics
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.counting import count
from benchmarks.measure import run_step
from benchmarks.methods import COMPARED, METHODS, build, make_batch, make_optimizer
from benchmarks.output import add_out, check_out, write_result
from benchmarks.timing import apart
from benchmarks.train_step import BATCHES, CASES, TYPES, parse_batch, parse_case
from sam2_lora_ext.settings.arguments import COUNT, number
from sam2_lora_ext.settings.kinds import Number

# also with a suffix, as cudaLaunchKernelExC
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaMemcpyAsync", "cudaMemsetAsync")
DTYPES = {"float32": None, "bfloat16": torch.bfloat16}


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints and writes; see the module."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--cases", nargs="+", default=CASES, metavar="MODEL:RESOLUTION")
    parser.add_argument("--methods", nargs="+", default=COMPARED, choices=METHODS)
    parser.add_argument("--batches", nargs="+", default=BATCHES, metavar="IMAGESxOBJECTS")
    parser.add_argument("--types", nargs="+", default=("bfloat16",), choices=TYPES)
    parser.add_argument("--steps", type=number(COUNT), default=10, help="timed steps of each, after two warm-up steps")
    parser.add_argument(
        "--minutes", type=number(Number(0, 1000)), default=6.0, help="start no further row after this time"
    )
    add_out(parser, Path("runs/bench/gpu.json"))
    args = parser.parse_args(argv)
    check_out(args)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(
            "no GPU is visible: run this on a CUDA machine, or try its parts with --device cpu --cases nano:128"
        )
    end, rows = time.monotonic() + 60 * args.minutes, []
    wanted = list(product(map(parse_case, args.cases), map(parse_batch, args.batches), args.types, args.methods))
    for (size, resolution), (images, objects), kind, method in wanted:
        if time.monotonic() > end:
            print(f"--minutes {args.minutes:g} are over: {len(wanted) - len(rows)} of {len(wanted)} rows are left out")
            break
        place = {
            "model": size,
            "resolution": resolution,
            "images": images,
            "objects": objects,
            "autocast": kind == "bfloat16",
            "method": method,
        }
        rows.append({**place, **apart(measured, args.device, args.steps, *place.values())})
        print(line(rows[-1]), flush=True)
        write_result(args, rows)
    for row in rows:  # last: it needs CPU time only, and the table is complete without it
        if time.monotonic() < end + 60:
            place = [row[key] for key in ("method", "model", "resolution", "images", "objects", "autocast")]
            predicted = count(*place)
            row |= {
                key: predicted[key]
                for key in (
                    "kernels",
                    "optimizer_kernels",
                    "peak_live_bytes",
                    "moved_bytes",
                    "host_ms",
                    "device_ms",
                    "modelled_ms",
                    "weight_bytes",
                    "optimizer_bytes",
                )
            }
            write_result(args, rows)
    print(f"written {args.out}")


def measured(
    device: str, steps: int, size: str, resolution: int, images: int, objects: int, autocast: bool, method: str
) -> dict[str, Any]:
    """One row from real steps on `device`.

    `cuda_step_seconds` is the median of `steps` steps, each from an idle device to an idle device; `images_per_second`
    is over as many consecutive steps without synchronisation; `cuda_peak_bytes` is `max_memory_allocated`; `launches`
    and `device_seconds` are the profiler's, of one step. On a CPU memory and launches are None.
    """
    cuda = device.startswith("cuda")
    name = torch.cuda.get_device_name() if cuda else "CPU"
    facts = {
        "device": name,
        "torch": torch.__version__,
        "cuda_step_seconds": None,
        "images_per_second": None,
        "cuda_peak_bytes": None,
        "launches": None,
        "device_seconds": None,
        "error": None,
    }
    try:
        step = make_step(device, method, size, resolution, images, objects, torch.bfloat16 if autocast else None)
        for _ in range(2):
            step()
        gc.collect()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        facts["cuda_step_seconds"] = statistics.median(timed(step, device) for _ in range(steps))
        facts["images_per_second"] = steps * images / timed(lambda: [step() for _ in range(steps)], device)
        if cuda:
            facts["cuda_peak_bytes"] = torch.cuda.max_memory_allocated()
        facts |= profiled(step, device)
    except torch.OutOfMemoryError as error:
        facts["error"] = str(error).splitlines()[0]
    return facts


def make_step(
    device: str, method: str, size: str, resolution: int, images: int, objects: int, dtype: torch.dtype | None
) -> Any:
    """A function that runs one training step: forward pass and loss under autocast, backward pass, AdamW; it returns
    the loss."""
    setup, batch = build(method, size, resolution), make_batch(resolution, images, objects).to(device)
    setup.model.to(device)
    setup = setup._replace(optimizer=make_optimizer(setup.model))

    def context() -> AbstractContextManager:
        return nullcontext() if dtype is None else torch.autocast(torch.device(device).type, dtype)

    def loss() -> torch.Tensor:
        with context():
            return setup.seeded_loss(batch)

    return lambda: run_step(setup.optimizer, loss)


def timed(function: Any, device: str) -> float:
    """Seconds of a call, from an idle device to an idle device."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wait()
    start = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - start


def profiled(step: Any, device: str) -> dict[str, float | None]:
    """`launches` of a step by torch's profiler, and `device_seconds`, the sum of its kernels' times; None without
    CUDA."""
    if not device.startswith("cuda"):
        return {"launches": None, "device_seconds": None}
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        timed(step, device)
    events = found.key_averages()
    launches = sum(event.count for event in events if event.key.startswith(LAUNCHES))
    return {"launches": launches, "device_seconds": sum(event.self_device_time_total for event in events) / 1e6}


def line(row: dict[str, Any]) -> str:
    """A row as one line of text."""
    place = (
        f"{row['model']} {row['resolution']} {row['images']}x{row['objects']} "
        f"{'bfloat16' if row['autocast'] else 'float32'}"
    )
    if row["error"]:
        return f"{place} {row['method']}: {row['error']}"
    cuda = "" if row["launches"] is None else f", {row['cuda_peak_bytes'] / 1e6:,.0f} MB, {row['launches']:,} launches"
    return f"{place} {row['method']}: {row['cuda_step_seconds']:.3f} s, {row['images_per_second']:.2f} images/s{cuda}"


if __name__ == "__main__":
    run_cli(main)
