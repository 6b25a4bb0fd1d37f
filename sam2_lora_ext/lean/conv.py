"""A frozen convolution that keeps nothing for backward: the gradient of its input needs the weight alone.

Stock keeps the input too. SAM 2's two largest feature maps, the neck's at a quarter and an eighth of the image's side,
are read by frozen 1x1 convolutions only.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class LeanConv2d(nn.Conv2d):
    """`nn.Conv2d` that keeps its input only while its weight is trained; for zero padding."""

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.requires_grad or not x.requires_grad or not torch.is_grad_enabled():
            return super().forward(x)
        return _FrozenConv.apply(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class _FrozenConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, *how) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.dtype, ctx.how = x.shape, x.dtype, how
        return F.conv2d(x, weight, bias, *how)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        dx = torch.nn.grad.conv2d_input(ctx.shape, weight.to(dy.dtype), dy, *ctx.how).to(ctx.dtype)
        return dx, None, dy.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None, *[None] * len(ctx.how)
