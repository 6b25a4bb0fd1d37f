"""Blocks of SAM 2's trunk (Hiera) that project the image's tokens and not the padding of its windows.

Stock fills windows that do not divide the image with zero tokens, projects all of them to q, k and v, and projects the
results again before it throws the padding away: at 512 px, where windows of 14 tokens cover 32 with 42, 1,764 tokens for 1,024.
Each token is projected by itself, and what the projection makes of a zero token is its bias, so here the windows are
filled with that.

Legend: B images · H W tokens · C channels · N windows of S x S tokens.
"""

import torch
from sam2.modeling.backbones.hieradet import MultiScaleAttention, MultiScaleBlock, do_pool
from sam2.modeling.backbones.utils import window_partition, window_unpartition
from torch import Tensor, nn
from torch.nn import functional as F

from sam2_lora_ext.lean.recompute import recomputed


class LeanBlock(MultiScaleBlock):
    """`MultiScaleBlock` that computes the same without projecting padding."""

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, H, W, C) to (B, H', W', C'): halved, with other channels, where a stage begins."""
        x = x.contiguous()  # the first block's channels are apart in memory, and would be so up to the mask decoder
        normed = recomputed(self.norm1(x), self.norm1, x)
        shortcut = x if self.dim == self.dim_out else do_pool(self.proj(normed), self.pool)
        x = shortcut + self.drop_path(self._attention(normed, shortcut.shape[1:3]))
        return x + self.drop_path(self._mlp(x))

    def _attention(self, x: Tensor, size_after: tuple[int, int]) -> Tensor:
        size = self.window_size
        if not size:
            return self.attn(x)
        small = size // self.q_stride[0] if self.q_stride else size  # a window after the pooling of q
        padded = [side + -side % small for side in size_after]

        def split(x: Tensor) -> Tensor:
            return window_partition(x, size)[0]

        def join(windows: Tensor) -> Tensor:
            return window_unpartition(windows, small, padded, size_after)

        if x.shape[1] % size == x.shape[2] % size == 0:
            return join(self.attn(recomputed(split(x), split, x)))
        windows = attend(self.attn, split(padded_with_bias(self.attn.qkv(x), self.attn.qkv.bias, size)))
        return self.attn.proj(recomputed(join(windows), join, windows))

    def _mlp(self, x: Tensor) -> Tensor:
        wide, narrow = self.mlp.layers
        normed = recomputed(self.norm2(x), self.norm2, x)
        hidden = wide(normed)
        if type(wide) is nn.Linear:  # an adapter's dropout draws random numbers
            recomputed(hidden, wide, normed)
        return narrow(recomputed(self.mlp.act(hidden), self.mlp.act, hidden))


def padded_with_bias(qkv: Tensor, bias: Tensor | None, size: int) -> Tensor:
    """qkv (B, H, W, C) at multiples of `size` tokens: what stock gets by projecting padding."""
    high, wide = -qkv.shape[1] % size, -qkv.shape[2] % size
    batch, height, width, channels = qkv.shape
    fill = qkv.new_zeros(channels) if bias is None else bias.to(qkv.dtype)
    wider = torch.cat([qkv, fill.expand(batch, height, wide, channels)], 2)
    return torch.cat([wider, fill.expand(batch, high, width + wide, channels)], 1)


def attend(attention: MultiScaleAttention, qkv: Tensor) -> Tensor:
    """`attention` between its two projections: qkv (N, S, S, 3 C) to (N, S', S', C), halved where q is pooled."""
    n, height, width, _ = qkv.shape
    q, k, v = torch.unbind(qkv.reshape(n, height * width, 3, attention.num_heads, -1), 2)
    if attention.q_pool:
        q = do_pool(q.reshape(n, height, width, -1), attention.q_pool)
        height, width = q.shape[1:3]
        q = q.reshape(n, height * width, attention.num_heads, -1)
    x = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return x.transpose(1, 2).reshape(n, height, width, -1)
