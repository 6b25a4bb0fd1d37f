"""Runs a training step on fake tensors: true shapes and storages, true FLOPs and bytes, but no memory and no arithmetic.

A SAM 2 is constructed on the CPU first (Hiera's constructor reads values) and converted then. What a step decides from values
is fixed: the clicks, and which mask of an object has a gradient in the loss (the first). Dropout is CUDA's, see `cuda_dropout`.
"""

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
    """Inside, operations make fake tensors, and SAM 2 clicks without looking."""
    with mock.patch.object(host, "get_next_point", _click), \
            mock.patch.object(LoRASAM2Train, "_prompt_sampler", lambda self, input: _NoSampler), \
            cuda_dropout(), \
            FakeTensorMode(allow_non_fake_inputs=True) as mode:  # fmt: skip
        yield mode


def convert(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replaces the parameters and buffers of a model by fake ones, in place; their memory is freed."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(mode.from_tensor(parameter.data), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = mode.from_tensor(buffer)


def _click(gt_masks: Tensor, pred_masks: Tensor | None, method: str) -> tuple[Tensor, Tensor]:
    return torch.zeros(len(gt_masks), 1, 2), torch.ones(len(gt_masks), 1, dtype=torch.int32)


class _NoSampler:
    @staticmethod
    @contextmanager
    def installed() -> Iterator[None]:
        yield
