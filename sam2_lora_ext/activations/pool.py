"""2x2 max-pooling that saves one byte for each result: the index of the largest of its window's four values.

torch's saves its input and an index of eight bytes for each result. Both compute with torch's own operations.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class LeanMaxPool2d(nn.MaxPool2d):
    """`nn.MaxPool2d` that is lean for kernel and stride 2 and inputs (B, C, H, W) of even height and width."""

    def forward(self, x: Tensor) -> Tensor:
        square = {self.kernel_size, self.stride} <= {2, (2, 2)} and self.padding == 0 and self.dilation == 1
        if square and not self.return_indices and x.dim() == 4 and x.shape[2] % 2 == x.shape[3] % 2 == 0:
            return _MaxPool.apply(x)
        return super().forward(x)


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        y, index = F.max_pool2d(x, 2, return_indices=True)
        behind = index - _firsts(x)  # 0, 1, W or W + 1, where W is even
        ctx.save_for_backward((behind & 1).to(torch.uint8).add_(behind > 1, alpha=2))
        ctx.shape = x.shape
        ctx.layout = (
            torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> Tensor:
        (position,) = ctx.saved_tensors
        # only its shape is read
        x = torch.empty(ctx.shape, dtype=dy.dtype, device=dy.device, memory_format=ctx.layout)
        index = position % 2 + (position // 2).long() * ctx.shape[3] + _firsts(x)
        return torch.ops.aten.max_pool2d_with_indices_backward(dy, x, [2, 2], [2, 2], [0, 0], [1, 1], False, index)


def _firsts(x: Tensor) -> Tensor:
    """The indices (H / 2, W / 2), int64, of the windows' first values in a map (B, C, H, W)."""
    height, width = x.shape[2:]
    rows, columns = (torch.arange(0, side, 2, device=x.device) for side in (height, width))
    return rows[:, None] * width + columns
