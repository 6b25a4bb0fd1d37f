"""The products of `lean.upscaling`, by corners: the first sum, and the masks of the second one.

The second sum is the largest map of a step. It, its GELU and the masks go by a few tokens at a time, which stay in fast memory,
and backward makes them again: little is computed for each number of it.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sam2_lora_ext.lean.mlp import numbers_at_a_time


def _added(maps: Tensor, one: Tensor, other: Tensor) -> Tensor:
    return torch.baddbmm(maps, one, other) if maps.dtype == one.dtype else maps + one @ other


class CornerSum(torch.autograd.Function):
    """The first sum: x (B, C, H, W), maps (B, N, 4 C') and W (C, 4 C') to (B, C', 2 H, 2 W), its pixels in the order of the corners."""

    @staticmethod
    def forward(ctx, x: Tensor, maps: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.one_image, ctx.dtype = x.shape, len(maps) < len(x), maps.dtype
        batch, _, height, width = x.shape
        y = _added(maps, x.flatten(2).transpose(1, 2), weight.expand(batch, -1, -1))
        return y.view(batch, 4 * height * width, -1).transpose(1, 2).unflatten(2, (2 * height, 2 * width))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        (weight,), (batch, _, height, width) = ctx.saved_tensors, ctx.shape
        dmaps = dy.flatten(2).transpose(1, 2).reshape(batch, height * width, -1)
        with torch.autocast(dy.device.type, enabled=False):
            dx = dmaps.to(weight.dtype) @ weight.t()
        if not ctx.needs_input_grad[1]:
            dmaps = None
        else:
            dmaps = (dmaps.sum(0, keepdim=True) if ctx.one_image else dmaps).to(ctx.dtype)
        return dx.transpose(1, 2).unflatten(2, (height, width)), dmaps, None


class CornerMasks(torch.autograd.Function):
    """masks = hyper gelu(y),   y = W^T x + maps, its rows (C', 4) and columns N seen as C' and (4, N).

        dhyper = dmasks gelu(y)^T,   dy = gelu'(y) * hyper^T dmasks,   dmaps = dy,   dx = W dy

    Shapes: x (B, C, H, W) · hyper (B, M, C') · maps (B, 4 C', N) · W (C, 4 C') · masks (B, M, 4 N).
    """

    @staticmethod
    def forward(ctx, x: Tensor, hyper: Tensor, maps: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, hyper, maps, weight)
        masks = hyper.new_empty(*hyper.shape[:2], 4, maps.shape[2])
        weight_t = weight.t().expand(len(x), -1, -1)
        with torch.autocast(x.device.type, enabled=False):
            for x_few, maps_few, masks_few in _pieces(maps.shape[1] * len(x), x.flatten(2), maps, masks):
                y = F.gelu(_added(maps_few, weight_t, x_few)).to(hyper.dtype)
                masks_few.copy_((hyper @ y.view(*hyper.shape[::2], -1)).view(masks_few.shape))
        return masks.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx, dmasks: Tensor) -> tuple[Tensor | None, ...]:
        x, hyper, maps, weight = ctx.saved_tensors
        dmasks = dmasks.unflatten(2, (4, -1))
        dx = x.new_empty(len(x), maps.shape[2], x.shape[1])  # B N C: the order in which a norm over the channels wants it
        dhyper = torch.zeros_like(hyper, dtype=torch.promote_types(hyper.dtype, torch.float32))
        dmaps = torch.empty_like(maps) if ctx.needs_input_grad[2] else None
        weight, weight_t = (matrix.expand(len(x), -1, -1) for matrix in (weight, weight.t()))
        tensors = x.flatten(2), maps, dmasks, dx.transpose(1, 2), maps if dmaps is None else dmaps
        with torch.autocast(x.device.type, enabled=False):
            for x_few, maps_few, dmasks_few, dx_few, dmaps_few in _pieces(maps.shape[1] * len(x), *tensors):
                dmasks_few, y = dmasks_few.flatten(2), _added(maps_few, weight_t, x_few)
                dhyper += dmasks_few @ F.gelu(y).to(hyper.dtype).view(*hyper.shape[::2], -1).transpose(1, 2)
                dy = (hyper.transpose(1, 2) @ dmasks_few).view(y.shape).to(y.dtype)
                dy = torch.ops.aten.gelu_backward(dy, y)
                dx_few.copy_((dy.transpose(1, 2).to(weight.dtype) @ weight.transpose(1, 2)).transpose(1, 2))
                if dmaps is not None:
                    dmaps_few.copy_(dy if len(maps) == len(x) else dy.sum(0, keepdim=True))
        return dx.transpose(1, 2).unflatten(2, x.shape[2:]), dhyper.to(hyper.dtype), dmaps, None


def _pieces(width: int, *tensors: Tensor) -> "zip[tuple[Tensor, ...]]":
    """The last axis of some tensors in pieces, of which `width` numbers each make as much as is worked on at a time."""
    return zip(*(tensor.split(max(numbers_at_a_time(tensor.device) // width, 1), -1) for tensor in tensors))
