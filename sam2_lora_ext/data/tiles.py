"""Cuts strips into overlapping tiles, and stitches a model's outputs for the tiles.

A strip squashed to a square loses detail along its length; tiles keep it. Where tiles overlap, logits are averaged with
weights that fall off towards the ends of a tile, so seams are smooth. Legend: N tiles, H W strip, w tile width in
pixels.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sam2_lora_ext.utils.errors import UserError


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """First columns of evenly spaced tiles that cover [0, length); neighbours share at least `overlap` columns.

    Args:
        length: W of the strip.
        tile: w of a tile; at least `length` gives one tile of the whole strip.
        overlap: minimum number of columns that neighbours share, 0 <= overlap < tile.
    """
    if tile < 1 or not 0 <= overlap < tile:
        raise UserError(
            f"tiles need a width of at least 1 and an overlap below it, got width {tile}, overlap {overlap}"
        )
    if tile >= length:
        return [0]
    steps = -(-(length - tile) // (tile - overlap))
    return [round(step * (length - tile) / steps) for step in range(steps + 1)]


def cut(strip: Tensor, starts: Sequence[int], tile: int) -> Tensor:
    """Tiles [N, ..., H, w] of a strip [..., H, W]."""
    return torch.stack([strip[..., start : start + tile] for start in starts])


def stitch(tiles: Tensor, starts: Sequence[int], length: int) -> Tensor:
    """Joins the tiles of a strip; where they overlap, takes their weighted mean.

    out[..., x] = sum_n v_n(x) tiles[n, ..., x - start_n] / sum_n v_n(x), with v_n(x) the distance of column x from the
    nearer end of tile n, which is 1 for the outermost column.

    Args:
        tiles: logits [N, ..., H, w].
        starts: first column of each tile.
        length: W.

    Returns:
        logits [..., H, W], float32 (float64 for float64 tiles).

    Raises:
        UserError: a column is in no tile.
    """
    width = tiles.shape[-1]
    dtype = torch.promote_types(tiles.dtype, torch.float32)
    ramp = torch.arange(1, width + 1, dtype=dtype, device=tiles.device)
    ramp = torch.minimum(ramp, ramp.flip(0))
    total = torch.zeros(length, dtype=dtype, device=tiles.device)
    for start in starts:
        total[start : start + width] += ramp
    if not bool((total > 0).all()):
        raise UserError(f"{len(starts)} tiles of {width} columns do not cover a strip of {length}; use tile_starts")
    out = torch.zeros(*tiles.shape[1:-1], length, dtype=dtype, device=tiles.device)
    for tile, start in zip(tiles, starts, strict=True):
        columns = slice(start, start + width)
        out[..., columns] += tile * (ramp / total[columns])
    return out


def predict_strip(
    model: Callable[[Tensor], Tensor], strip: Tensor, tile: int, overlap: int, batch_size: int = 1
) -> Tensor:
    """Logits of a whole strip from a model that takes tiles.

    Args:
        model: images [n, C, H, w] -> logits [n, ..., H, w].
        strip: image [C, H, W].
        tile: w.
        overlap: minimum number of columns that neighbours share.
        batch_size: largest number of tiles in one call.

    Returns:
        logits [..., H, W].
    """
    starts = tile_starts(strip.shape[-1], tile, overlap)
    batches = cut(strip, starts, tile).split(batch_size)
    return stitch(torch.cat([model(batch) for batch in batches]), starts, strip.shape[-1])
