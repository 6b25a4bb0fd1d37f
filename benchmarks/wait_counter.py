"""Counts waits for the device inside a block, by kind and by the line of code that waits; see `benchmarks.waits`."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.methods import make_batch

READS = {"_local_scalar_dense", "equal", "is_nonzero"}
SIZED = {"nonzero", "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive", "bincount"}
WANTED = 1  # the step that is counted, from 0: in the first the Trainer also logs


class Waits(TorchDispatchMode):
    """`counts` holds the waits inside the block by kind and by the line of code that waits, `file:line function`."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[str, str]] = Counter()
        self._inside = 0  # depth of calls that are counted as a whole, or not at all
        self._patches = ExitStack()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func._overloadpacket.__name__
        if name in READS or name in SIZED:
            if not (args[0].dtype == torch.int32 and asked_by_engine()):
                self._count("item" if name == "_local_scalar_dense" else name)
        elif name.startswith("index") and reads_booleans(args):
            self._count("boolean index")
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> "Waits":
        for name in ("cpu", "tolist", "to"):
            self._patches.enter_context(mock.patch.object(Tensor, name, self._counted(name, getattr(Tensor, name))))
        step = self._silent(torch.optim.AdamW.step)  # its step counters are on the host on a GPU too
        self._patches.enter_context(mock.patch.object(torch.optim.AdamW, "step", step))
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._patches.close()

    def _count(self, kind: str) -> None:
        if not self._inside:
            self.counts[kind, asking_line()] += 1

    def _counted(self, name: str, plain: Callable) -> Callable:
        inner = self._silent(plain)

        def call(*args: Any, **kwargs: Any) -> Any:
            if name != "to" or "cpu" in [value for value in (*args[1:], *kwargs.values()) if isinstance(value, str)]:
                self._count(name)
                return inner(*args, **kwargs)
            return plain(*args, **kwargs)

        return call

    def _silent(self, plain: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._inside += 1
            try:
                return plain(*args, **kwargs)
            finally:
                self._inside -= 1

        return call


def reads_booleans(args: Sequence[Any]) -> bool:
    """Whether an index or `index_put` looks up where a mask is true; a GPU puts a single value into a mask without
    that."""
    indices = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ()
    masks = any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in indices)
    return masks and not (len(args) > 2 and isinstance(args[2], Tensor) and args[2].numel() == 1)


def asked_by_engine() -> bool:
    """Whether C++ code in the backward pass reads the value: with integers that is DDP, whose map of unused parameters
    is on the host."""
    frame = sys._getframe(2)
    while frame.f_code.co_filename.endswith(("eval_frame.py", "_compile.py")):
        frame = frame.f_back
    return frame.f_code.co_name == "_engine_run_backward"


def asking_line() -> str:
    """The innermost line outside torch and this file, as `package/file.py:line function`."""
    frame = sys._getframe(1)
    while frame is not None and ("/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__):
        frame = frame.f_back
    return (
        "?"
        if frame is None
        else (f"{'/'.join(frame.f_code.co_filename.split('/')[-2:])}:{frame.f_lineno} {frame.f_code.co_name}")
    )


class Done(Exception):
    """The counted step is over."""


class Batches:
    """A data set for the Trainer that always returns the same batch, and counts one of the steps with it."""

    def __init__(self, images: int, objects: int, resolution: int):
        self.batch, self.waits = make_batch(resolution, images, objects), Waits()

    def get_loader(self, epoch: int) -> "Batches":
        return self

    def __len__(self) -> int:
        return 100

    def __iter__(self) -> Iterator[Any]:
        for _ in range(WANTED):
            yield self.batch
        with self.waits:
            yield self.batch
        raise Done
