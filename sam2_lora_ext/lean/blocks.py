"""SAM 2's trunk (Hiera) with positions by rows and columns, and blocks that project the image's tokens and no padding.

Stock interpolates the positions of a 7 x 7 or 14 x 14 grid over both axes at once, in twelve times the time.

Stock fills windows that do not divide the image with zero tokens, projects all of them to q, k and v, and projects the
results again before it throws the padding away: at 512 px, where windows of 14 tokens cover 32 with 42, 1,764 tokens for 1,024.
Each token is projected by itself, and what the projection makes of a zero token is its bias, so here the windows are
filled with that.

Legend: B images · H W tokens · C channels · N windows of S x S tokens.
"""

import torch
from sam2.modeling.backbones.hieradet import Hiera, MultiScaleAttention, MultiScaleBlock, do_pool
from sam2.modeling.backbones.utils import window_partition, window_unpartition
from torch import Tensor, nn
from torch.nn import functional as F

from sam2_lora_ext.lean.mlp import frozen_mlp, is_frozen
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
        padded = [side + -side % small for side in size_after]

        def split(x: Tensor) -> Tensor:
            return window_partition(x, size)[0]

        def join(windows: Tensor) -> Tensor:
            return window_unpartition(windows, small, padded, size_after)

        if x.shape[1] % size == x.shape[2] % size == 0:
            x = recomputed(split(x), split, x)
            return join(projection(attend(self.attn, *projected(self.attn.qkv, x))))
        qkv, bias = projected(self.attn.qkv, x), self.attn.qkv.bias
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        windows = attend(self.attn, *[split(padded_with_bias(*part, size)) for part in zip(qkv, biases)])
        return projection(recomputed(join(windows), join, windows))

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


def padded_with_bias(x: Tensor, bias: Tensor | None, size: int) -> Tensor:
    """A projection (B, H, W, C) at multiples of `size` tokens: what stock gets by projecting padding."""
    high, wide = -x.shape[1] % size, -x.shape[2] % size
    batch, height, width, channels = x.shape
    fill = x.new_zeros(channels) if bias is None else bias.to(x.dtype)
    wider = torch.cat([x, fill.expand(batch, height, wide, channels)], 2)
    return torch.cat([wider, fill.expand(batch, high, width + wide, channels)], 1)


def attend(attention: MultiScaleAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attention` between its two projections: q, k and v (N, S, S, C) to (N, S', S', C), halved where q is pooled."""
    if attention.q_pool:
        q = do_pool(q, attention.q_pool)
    n, height, width, channels = q.shape
    q, k, v = (x.reshape(n, -1, attention.num_heads, channels // attention.num_heads).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, height, width, channels)
