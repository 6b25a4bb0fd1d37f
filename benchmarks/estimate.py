"""Estimates the memory of training with a config, and the largest batch for a GPU, without one.

    python -m benchmarks.estimate -c configs/severstal_lora.yaml [key=value ...]

The model and the loss are those of the config. One training step runs on fake tensors (shapes and storages, no
arithmetic) with one image, with two and with three, and each further image is assumed to add the same as the third. Not
counted are the memory of CUDA, cuDNN and the allocator, about 1 GB, which --reserve sets, and validation, which saves
nothing for backward.
"""

from sam2_lora_ext.utils.command_line import catch_interrupts, run_cli
from sam2_lora_ext.utils.errors import UserError

if __name__ == "__main__":
    catch_interrupts()  # before the slow imports

import argparse
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn
from training.trainer import CORE_LOSS_KEY

from benchmarks.fake import convert, fake_tensors
from benchmarks.measure import LiveBytes
from benchmarks.methods import make_batch
from sam2_lora_ext.host.compose import compose, locate
from sam2_lora_ext.model import LoRASAM2Train
from sam2_lora_ext.settings.arguments import number
from sam2_lora_ext.settings.kinds import Number, Whole

GPUS = (12, 16, 24, 40, 80)  # GB (10^9 bytes)


class Estimate(NamedTuple):
    """The estimate of a training, in bytes.

    Attributes:
        weights: parameters and buffers.
        gradients: of the trained parameters; part of `step`.
        optimizer: AdamW's two moments.
        saved: for backward with one image.
        step: peak of a step with one image beyond weights and optimizer, the batch and the gradients included.
        step_of_two: the same with two images, whose objects do not share one image's features.
        per_image: addition to `step_of_two` for each further image.
    """

    weights: int
    gradients: int
    optimizer: int
    saved: int
    step: int
    step_of_two: int
    per_image: int

    def total(self, images: int) -> int:
        """Bytes of training with this batch size."""
        step = self.step if images == 1 else self.step_of_two + (images - 2) * self.per_image
        return self.weights + self.optimizer + step

    def largest_batch(self, capacity: float) -> int:
        """The largest batch size within `capacity` bytes; 0 if no image fits."""
        if capacity < self.total(2):
            return int(capacity >= self.total(1))
        return 2 + int((capacity - self.total(2)) // self.per_image)


def main(argv: Sequence[str]) -> None:
    """Prints the estimate of a config; see the module."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.estimate", description=__doc__.splitlines()[0])
    parser.add_argument("-c", "--config", required=True)
    parser.add_argument(
        "--objects", type=number(Whole(1, 10_000)), help="per image; default: the config's scratch.max_num_objects"
    )
    parser.add_argument(
        "--reserve", type=number(Number(0, 10_000)), default=1.0, metavar="GB", help="memory of the GPU's libraries"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args(argv)
    name, folder = locate(args.config)
    if folder is not None:
        raise UserError(f"{args.config} is not among the installed configs: put it into the folder of your own configs")
    config = compose(name, args.overrides)
    objects = args.objects or config.get("scratch", {}).get("max_num_objects") or 1
    found = estimate(config, objects)
    size = config.trainer.model.image_size
    print(f"{args.config}: {size} px, {objects} objects an image, {'bfloat16 autocast' if _amp(config) else 'float32'}")
    for title, value in zip(
        (
            "weights",
            "gradients",
            "optimizer",
            "saved for backward, one image",
            "peak of a step, one image",
            "peak of a step, two images",
            "each further image",
        ),
        found,
        strict=True,
    ):
        print(f"  {title:<32}{value / 1e9:8.3f} GB")
    for gigabytes in GPUS:
        print(f"  largest batch on {gigabytes} GB: {found.largest_batch((gigabytes - args.reserve) * 1e9)}")


def estimate(config: Any, objects: int) -> Estimate:
    """The estimate for a training config.

    Args:
        config: as composed for the launcher.
        objects: per image.
    """
    from hydra.utils import instantiate

    model = instantiate(config.trainer.model).train()
    # a click first: steps that begin with a box peak one or two percent lower
    model.prob_to_use_box_input_for_train = 0.0
    loss = instantiate(next(iter(config.trainer.loss.values())))
    with fake_tensors() as mode:
        convert(model, mode)
        size, amp = config.trainer.model.image_size, _amp(config)
        if isinstance(model, LoRASAM2Train):
            with _autocast(amp):
                model.hold_weights("cpu")  # otherwise the first step would, and its new weights count as saved
        steps = [_step(model, loss, size, images, objects, amp) for images in (1, 2, 3)]
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    gradients = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    (saved, _), *_ = steps
    one, two, three = (peak for _, peak in steps)
    return Estimate(weights, gradients, 2 * gradients, saved, one, two, three - two)


def _step(model: nn.Module, loss: nn.Module, size: int, images: int, objects: int, amp: bool) -> tuple[int, int]:
    """Bytes saved for backward, and the peak of forward and backward; the optimizer's step needs less."""
    with LiveBytes([*model.parameters(), *model.buffers()]) as live:
        batch = make_batch(size, images, objects)
        before = live.now
        with _autocast(amp):
            value = loss(model(batch), batch.masks)[CORE_LOSS_KEY]
        saved = live.now - before
        value.backward()
    model.zero_grad()
    return saved, live.peak


def _autocast(amp: bool) -> AbstractContextManager:
    return torch.autocast("cpu", torch.bfloat16) if amp else nullcontext()


def _amp(config: Any) -> bool:
    amp = config.trainer.optim.get("amp") or {}
    return bool(amp.get("enabled")) and amp.get("amp_dtype") == "bfloat16"


if __name__ == "__main__":
    run_cli(main)
