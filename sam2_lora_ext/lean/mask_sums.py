"""The sums over pixels that SAM 2's mask losses are made of, keeping nothing for backward but the logits.

With g the target (0 or 1) and z = (1 - 2 g) x the logit away from it, q = sigmoid(z) is the probability of the wrong answer:

    focal    = mean of w q^gamma softplus(z),  w = alpha where g = 1, 1 - alpha elsewhere (1 everywhere for alpha < 0)
    overlap  = sum of p g,   drawn = sum of p,  p = sigmoid(x)
    dfocal/dx = (1 - 2 g) w q^gamma (gamma (1 - q) softplus(z) + q) / (H W),   dp/dx = q (1 - q)

Stock keeps about ten maps of the size of the logits. Here forward and backward work on one map (H W) at a time, so
temporaries stay small, and maps whose sums have no gradient (channels that were not selected) cost nothing in backward.
SAM 2 enlarges its masks four times (bilinearly) before the loss; from the small ones, a map is enlarged here when it is
its turn, and only the small ones are kept.

Shapes: O objects, M mask channels, H W pixels of the targets, h w of the logits: H W or smaller.
"""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class MaskSums(NamedTuple):
    """Sums over the pixels of each map, each float [O M].

    Attributes:
        focal: mean focal loss (arXiv 1708.02002).
        overlap: sum of the probabilities inside the target.
        drawn: sum of the probabilities.
        hits: number of pixels with a logit above 0 inside the target; without a gradient.
        positives: number of pixels with a logit above 0; without a gradient.
        area: number of pixels of the target; without a gradient.
    """

    focal: Tensor
    overlap: Tensor
    drawn: Tensor
    hits: Tensor
    positives: Tensor
    area: Tensor


def mask_sums(logits: Tensor, targets: Tensor, alpha: float, gamma: float) -> MaskSums:
    """The sums of each map of `logits` [O M h w], finite, for `targets` [O 1 H W], 0 or 1 in any type, differentiable in the logits."""
    return MaskSums(*_MaskSums.apply(logits, targets, alpha, gamma))


class _MaskSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, alpha: float, gamma: float) -> tuple[Tensor, ...]:
        shape, dtype = logits.shape[:2], torch.promote_types(logits.dtype, torch.float32)
        focal, overlap, drawn, hits, positives, area = (torch.zeros(shape, dtype=dtype, device=logits.device) for _ in range(6))
        for o, m in itertools.product(*map(range, shape)):
            g = _as_numbers(targets[o, 0], dtype)
            x = _enlarged(logits[o, m], g.shape).to(dtype)
            z, q = _away(x, g)
            focal[o, m] = _weighted(_times_power(_softplus(z), q, gamma), g, alpha) / g.numel()
            wrong, wrong_inside, inside = q.sum(), _inside(q, g), g.sum()
            area[o, m] = inside
            overlap[o, m] = inside - wrong_inside
            drawn[o, m] = inside - wrong_inside + (wrong - wrong_inside)
            above = x.sign().clamp_(min=0)  # in a seventh of the time of a comparison
            positives[o, m] = above.sum()
            hits[o, m] = _inside(above, g)
        ctx.save_for_backward(logits, targets)
        ctx.alpha, ctx.gamma = alpha, gamma
        ctx.mark_non_differentiable(hits, positives, area)
        return focal, overlap, drawn, hits, positives, area

    @staticmethod
    @once_differentiable
    def backward(ctx, dfocal: Tensor, doverlap: Tensor, ddrawn: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets = ctx.saved_tensors
        grad = torch.zeros_like(logits)
        for o, m in with_gradient(dfocal, doverlap, ddrawn):
            g = _as_numbers(targets[o, 0], dfocal.dtype)
            x = _enlarged(logits[o, m], g.shape).to(dfocal.dtype)
            z, q = _away(x, g)
            right = 1 - q
            slope = torch.addcmul(q, _softplus(z), right, value=ctx.gamma)
            _times_power(slope, q, ctx.gamma).mul_(_away_weight(g, ctx.alpha)).mul_(dfocal[o, m] / g.numel())
            slope.addcmul_((g * doverlap[o, m]).add_(ddrawn[o, m]), right.mul_(q))
            grad[o, m] = _reduced(slope, grad.shape[2:])
        return grad, None, None, None


def with_gradient(*gradients: Tensor) -> list[list[int]]:
    """The maps (o, m) of which some sum has a gradient."""
    return torch.stack(gradients).any(0).nonzero().tolist()


def _enlarged(x: Tensor, size: torch.Size) -> Tensor:
    """A map (h w) at `size`, as SAM 2 enlarges its masks."""
    return x if x.shape == size else F.interpolate(x[None, None], size, mode="bilinear", align_corners=False)[0, 0]


def _reduced(dy: Tensor, size: torch.Size) -> Tensor:
    """The gradient at the small map, of `size`, from that at the large one (H W).

    Two products with the weights of the enlargement along each side: on a CPU in a fifth of the time of torch's own gradient of
    `interpolate`, and on a GPU repeatable, which torch's is not.
    """
    if dy.shape == size:
        return dy
    down, across = (_weights(small, large, dy) for small, large in zip(size, dy.shape))
    with torch.autocast(dy.device.type, enabled=False):  # where TF32 is allowed, these are products in TF32 like the others
        return down @ dy @ across.t()


def _weights(small: int, large: int, like: Tensor) -> Tensor:
    """What each of `small` pixels gives to each of `large` ones, (small, large)."""
    unit = torch.eye(small, dtype=like.dtype, device=like.device)
    return F.interpolate(unit[None], large, mode="linear", align_corners=False)[0]


def _as_numbers(target: Tensor, dtype: torch.dtype) -> Tensor:
    return (target.view(torch.uint8) if target.dtype == torch.bool else target).to(dtype)  # of bools, in a fifth of the time


def _away(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """z and q of a map."""
    z = g.mul(-2).add_(1).mul_(x)
    return z, z.sigmoid()


def _softplus(z: Tensor) -> Tensor:
    """log(1 + e^z), on a CPU in half the time of `logsigmoid`; above 40 it is z in double precision too."""
    return F.softplus(z, threshold=40)


def _inside(x: Tensor, g: Tensor) -> Tensor:
    """The sum of x where g is 1, added up as `x.sum()` is: from that it is taken away."""
    return (x * g).sum()


def _weighted(x: Tensor, g: Tensor, alpha: float) -> Tensor:
    """The sum of w x."""
    return (1 - alpha) * x.sum() + (2 * alpha - 1) * _inside(x, g) if alpha >= 0 else x.sum()


def _away_weight(g: Tensor, alpha: float) -> Tensor:
    """(1 - 2 g) w."""
    return g.neg().add_(1 - alpha) if alpha >= 0 else g.mul(-2).add_(1)


def _times_power(x: Tensor, q: Tensor, gamma: float) -> Tensor:
    """x q^gamma, in place of x."""
    return x.mul_(q).mul_(q) if gamma == 2 else x.mul_(q**gamma)
