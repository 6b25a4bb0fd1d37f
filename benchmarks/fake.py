"""Runs a training step on fake tensors: true shapes and storages, true FLOPs and bytes, but no memory and no
arithmetic.

A SAM 2 is constructed on the CPU first (Hiera's constructor reads values) and then converted. Decisions of a step that
depend on values are fixed: the clicks, and the mask of an object with a gradient in the loss (the first). Dropout is
CUDA's, see `cuda_dropout`.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
import training.model.sam2 as host
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.kernels import cuda_dropout
from sam2_lora_ext.model import LoRASAM2Train


@contextmanager
def fake_tensors() -> Iterator[FakeTensorMode]:
    """Within the block, operations create fake tensors, and SAM 2's clicks are fixed."""
    with (
        mock.patch.object(host, "get_next_point", _click),
        mock.patch.object(LoRASAM2Train, "_prompt_sampler", lambda self, input: _NoSampler),
        cuda_dropout(),
        FakeTensorMode(allow_non_fake_inputs=True) as mode,
    ):
        yield mode


@contextmanager
def fake_cuda(objects: int) -> Iterator[FakeTensorMode]:
    """`fake_tensors` with device CUDA, on a machine without it; autograd's backward pass does not run on them.

    Args:
        objects: their number in the batch, the only value that SAM 2's loss reads back; any other read raises.
    """

    def item(tensor: Tensor) -> float:
        code = sys._getframe(1).f_code
        if code.co_filename.endswith("training/loss_fns.py"):
            return float(objects)
        raise RuntimeError(f"{code.co_filename} reads a value back from the device in {code.co_name}")

    with (
        fake_tensors() as mode,
        mock.patch.object(Tensor, "item", item),
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
        mock.patch("torch.cuda.is_bf16_supported", lambda *args, **kwargs: True),
    ):
        yield mode


def convert(model: nn.Module, mode: FakeTensorMode, device: str = "cpu") -> None:
    """Replaces the parameters and buffers of a model with fake ones, in place; their memory is freed."""

    def fake(tensor: Tensor) -> Tensor:
        return mode.from_tensor(tensor.data) if device == "cpu" else torch.empty_like(tensor.data, device=device)

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(fake(parameter), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fake(buffer)


def _click(gt_masks: Tensor, pred_masks: Tensor | None, method: str) -> tuple[Tensor, Tensor]:
    points = torch.zeros(len(gt_masks), 1, 2, device=gt_masks.device)
    return points, torch.ones(len(gt_masks), 1, dtype=torch.int32, device=gt_masks.device)


class _NoSampler:
    @staticmethod
    @contextmanager
    def installed() -> Iterator[None]:
        yield
