"""SAM 2's trunk (Hiera) with positions by rows and columns, and blocks that project the image's tokens and no padding.

Stock interpolates the positions of a 7 x 7 or 14 x 14 grid over both axes at once, in twelve times the time.

Stock fills windows that do not divide the image with zero tokens, projects all of them to q, k and v, lets all attend, and
projects the results again before it throws the padding away: at 512 px, where windows of 14 tokens cover 32 with 42, 1,764 tokens
for 1,024. Each token is projected by itself, and what the projection makes of a zero token is its bias, so here keys and values are
filled with that, and the image's tokens alone ask.

Windows of a large map go by strips: where they are not kept, what is made of one gets the memory of the one before.

Legend: B images · H W tokens · C channels · N windows of S x S tokens.
"""

import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from sam2.modeling.backbones.hieradet import Hiera, MultiScaleAttention, MultiScaleBlock, do_pool
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sam2_lora_ext.lean.mlp import frozen_mlp, is_frozen, numbers_at_a_time
from sam2_lora_ext.lean.recompute import recomputed
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
    """`MultiScaleBlock` that computes the same without projecting padding; as stock where half a padding would be pooled."""

    keeps_hidden = True  # of the MLP

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, H, W, C) to (B, H', W', C'): halved, with other channels, where a stage begins."""
        if self.q_stride and any(n % self.q_stride[0] for n in (self.window_size, *x.shape[1:3])):
            return super().forward(x)
        x = x.contiguous()  # the first block's channels are apart in memory, and would be so up to the mask decoder
        normed = recomputed(self.norm1(x), self.norm1, x)
        shortcut = x if self.dim == self.dim_out else do_pool(self.proj(normed), self.pool)
        x = shortcut + self.drop_path(self._attention(normed, shortcut.shape[1:3]))
        return x + self.drop_path(self._mlp(x))

    def _attention(self, x: Tensor, size_after: tuple[int, int]) -> Tensor:
        size, projection = self.window_size, self.attn.proj
        if not size:
            return projection(attend(self.attn, *projected(self.attn.qkv, x)))
        before = regions_of(x.shape[1:3], size)
        after = regions_of(size_after, size // self.q_stride[0] if self.q_stride else size)
        if x.shape[1] % size == x.shape[2] % size == 0:
            count = math.ceil(max(x.shape[:3].numel(), 1) * self.dim_out / (2 * numbers_at_a_time(x.device)))
            before, after = before[0].strips(count), after[0].strips(count)
            parts = [projection(attend(self.attn, *projected(self.attn.qkv, windows))) for windows in split(x, None, before)]
            return joined(after, size_after, *parts)
        (q, k, v), bias = projected(self.attn.qkv, x), self.attn.qkv.bias
        _, *biases = (x.new_zeros(3 * q.shape[-1]) if bias is None else bias.to(q.dtype)).chunk(3)
        parts = zip(split(q, None, before), *(split(*part, before) for part in zip((k, v), biases)))
        attended, join = [attend(self.attn, *part) for part in parts], partial(joined, after, size_after)
        return projection(recomputed(join(*attended), join, *attended))

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


class Region(NamedTuple):
    """Equal windows side by side: of a map that S x S windows do not divide those inside, or those of an edge without their padding.

    Attributes:
        top, left: the first token's row and column.
        down, across: how many windows.
        height, width: the tokens of each, at most S x S.
        size: S.
    """

    top: int
    left: int
    down: int
    across: int
    height: int
    width: int
    size: int

    def strips(self, count: int) -> list["Region"]:
        """The same in about as many parts one below the other."""
        each = math.ceil(self.down / count)
        firsts = range(0, self.down, each)
        return [self._replace(top=self.top + first * self.height, down=min(each, self.down - first)) for first in firsts]

    def of(self, x: Tensor) -> Tensor:
        """A view (B, down, across, height, width, C) of a map (B, H, W, C)."""
        part = x[:, self.top : self.top + self.down * self.height, self.left : self.left + self.across * self.width]
        return part.unflatten(1, (self.down, -1)).unflatten(3, (self.across, -1)).transpose(2, 3)

    def windows(self, x: Tensor, fill: Tensor | None = None) -> Tensor:
        """A copy (B N, height, width, C) of that; with a fill (C) of whole windows (B N, S, S, C), padded with it."""
        region, (height, width) = self.of(x), (self.height, self.width) if fill is None else (self.size, self.size)
        y = x.new_empty(*region.shape[:3], height, width, x.shape[-1])
        y[..., : self.height, : self.width, :] = region
        if fill is not None:
            y[..., self.height :, :, :] = fill
            y[..., : self.height, self.width :, :] = fill
        return y.flatten(0, 2)

    def write(self, windows: Tensor, x: Tensor) -> None:
        """Writes windows (B N, height or S, width or S, C) to this place of a map (B, H, W, C), without padding."""
        self.of(x).copy_(windows.unflatten(0, (len(x), self.down, self.across))[..., : self.height, : self.width, :])


def regions_of(sides: Iterable[int], size: int) -> list[Region]:
    """The regions of a map of H x W tokens: what is inside, the right and the lower edge and their corner, as far as there are."""
    rows, columns = ([run for run in ((0, n // size, size), (n - n % size, 1, n % size)) if run[1] * run[2]] for n in sides)
    return [
        Region(top, left, down, across, height, width, size) for top, down, height in rows for left, across, width in columns
    ]  # fmt: skip


def split(x: Tensor, fill: Tensor | None, regions: list[Region]) -> list[Tensor]:
    """`Region.windows` of each region of a map (B, H, W, C), computed again in backward."""
    parts = _Split.apply(x, fill, regions)
    sources = [x] if fill is None else [x, fill]
    return [recomputed(part, region.windows, *sources) for part, region in zip(parts, regions)]


def joined(regions: list[Region], sides: tuple[int, int], *parts: Tensor) -> Tensor:
    """The map (B, H, W, C) that has windows (B N, height, width, C) for its regions."""
    return _Joined.apply(regions, sides, *parts)


def _put_together(parts: Sequence[Tensor], regions: list[Region], sides: tuple[int, int]) -> Tensor:
    batch = len(parts[0]) // (regions[0].down * regions[0].across)
    y = parts[0].new_empty(batch, *sides, parts[0].shape[-1])
    for part, region in zip(parts, regions):
        region.write(part, y)
    return y


class _Split(torch.autograd.Function):
    """A map (B, H, W, C), and a fill (C) or None, to `Region.windows` of each region."""

    @staticmethod
    def forward(ctx, x: Tensor, fill: Tensor | None, regions: list[Region]) -> tuple[Tensor, ...]:
        ctx.regions, ctx.sides = regions, x.shape[1:3]
        return tuple(region.windows(x, fill) for region in regions)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys: Tensor) -> tuple[Tensor | None, ...]:
        dfill = None
        if ctx.needs_input_grad[1]:
            pads = ((dy[:, region.height :], dy[:, : region.height, region.width :]) for dy, region in zip(dys, ctx.regions))
            dfill = sum(pad.sum((0, 1, 2)) for pair in pads for pad in pair)
        return _put_together(dys, ctx.regions, ctx.sides) if ctx.needs_input_grad[0] else None, dfill, None


class _Joined(torch.autograd.Function):
    """The way back, without a fill."""

    @staticmethod
    def forward(ctx, regions: list[Region], sides: tuple[int, int], *parts: Tensor) -> Tensor:
        ctx.regions = regions
        return _put_together(parts, regions, sides)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(region.windows(dy) for region in ctx.regions)


def attend(attention: MultiScaleAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attention` between its two projections: q (N, h, w, C), k and v (N, S, S, C) to (N, h', w', C), halved where q is pooled."""
    if attention.q_pool:
        q = do_pool(q, attention.q_pool)
    n, height, width, channels = q.shape
    q, k, v = (x.reshape(n, -1, attention.num_heads, channels // attention.num_heads).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, height, width, channels)
