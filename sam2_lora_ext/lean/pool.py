"""2x2 max-pooling that keeps one byte for each result: which of the four was the largest.

Stock's keeps its input and an index of eight bytes for each result. On ties both take the first in reading order.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class LeanMaxPool2d(nn.MaxPool2d):
    """`nn.MaxPool2d` with kernel and stride 2, for inputs (B, C, H, W) of even height and width; others go to stock."""

    def forward(self, x: Tensor) -> Tensor:
        square = {self.kernel_size, self.stride} <= {2, (2, 2)} and self.padding == 0 and self.dilation == 1
        if square and not self.return_indices and x.dim() == 4 and x.shape[2] % 2 == x.shape[3] % 2 == 0:
            return _MaxPool.apply(x)
        return super().forward(x)


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        top_left, top_right, low_left, low_right = _corners(x)
        top, low = torch.maximum(top_left, top_right), torch.maximum(low_left, low_right)
        low_wins = low > top
        right_wins = torch.where(low_wins, low_right > low_left, top_right > top_left)
        ctx.save_for_backward(low_wins.to(torch.uint8).mul_(2).add_(right_wins))
        ctx.shape = x.shape
        return torch.maximum(top, low)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> Tensor:
        (winner,) = ctx.saved_tensors
        channels_last = dy.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        dx = torch.empty(ctx.shape, dtype=dy.dtype, device=dy.device, memory_format=layout)
        for corner, place in enumerate(_corners(dx)):
            place.copy_(dy.masked_fill(winner != corner, 0))
        return dx


def _corners(x: Tensor) -> tuple[Tensor, ...]:
    """The four views (B, C, H / 2, W / 2) of the windows' corners, in reading order."""
    return x[..., ::2, ::2], x[..., ::2, 1::2], x[..., 1::2, ::2], x[..., 1::2, 1::2]
