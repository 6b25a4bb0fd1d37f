"""SAM 2's trunk (Hiera) with positions by rows and columns, and blocks that project the image's tokens and no padding.

Stock interpolates the positions of a 7 x 7 or 14 x 14 grid over both axes at once, in twelve times the time.

Stock fills windows that do not divide the image with zero tokens, projects all of them to q, k and v, and projects the
results again before it throws the padding away: at 512 px, where windows of 14 tokens cover 32 with 42, 1,764 tokens for 1,024.
Each token is projected by itself, and what the projection makes of a zero token is its bias, so here the windows are
filled with that.

Legend: B images · H W tokens · C channels · N windows of S x S tokens.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from sam2.modeling.backbones.hieradet import Hiera, MultiScaleAttention, MultiScaleBlock, do_pool
from sam2.modeling.backbones.utils import window_partition, window_unpartition
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sam2_lora_ext.lean.mlp import frozen_mlp, is_frozen
from sam2_lora_ext.lean.recompute import recomputed
from sam2_lora_ext.lean.shared import shared
from sam2_lora_ext.lora.lean import LeanLoRALinear


class LeanHiera(Hiera):
    """`Hiera` that interpolates its positions by rows, then by columns: the same weights, and to rounding the same numbers."""

    def _get_pos_embed(self, hw: tuple[int, int]) -> Tensor:
        """Positions (1, H, W, C), not contiguous, as stock's."""
        (grid,), window = self.pos_embed, self.pos_embed_window
        with torch.autocast(grid.device.type, enabled=False):
            rows, columns = (bicubic_weights(small, large, grid) for small, large in zip(grid.shape[1:], hw))
            positions = torch.einsum("ih,cij,jw->chw", rows, grid, columns)[None]
        times = [side // small for side, small in zip(positions.shape, window.shape)]
        return (positions + window.tile(times)).permute(0, 2, 3, 1)


class LeanBlock(MultiScaleBlock):
    """`MultiScaleBlock` that computes the same without projecting padding."""

    keeps_hidden = True  # of the MLP

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, H, W, C) to (B, H', W', C'): halved, with other channels, where a stage begins."""
        x = x.contiguous()  # the first block's channels are apart in memory, and would be so up to the mask decoder
        normed = recomputed(self.norm1(x), self.norm1, x)
        shortcut = x if self.dim == self.dim_out else do_pool(self.proj(normed), self.pool)
        x = shortcut + self.drop_path(self._attention(normed, shortcut.shape[1:3]))
        return x + self.drop_path(self._mlp(x))

    def _attention(self, x: Tensor, size_after: tuple[int, int]) -> Tensor:
        size, projection = self.window_size, self.attn.proj
        if not size:
            return projection(attend(self.attn, *projected(self.attn.qkv, x)))
        small = size // self.q_stride[0] if self.q_stride else size  # a window after the pooling of q
        if x.shape[1] % size == x.shape[2] % size == 0:

            def split(x: Tensor) -> Tensor:
                return window_partition(x, size)[0]

            x = recomputed(split(x), split, x)
            windows = projection(attend(self.attn, *projected(self.attn.qkv, x)))
            return window_unpartition(windows, small, size_after, size_after)

        before, after = Windows.of(x.shape[1:3], size, x.device), Windows.of(size_after, small, x.device)
        qkv, bias = projected(self.attn.qkv, x), self.attn.qkv.bias
        biases = (x.new_zeros(3 * qkv[0].shape[-1]) if bias is None else bias.to(qkv[0].dtype)).chunk(3)
        windows = attend(self.attn, *[recomputed(before.filled(*part), before.filled, *part) for part in zip(qkv, biases)])
        return projection(recomputed(after.emptied(windows), after.emptied, windows))

    def _mlp(self, x: Tensor) -> Tensor:
        normed = recomputed(self.norm2(x), self.norm2, x)
        if is_frozen(self.mlp):
            return frozen_mlp(self.mlp, normed, self.keeps_hidden)
        wide, narrow = self.mlp.layers
        hidden = wide(normed)
        return narrow(recomputed(self.mlp.act(hidden), self.mlp.act, hidden))


def bicubic_weights(small: int, large: int, like: Tensor) -> Tensor:
    """How much of each of `small` numbers is in each of the `large` that they are interpolated to: (small, large)."""
    each = torch.eye(small, dtype=like.dtype, device=like.device)
    return F.interpolate(each[None, :, :, None], size=(large, 1), mode="bicubic")[0, :, :, 0]


def projected(qkv: nn.Linear, x: Tensor) -> tuple[Tensor, ...]:
    """q, k and v (..., C), each in a tensor of its own where that saves to put their gradients together."""
    return qkv(x, outputs=3) if type(qkv) is LeanLoRALinear else qkv(x).chunk(3, -1)


class Windows(NamedTuple):
    """Windows of S x S tokens that cover H x W of them, and more.

    Attributes:
        sides: H and W.
        size: S.
        places: the place of each token among those of all windows, (H W).
        tokens: the token at each of these places, H W where there is none, (N S S).
    """

    sides: tuple[int, int]
    size: int
    places: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, sides: Iterable[int], size: int, device: torch.device) -> "Windows":
        """In the order of SAM 2's `window_partition`."""
        height, width = sides

        def make() -> Windows:
            numbers = torch.arange(1, height * width + 1, device=device).view(1, height, width, 1)
            tokens = window_partition(numbers, size)[0].flatten() - 1  # that pads with zeros
            places = tokens.argsort(stable=True)[len(tokens) - height * width :]
            return cls((height, width), size, places, tokens.where(tokens >= 0, height * width))

        return shared((Windows, height, width, size, device), make)

    def filled(self, x: Tensor, fill: Tensor) -> Tensor:
        """The tokens x (B, H, W, C) in windows (B N, S, S, C), and `fill` (C) at the places where there is none.

        With a projection and its bias, what stock gets by projecting padding.
        """
        return _Gathered.apply(x.flatten(1, 2), fill, self.tokens, self.places).view(-1, self.size, self.size, x.shape[-1])

    def emptied(self, windows: Tensor) -> Tensor:
        """The tokens (B, H, W, C) that are in windows (B N, S, S, C)."""
        rows = windows.reshape(-1, len(self.tokens), windows.shape[-1])
        return _Gathered.apply(rows, None, self.places, self.tokens).unflatten(1, self.sides)


class _Gathered(torch.autograd.Function):
    """Rows x (B, R, C) by their numbers, each at most once, or `fill` (C) by the number R; the gradient by those of `inverse`."""

    @staticmethod
    def forward(ctx, x: Tensor, fill: Tensor | None, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.count, ctx.index, ctx.inverse = x.shape[1], index, inverse
        return _rows(x, fill, index)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        dfill = dy[:, ctx.index == ctx.count].sum((0, 1)) if ctx.needs_input_grad[1] else None
        nothing = dy.new_zeros(dy.shape[2]) if len(ctx.inverse) > len(ctx.index) else None
        return _rows(dy, nothing, ctx.inverse), dfill, None, None


def _rows(x: Tensor, fill: Tensor | None, index: Tensor) -> Tensor:
    x = x if fill is None else torch.cat([x, fill.expand(len(x), 1, -1)], 1)
    return x.index_select(1, index)


def attend(attention: MultiScaleAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attention` between its two projections: q, k and v (N, S, S, C) to (N, S', S', C), halved where q is pooled."""
    if attention.q_pool:
        q = do_pool(q, attention.q_pool)
    n, height, width, channels = q.shape
    q, k, v = (x.reshape(n, -1, attention.num_heads, channels // attention.num_heads).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, height, width, channels)
