"""SAM 2's two-way transformer with the image's tokens in one piece of memory, and their positions added once.

Stock takes the image as a permuted view, which every sum and projection of its first layer copies, and adds the positions
for the attention to the image and again for that of the image, where the tokens are still the same.

The tokens of the positions are made and kept once for all prediction steps (`lean.shared`): grids of one shape have the same
positions, unless they are trained.

Legend: B prompts · C channels · H W image tokens · P prompt tokens.
"""

import torch
from sam2.modeling.sam.transformer import TwoWayAttentionBlock, TwoWayTransformer
from torch import Tensor

from sam2_lora_ext.lean.recompute import recomputed
from sam2_lora_ext.lean.shared import shared


class LeanTwoWayTransformer(TwoWayTransformer):
    """`TwoWayTransformer` that computes the same."""

    def forward(self, image_embedding: Tensor, image_pe: Tensor, point_embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Image and positions (B, C, H, W) with prompts (B, P, C) to prompts (B, P, C) and image (B, H W, C).

        The positions are those of one grid, as the mask decoder repeats them for each prompt, so the first are read.
        """
        keys, key_pe, queries = _tokens(image_embedding), _positions(image_pe[:1]), point_embedding
        for layer in self.layers:
            queries, keys = layer(queries=queries, keys=keys, query_pe=point_embedding, key_pe=key_pe)
        attended = self.final_attn_token_to_image(q=queries + point_embedding, k=placed(keys, key_pe), v=keys)
        return self.norm_final_attn(queries + attended), keys


class LeanTwoWayBlock(TwoWayAttentionBlock):
    """`TwoWayAttentionBlock` that computes the same."""

    def forward(self, queries: Tensor, keys: Tensor, query_pe: Tensor, key_pe: Tensor) -> tuple[Tensor, Tensor]:
        """Prompts (B, P, C) and image (B, H W, C), and the positions of each, to prompts and image."""
        if self.skip_first_layer_pe:
            queries = self.self_attn(q=queries, k=queries, v=queries)
        else:
            placed_queries = queries + query_pe
            queries = queries + self.self_attn(q=placed_queries, k=placed_queries, v=queries)
        queries = self.norm1(queries)
        placed_keys = placed(keys, key_pe)
        queries = self.norm2(queries + self.cross_attn_token_to_image(q=queries + query_pe, k=placed_keys, v=keys))
        queries = self.norm3(queries + self.mlp(queries))
        keys = keys + self.cross_attn_image_to_token(q=placed_keys, k=queries + query_pe, v=queries)
        return queries, recomputed(self.norm4(keys), self.norm4, keys)


def _tokens(grid: Tensor) -> Tensor:
    return grid.flatten(2).transpose(1, 2).contiguous()


def _positions(grid: Tensor) -> Tensor:
    if grid.requires_grad:
        return _tokens(grid)
    return shared((_positions, grid.shape, grid.dtype, grid.device), lambda: _tokens(grid))


def placed(keys: Tensor, key_pe: Tensor) -> Tensor:
    """The image's tokens (B, H W, C) with their positions (1, H W, C)."""
    return recomputed(keys + key_pe, torch.add, keys, key_pe)
