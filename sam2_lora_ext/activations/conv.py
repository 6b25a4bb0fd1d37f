"""Frozen convolutions that save no activation for backward: the gradient of their input needs only the weight.

torch's own convolutions save the input too. In SAM 2, frozen 1x1 convolutions are the only readers of the neck's two
largest feature maps (a quarter and an eighth of the image's side), a frozen transposed convolution reads the image
tokens after the two-way transformer, and frozen convolutions of the prompt encoder read the previous step's masks.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class LeanConv2d(nn.Conv2d):
    """`nn.Conv2d` that saves its input only while its weight is trained; for zero padding."""

    def forward(self, x: Tensor) -> Tensor:
        return _frozen(self, x, False) if _is_frozen(self, x) else super().forward(x)


class LeanConvTranspose2d(nn.ConvTranspose2d):
    """`nn.ConvTranspose2d` that saves its input only while its weight is trained."""

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        return (
            _frozen(self, x, True) if output_size is None and _is_frozen(self, x) else super().forward(x, output_size)
        )


def _is_frozen(layer: nn.Conv2d | nn.ConvTranspose2d, x: Tensor) -> bool:
    plain = not isinstance(layer.padding, str)
    return plain and x.requires_grad and torch.is_grad_enabled() and not layer.weight.requires_grad


def _frozen(layer: nn.Conv2d | nn.ConvTranspose2d, x: Tensor, transposed: bool) -> Tensor:
    how = layer.stride, layer.padding, layer.dilation, layer.output_padding, layer.groups
    return _FrozenConv.apply(x, layer.weight, layer.bias, transposed, *how)


class _FrozenConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        transposed: bool,
        stride,
        padding,
        dilation,
        output_padding,
        groups,
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.size, ctx.strides, ctx.dtype = x.size(), x.stride(), x.dtype
        ctx.how = stride, padding, dilation, transposed, output_padding, groups
        if transposed:
            return F.conv_transpose2d(x, weight, bias, stride, padding, output_padding, groups, dilation)
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        # the same memory layout as x: with another one the product takes three times as long
        x = dy.new_empty_strided(ctx.size, ctx.strides)
        dx, _, dbias = torch.ops.aten.convolution_backward(
            dy, x, weight.to(dy.dtype), [dy.shape[1]], *ctx.how, (True, False, ctx.needs_input_grad[2])
        )
        return dx.to(ctx.dtype), None, dbias, *[None] * 6
