"""The mask decoder's last transposed convolution and the image's finest features, which SAM 2 adds to it, in one.

    y[:, :, 2 i + a, 2 j + b] = W[:, :, a, b]^T x[:, :, i, j] + bias + f[:, :, 2 i + a, 2 j + b],   a, b in {0, 1}

Kernel and stride are 2, so each of four products fills every second row and column: in two thirds of the time of the
convolution, the sum, and the copy that brings each channel by itself, as the product after it wants it. The sum is the
largest map of a prediction step, and made of little, so it may be computed again.

Shapes: x (B, C, H, W) · W (C, C', 2, 2) · f, y (B, C', 2 H, 2 W).
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sam2_lora_ext.lean.recompute import recomputed

CORNERS = [(..., slice(a, None, 2), slice(b, None, 2)) for a, b in itertools.product(range(2), repeat=2)]


class LastUpscaling(nn.ConvTranspose2d):
    """A transposed convolution to whose result something is added at once, as by `dc2(x) + feat_s0` in SAM 2."""

    def forward(self, x: Tensor) -> "Tensor | _Summand":
        """The result; while a graph is made, what becomes the sum when something is added to it: no tensor before."""
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().forward(x)
        return _Summand(self, x)

    def plus(self, x: Tensor, features: Tensor) -> Tensor:
        """The sum, contiguous."""
        kind = x.device.type
        if any(parameter.requires_grad for parameter in self.parameters()) or not _is_plain(self):
            return (super().forward(x) + features).contiguous()
        if torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                return self.plus(x.to(torch.get_autocast_dtype(kind)), features)
        return _Sum.apply(x, features, self.weight, self.bias)


@dataclass(frozen=True)
class _Summand:
    layer: LastUpscaling
    x: Tensor

    def __add__(self, features: Tensor) -> Tensor:
        return recomputed(self.layer.plus(self.x, features), self.layer.plus, self.x, features)

    __radd__ = __add__


def _is_plain(layer: nn.ConvTranspose2d) -> bool:
    """Whether each pixel becomes four that no other reaches, and there is a bias, as in SAM 2."""
    spread = layer.kernel_size, layer.stride, layer.dilation, layer.padding, layer.output_padding, layer.groups
    return spread == ((2, 2), (2, 2), (1, 1), (0, 0), (0, 0), 1) and layer.bias is not None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.dtypes = x.dtype, features.dtype
        batch, _, height, width = x.shape
        w, bias = weight.to(x.dtype).flatten(1).t(), bias.to(x.dtype).repeat_interleave(4)[:, None]  # 4 C' C, 4 C' 1
        corners = torch.baddbmm(bias, w.expand(batch, -1, -1), x.flatten(2)).view(batch, len(bias) // 4, 4, height, width)
        shape = torch.broadcast_shapes((batch, len(bias) // 4, 2 * height, 2 * width), features.shape)  # one image, several prompts
        y = torch.empty(shape, dtype=torch.promote_types(*ctx.dtypes), device=x.device)
        for corner, place in zip(corners.unbind(2), CORNERS, strict=True):
            torch.add(corner, features[place], out=y[place])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        (weight,), (dtype, of_features) = ctx.saved_tensors, ctx.dtypes
        corners = torch.stack([dy[place] for place in CORNERS], 2).to(dtype)  # B C' 4 H W
        w = weight.to(dtype).flatten(1).t()
        with torch.autocast(dy.device.type, enabled=False):
            dx = corners.flatten(1, 2).flatten(2).transpose(1, 2) @ w  # B H W C, the order in which a channel norm wants it
        return dx.unflatten(1, corners.shape[3:]).permute(0, 3, 1, 2), dy.to(of_features), None, None
