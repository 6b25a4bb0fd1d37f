"""Stitches the class logits and scores of a strip from those of its tiles.

    score_c = max_n score_nc
    logit_c(x) = sum_n v_n(x) a_nc logit_nc(x) / sum_n v_n(x) a_nc,  a_nc = [score_nc >= threshold_c]

with v_n as in `tiles.stitch`. A tile without the class does not contribute to its mask, since masks of absent classes
are not trained; where no tile has the class, its logit is `ABSENT`. Legend: N tiles, C classes, h w pixels of the
model's masks, H W of the strip.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sam2_lora_ext.adapters.decision import ABSENT, Decision


@dataclass(frozen=True)
class Tiles:
    """The outputs of the network for the tiles of one strip.

    Args:
        logits: [N, C, h, w].
        scores: [N, C].
        starts: first column of each tile.
        width: columns of a tile.
        size: (H, W) of the strip.
    """

    logits: Tensor
    scores: Tensor
    starts: tuple[int, ...]
    width: int
    size: tuple[int, int]


def merge_tiles(tiles: Tiles, decision: Decision) -> tuple[Tensor, Tensor]:
    """Logits float32 [C, H, W] and scores float32 [C] of the strip, on the tiles' device."""
    height, length = tiles.size
    logits = F.interpolate(tiles.logits.float(), (height, tiles.width), mode="bilinear", align_corners=False)
    scores, device = tiles.scores.float(), logits.device
    votes = (scores >= torch.tensor(decision.threshold, device=scores.device)).to(device, torch.float32)
    ramp = torch.arange(1, tiles.width + 1, dtype=torch.float32, device=device)
    ramp = torch.minimum(ramp, ramp.flip(0))
    total = torch.zeros(logits.shape[1], 1, length, device=device)
    merged = torch.zeros(logits.shape[1], height, length, device=device)
    for tile, vote, start in zip(logits, votes, tiles.starts, strict=True):
        weight = vote[:, None, None] * ramp
        merged[..., start : start + tiles.width] += tile * weight
        total[..., start : start + tiles.width] += weight
    return torch.where(total > 0, merged / total.clamp_min(1), ABSENT), scores.amax(0)
