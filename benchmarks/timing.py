"""Times of real training steps on this machine's CPU, and the resident memory of a process that makes them.

The methods run in turns, each in its own process as in training: in a shared process, a step may or may not reuse
memory freed by another method. All steps of a process may be some percent faster than those of the next, so processes
are restarted every few rounds. Ratios of times are medians of the ratios in each round. A CPU's times do not predict a
GPU's.
"""

import gc
import resource
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.measure import run_step
from benchmarks.methods import build, make_batch

FRESH = 4  # rounds before a process is restarted, after a warm-up step


def step_times(builds: Mapping[str, Mapping[str, Any]], rounds: int, threads: int) -> dict[str, list[float]]:
    """Seconds of each step by name, in turns (A B C A B C ...), after a warm-up step in each process.

    Args:
        builds: the arguments of `build` by name; each is built and run in its own process, which is restarted every
            `FRESH` rounds.
        rounds: timed steps of each.
        threads: of each process.
    """
    seconds: dict[str, list[float]] = {name: [] for name in builds}
    with tqdm(total=rounds, desc="steps in turns", unit="round", leave=False) as progress:
        for start in range(0, rounds, FRESH):
            with ExitStack() as stack:
                pools = {
                    name: stack.enter_context(ProcessPoolExecutor(1, mp_context=get_context("spawn")))
                    for name in builds
                }
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
    run_step(setup.optimizer, lambda: setup.seeded_loss(batch))
    seconds = time.perf_counter() - start
    gc.collect()
    return seconds


def resident(method: str, size: str, resolution: int, threads: int) -> int:
    """Peak resident bytes of this process after two steps."""
    torch.set_num_threads(threads)
    setup, batch = build(method, size, resolution), make_batch(resolution)
    for _ in range(2):
        run_step(setup.optimizer, lambda: setup.seeded_loss(batch))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def apart(function: Callable, *args: Any) -> Any:
    """`function(*args)` in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()
