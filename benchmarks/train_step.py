"""What a training step costs, by model, resolution and method: a table, and `runs/bench/train_step.json`.

    python -m benchmarks.train_step                                              all cases; times for those of --timed
    python -m benchmarks.train_step --cases tiny:1024 --methods full lean        two rows

FLOPs and bytes come from fake tensors, so they repeat exactly on any machine and need no memory (tests compare them with real
ones). Times come from real steps, the methods in turns, each in a process of its own as in training: in one process, memory that
another method has freed serves the next step or does not, so that full fine-tuning had no page fault a step in one run and 149,000
in another. Of one process all steps may be some percent faster than of the next, so the processes are fresh every few rounds. Ratios
of times are medians of the ratios in each round. Resident memory comes from one more child process each.
"""

from sam2_lora_ext.errors import UserError, catch_interrupts, run_cli

if __name__ == "__main__":
    catch_interrupts()  # before the imports that take long

import argparse
import gc
import json
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.fake import convert, fake_tensors
from benchmarks.measure import Cost, run_step, step_cost
from benchmarks.methods import CONFIGS, METHODS, build, make_batch, make_optimizer, tensors_of
from benchmarks.output import add_out, check_out, write_result
from sam2_lora_ext.arguments import COUNT, THREADS, number

CASES = ("tiny:1024", "tiny:512", "base_plus:512", "large:1024")
FRESH = 4  # rounds of steps that a process makes, after one that is not counted
COLUMNS = {  # key -> heading, unit, format
    "flops": ("GFLOP", 1e9, ".0f"), "saved_bytes": ("MB saved", 1e6, ".0f"), "peak_live_bytes": ("MB peak", 1e6, ".0f"),
    "optimizer_bytes": ("MB optimizer", 1e6, ".0f"), "peak_rss_bytes": ("MB resident", 1e6, ".0f"),
    "step_seconds": ("s a step", 1, ".2f"),
    "cuda_peak_bytes": ("MB on the GPU", 1e6, ".0f"), "cuda_step_seconds": ("s on the GPU", 1, ".3f"),
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints; see the module."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_step", description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=CASES, metavar="MODEL:RESOLUTION", help=f"of {', '.join(CONFIGS)}")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--timed", nargs="*", default=("tiny:512",), metavar="MODEL:RESOLUTION", help="cases to run for real")
    parser.add_argument("--rounds", type=number(COUNT), default=12, help="timed steps of each method")
    parser.add_argument("--threads", type=number(THREADS), default=torch.get_num_threads())
    add_out(parser, Path("runs/bench/train_step.json"))
    args = parser.parse_args(argv)
    check_out(args)
    rows = []
    for case in args.cases:
        size, resolution = parse_case(case)
        facts = {"model": size, "resolution": resolution, "step_seconds": None, "peak_rss_bytes": None, "threads": args.threads,
                 "torch": torch.__version__}  # fmt: skip
        found = [{**facts, "method": method, **_apart(count, method, size, resolution)}
                 for method in tqdm(args.methods, desc=case, unit="method", leave=False)]  # fmt: skip
        if case in args.timed:
            builds = {method: {"method": method, "size": size, "resolution": resolution} for method in args.methods}
            seconds = step_times(builds, args.rounds, args.threads)
            for row in found:
                row |= {"step_seconds": statistics.median(seconds[row["method"]]), "rounds_seconds": seconds[row["method"]],
                        "peak_rss_bytes": _apart(resident, row["method"], size, resolution, args.threads)}  # fmt: skip
                if torch.cuda.is_available():
                    row |= _apart(on_gpu, row["method"], size, resolution, args.rounds)
        rows += add_ratios(found)
        print(table(found), flush=True)
        write_result(args, rows)
    print(f"written {args.out}")


def parse_case(case: str) -> tuple[str, int]:
    """`tiny:512` as ("tiny", 512)."""
    size, _, resolution = case.partition(":")
    if size not in CONFIGS or not resolution.isdigit() or int(resolution) % 128 or resolution == "0":
        raise UserError(f"{case!r} is not a case: expected MODEL:RESOLUTION with a model of {', '.join(CONFIGS)} and a "
                        "resolution that 128 divides, such as tiny:512")  # fmt: skip
    return size, int(resolution)


def count(method: str, size: str, resolution: int) -> dict[str, int]:
    """What repeats exactly: a `Cost` on fake tensors, and the number of parameters."""
    setup = build(method, size, resolution)
    with fake_tensors() as mode:
        convert(setup.model, mode)
        setup = setup._replace(optimizer=make_optimizer(setup.model))
        batch = make_batch(resolution)
        cost = step_cost(setup.model, setup.optimizer, tensors_of(batch), lambda: setup.step_loss(batch))
    parameters = list(setup.model.parameters())
    return {**cost._asdict(), "parameters": sum(p.numel() for p in parameters),
            "trained_parameters": sum(p.numel() for p in parameters if p.requires_grad)}  # fmt: skip


def real_cost(method: str, size: str, resolution: int) -> Cost:
    """The same as `count` on real tensors; the optimizer has no state at first, so three steps are run."""
    setup, batch = build(method, size, resolution), make_batch(resolution)
    return step_cost(setup.model, setup.optimizer, tensors_of(batch), lambda: _seeded(setup, batch))


def step_times(builds: Mapping[str, Mapping[str, Any]], rounds: int, threads: int) -> dict[str, list[float]]:
    """Seconds of each step by name, in turns (A B C A B C ...), after one in each process that is not counted.

    Args:
        builds: the arguments of `build` by name; each is built, and stepped, in a process of its own, a fresh one every `FRESH` rounds.
        rounds: timed steps of each.
        threads: of each process.
    """
    seconds: dict[str, list[float]] = {name: [] for name in builds}
    with tqdm(total=rounds, desc="steps in turns", unit="round", leave=False) as progress:
        for start in range(0, rounds, FRESH):
            with ExitStack() as stack:
                pools = {name: stack.enter_context(ProcessPoolExecutor(1, mp_context=get_context("spawn"))) for name in builds}
                for name, pool in pools.items():
                    pool.submit(_prepare, threads, builds[name]).result()
                for turn in range(min(FRESH, rounds - start) + 1):
                    for name, pool in pools.items():
                        value = pool.submit(_timed_step).result()
                        if turn:
                            seconds[name].append(value)
                    progress.update(turn > 0)
    return seconds


_prepared: list[Any] = []  # in a child process: the setup and the batch of `_timed_step`


def _prepare(threads: int, arguments: Mapping[str, Any]) -> None:
    torch.set_num_threads(threads)
    _prepared[:] = build(**arguments), make_batch(arguments["resolution"])


def _timed_step() -> float:
    setup, batch = _prepared
    start = time.perf_counter()
    run_step(setup.optimizer, lambda: _seeded(setup, batch))
    seconds = time.perf_counter() - start
    gc.collect()
    return seconds


def resident(method: str, size: str, resolution: int, threads: int) -> int:
    """Peak resident bytes of this process after two steps."""
    torch.set_num_threads(threads)
    setup, batch = build(method, size, resolution), make_batch(resolution)
    for _ in range(2):
        run_step(setup.optimizer, lambda: _seeded(setup, batch))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def on_gpu(method: str, size: str, resolution: int, rounds: int) -> dict[str, float]:
    """Peak allocated bytes and median seconds of a step under bfloat16 autocast on the current GPU."""
    setup, batch = build(method, size, resolution), make_batch(resolution).to("cuda")
    setup.model.cuda()
    setup = setup._replace(optimizer=make_optimizer(setup.model))
    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16):
            loss = _seeded(setup, batch)
        run_step(setup.optimizer, lambda loss=loss: loss)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {"cuda_peak_bytes": torch.cuda.max_memory_allocated(), "cuda_step_seconds": statistics.median(seconds[1:])}


def add_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds `ratio_to_full` to the rows of one case: key -> the row's value by that of full fine-tuning, of times by rounds."""
    full = next((row for row in rows if row["method"] == "full"), {})
    for row in rows:
        row["ratio_to_full"] = {key: row[key] / full[key] for key in COLUMNS if row.get(key) and full.get(key)}
        if "rounds_seconds" in row and "rounds_seconds" in full:
            pairs = zip(row["rounds_seconds"], full["rounds_seconds"], strict=True)
            row["ratio_to_full"]["step_seconds"] = statistics.median(one / other for one, other in pairs)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows of one case as Markdown; ratios to full fine-tuning in brackets."""
    keys = [key for key in COLUMNS if any(row.get(key) for row in rows)]
    lines = ["| model | method | " + " | ".join(COLUMNS[key][0] for key in keys) + " |", "|---" * (len(keys) + 2) + "|"]
    for row in rows:
        cells = [f"{row['model']} {row['resolution']}", row["method"]]
        for key in keys:
            _, unit, style = COLUMNS[key]
            ratio = row["ratio_to_full"].get(key)
            cells.append(f"{row[key] / unit:{style}}" + (f" ({ratio:.2f})" if ratio is not None else "") if row.get(key) else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _seeded(setup: Any, batch: Any) -> torch.Tensor:
    torch.manual_seed(3)  # with the next, the same clicks each time
    setup.model.rng = np.random.default_rng(3)
    return setup.step_loss(batch)


def _apart(function: Callable, *args: Any) -> Any:
    """`function(*args)` in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


if __name__ == "__main__":
    run_cli(main)
