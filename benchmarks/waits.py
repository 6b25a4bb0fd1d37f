"""Waits for the device in one training step through the Trainer: points where the host waits until a GPU is done.

    python -m benchmarks.waits [--methods full lean] [--batches 1x2 8x3]

Counted on the small model on this CPU, float32 with the settings of bfloat16 autocast (CUDA's autocast does nothing
here; stock's scaler is active), over the Trainer's complete second step: loading the batch, forward pass, loss, guard,
meters, backward pass, clipping, optimizer. Stock SAM 2 and PEFT run stock's Trainer without meters, ours runs
`LoRATrainer`. A wait is

- a value read back: `.item()`, `bool()`, `int()` and `float()` of a tensor, `if tensor`, `torch.equal`;
- an operation whose result's size depends on values: `nonzero`, `masked_select`, `unique`, indexing with booleans;
- a Python call of `.cpu()`, `.to("cpu")` or `.tolist()`, one each whatever happens inside; `.numpy()` counts nothing,
  since a GPU's tensor needs `.cpu()` first.

Not detected: tensors that would be on the host anyway, whose reading is not a wait (only AdamW's step counters and
`.to(some_device)` are excluded); copies to the device; waits of NCCL and of DDP, which reads its map of unused
parameters.
"""

from sam2_lora_ext.utils.errors import catch_interrupts, run_cli

if __name__ == "__main__":
    catch_interrupts()  # before the slow imports

import argparse
import logging
import os
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.methods import COMPARED, build, make_batch
from sam2_lora_ext.host.patches import host_guards

READS = {"_local_scalar_dense", "equal", "is_nonzero"}
SIZED = {"nonzero", "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive", "bincount"}
WANTED = 1  # the step that is counted, from 0: in the first the Trainer also logs


class Waits(TorchDispatchMode):
    """`counts` holds the waits inside the block by kind and by line of code, `file:line function`."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[str, str]] = Counter()
        self._inside = 0  # inside a call that counts once, or not at all
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
    """Whether an index or `index_put` looks up where a mask is true; of one value that is put, a GPU fills the mask
    without."""
    indices = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ()
    masks = any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in indices)
    return masks and not (len(args) > 2 and isinstance(args[2], Tensor) and args[2].numel() == 1)


def asked_by_engine() -> bool:
    """Whether C++ code in the backward pass reads the value: for integers it is DDP with its host-side map of unused
    parameters."""
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


class _Done(Exception):
    """The counted step is over."""


class Batches:
    """A data set for the Trainer that returns the same batch, and counts one of the steps."""

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
        raise _Done


def count_waits(
    method: str, batch: tuple[int, int] = (1, 2), size: str = "nano", resolution: int = 128
) -> Counter[tuple[str, str]]:
    """The waits of a step of one of `benchmarks.methods.METHODS`, by kind and line.

    Args:
        method: see `build`.
        batch: images, and objects of each.
        size: of SAM 2.
        resolution: pixels of the input's side.
    """
    with _quiet(), tempfile.TemporaryDirectory() as folder, _lone_rank(), host_guards("cpu"):
        trainer = _trainer(method, size, resolution, folder, batch)
        try:
            trainer.run()
        except _Done:
            return trainer.train_dataset.waits.counts
        finally:
            dist.destroy_process_group()
            if method.startswith("lean"):
                trainer.start.release()
    raise AssertionError("the Trainer ended before its second step")


def model_of(method: str, size: str, resolution: int) -> torch.nn.Module:
    """The model of a method, for the Trainer's config."""
    return build(method, size, resolution).model


def loss_of(method: str, size: str, resolution: int) -> torch.nn.Module:
    """The loss of a method, for the Trainer's config."""
    return build(method, size, resolution).loss


def _trainer(method: str, size: str, resolution: int, folder: str, batch: tuple[int, int]) -> Any:
    stock = "lean" not in method and "plain" not in method
    built = {"method": method, "size": size, "resolution": resolution}
    rate = {"_target_": "fvcore.common.param_scheduler.ConstantParamScheduler", "value": 1e-4}
    clip = {"_target_": "training.optimizer.GradientClipper", "max_norm": 1.0, "norm_type": 2}
    config = {
        "_target_": "training.trainer.Trainer" if stock else "sam2_lora_ext.trainer.LoRATrainer",
        "mode": "train_only",
        "accelerator": "cpu",
        "max_epochs": 1,
        "data": {
            "train": {
                "_target_": "benchmarks.waits.Batches",
                "images": batch[0],
                "objects": batch[1],
                "resolution": resolution,
            }
        },
        "model": {"_target_": "benchmarks.waits.model_of", **built},
        "loss": {"severstal": {"_target_": "benchmarks.waits.loss_of", **built}},
        "optim": {
            "amp": {"enabled": True, "amp_dtype": "bfloat16"},
            "optimizer": {"_target_": "torch.optim.AdamW"},
            "gradient_clip": clip,
            "options": {"lr": [{"scheduler": rate}]},
        },
        "distributed": {"backend": "gloo", "find_unused_parameters": stock},
        "logging": {
            "log_dir": f"{folder}/logs",
            "log_freq": 10,
            "log_scalar_frequency": 100,
            "tensorboard_writer": {
                "_target_": "sam2_lora_ext.logger.make_csv_logger",
                "log_dir": f"{folder}/tensorboard",
                "csv_path": f"{folder}/logs/scalars.csv",
            },
        },
        "checkpoint": {"save_dir": f"{folder}/checkpoints", "save_freq": 0, "model_weight_initializer": None},
        **({} if stock else {"run_dir": folder}),
    }
    return instantiate(OmegaConf.create(config), _recursive_=False)


@contextmanager
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)  # the Trainer prints its model and replaces the log handlers
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


@contextmanager
def _lone_rank() -> Iterator[None]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with mock.patch.dict(os.environ, ranks):
        yield


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the waits of each method by line; see the module."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.waits", description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=COMPARED)
    parser.add_argument("--batches", nargs="+", default=("1x2",), metavar="IMAGESxOBJECTS")
    args = parser.parse_args(argv)
    for method in args.methods:
        for batch in args.batches:
            images, objects = map(int, batch.split("x"))
            found = count_waits(method, (images, objects))
            print(f"{method} {batch}: {found.total()} waits in a step")
            for (kind, line), times in found.most_common():
                print(f"  {times:4d}  {kind:<14} {line}")


if __name__ == "__main__":
    run_cli(main)
