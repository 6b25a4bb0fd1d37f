"""The weights of pairs in the loss of a class step, so that mask terms are divided by the number of present pairs.

    mask terms (focal, Dice, IoU, Tversky)    sum over present pairs / P
    score term                                sum over all pairs / N
    with absent_focal a > 0                   also a * (sum of the focal terms of absent pairs) / N

A pair is a class and an image. P is the number of present pairs on all ranks, at least 1, and N that of all pairs, each
divided by the number of ranks, since DDP averages over ranks. Stock divides every term by N: with four of five classes
absent, its mask terms would be five times weaker.

Legend: O pairs on this rank.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from sam2_lora_ext.utils.errors import UserError

FOCAL = "loss_mask"


def checked_focal(absent_focal: float) -> float:
    """The weight a; raises a `UserError` if it is invalid."""
    if not (math.isfinite(absent_focal) and absent_focal >= 0):
        raise UserError(f"absent_focal must be a finite weight of at least 0, got {absent_focal}")
    return absent_focal


def class_shares(present: Tensor, num_pairs: float) -> Tensor:
    """N / P for pairs whose image has the class, else 1: [O].

    In validation P is counted on this rank alone, since other ranks may have a batch of clicks at the same time.

    Args:
        present: 1.0 where the image has the class, else 0.0: [O].
        num_pairs: N, which the loss divides by.
    """
    total, ranks = present.sum(), 1
    if torch.is_grad_enabled() and dist.is_available() and dist.is_initialized():
        ranks = dist.get_world_size()
        dist.all_reduce(total)
    return torch.where(present > 0, num_pairs * ranks / total.clamp(min=1), 1.0)


def class_factors(
    present: Tensor, shares: Tensor, weights: Tensor, names: list[str], absent_focal: float
) -> dict[str, Tensor]:
    """The factor [O] of each pair's mask terms, by the term's name; the loss then divides by N.

    Args:
        present: see `class_shares`.
        shares: [O], of `class_shares`.
        weights: of the pairs' classes [O].
        names: of the mask terms.
        absent_focal: a.
    """
    factors = {name: present * shares * weights for name in names}
    if absent_focal:
        factors[FOCAL] = factors[FOCAL] + absent_focal * (1 - present) * weights
    return factors
