"""Counts waits for the device in one training step of the Trainer, which stop the host until a GPU has caught up.

    python -m benchmarks.waits [--methods full lean] [--batches 1x2 8x3]

Counted with the small model on this CPU, in float32 with the settings of bfloat16 autocast (CUDA's autocast does
nothing here, but SAM 2's gradient scaler runs), over the Trainer's whole second step: loading the batch, forward pass,
loss, guard, meters, backward pass, clipping, optimizer. Full fine-tuning and PEFT run the stock Trainer without meters,
this package's methods run `LoRATrainer`. A wait is

- a value read back: `.item()`, `bool()`, `int()` and `float()` of a tensor, `if tensor`, `torch.equal`;
- an operation whose result's size depends on values: `nonzero`, `masked_select`, `unique`, indexing with booleans;
- a Python call of `.cpu()`, `.to("cpu")` or `.tolist()`, one each whatever happens inside; `.numpy()` counts nothing,
  since a GPU's tensor needs `.cpu()` first.

Not detected are tensors that would be on the host anyway, so that reading them is no wait (only AdamW's step counters
and `.to(some_device)` are excluded), copies to the device, and waits of NCCL and of DDP, which reads its map of unused
parameters.
"""

from sam2_lora_ext.utils.command_line import catch_interrupts, run_cli

if __name__ == "__main__":
    catch_interrupts()  # before the slow imports

import argparse
import logging
import os
import socket
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from hydra.utils import instantiate
from omegaconf import OmegaConf

from benchmarks.methods import COMPARED, build
from benchmarks.wait_counter import Done
from sam2_lora_ext.host.patches import host_guards


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
        except Done:
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
                "_target_": "benchmarks.wait_counter.Batches",
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
    logging.disable(logging.CRITICAL)  # the Trainer prints its model and replaces the handlers
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
