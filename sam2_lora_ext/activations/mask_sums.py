"""The sums over pixels in SAM 2's mask losses; only the logits at low resolution are saved for backward.

With g the target (0 or 1), x the logit and z = (1 - 2 g) x, q = sigmoid(z) is the probability of the wrong answer:

    focal    = mean of w q^gamma softplus(z),  w = alpha where g = 1, 1 - alpha elsewhere (1 everywhere for alpha < 0)
    overlap  = sum of p g,   drawn = sum of p,  p = sigmoid(x)
    dfocal/dx = (1 - 2 g) w q^gamma (gamma (1 - q) softplus(z) + q) / (H W),   dp/dx = q (1 - q)

SAM 2 upsamples its masks by a factor of four (bilinearly) before the loss. Here the loss itself upsamples them, in
forward and again in backward: all maps of a prediction step at once, or above `MOST_NUMBERS` a few objects at a time.

Shapes: O objects, M mask channels, H W pixels of the targets, h w of the logits: H W or smaller.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

MOST_NUMBERS = 2**27  # of a temporary tensor: half a gigabyte in float32


class MaskSums(NamedTuple):
    """Sums over the pixels of each map, each float [O M].

    Attributes:
        focal: mean focal loss (arXiv 1708.02002).
        overlap: sum of the probabilities inside the target.
        drawn: sum of the probabilities.
        hits: number of pixels with a logit above 0 inside the target; without a gradient.
        positives: number of pixels with a logit above 0; without a gradient.
    """

    focal: Tensor
    overlap: Tensor
    drawn: Tensor
    hits: Tensor
    positives: Tensor


def mask_sums(logits: Tensor, targets: Tensor, alpha: float, gamma: float) -> MaskSums:
    """The sums of each map of `logits` [O M h w], finite, for `targets` [O 1 H W], 0 or 1 in any type, differentiable
    in the logits."""
    objects = max(1, MOST_NUMBERS // (logits.shape[1] * targets.shape[2:].numel()))
    parts = [_MaskSums.apply(*part, alpha, gamma) for part in zip(logits.split(objects), targets.split(objects))]
    return MaskSums(*(column[0] if len(column) == 1 else torch.cat(column) for column in zip(*parts)))


class _MaskSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, alpha: float, gamma: float) -> tuple[Tensor, ...]:
        ctx.save_for_backward(logits, targets)
        ctx.alpha, ctx.gamma = alpha, gamma
        with torch.autocast(logits.device.type, enabled=False):
            x = _enlarged(logits, targets)
            g, inside = targets.to(x.dtype), targets.bool()
            above = x > 0
            hits, positives = (mask.sum((2, 3)).to(x.dtype) for mask in (above & inside, above))
            z = torch.addcmul(x, x, g, value=-2)
            q, area = z.sigmoid(), g.sum((2, 3))
            wrong, missed = q.sum((2, 3)), _inside(q, g)
            cost = _times_power(_softplus(z), q, gamma)
            focal = cost.sum((2, 3))
            if alpha >= 0:
                focal = (1 - alpha) * focal + (2 * alpha - 1) * _inside(cost, g)
        ctx.mark_non_differentiable(hits, positives)
        found = area - missed
        return focal / g.shape[2:].numel(), found, found + (wrong - missed), hits, positives

    @staticmethod
    @once_differentiable
    def backward(ctx, dfocal: Tensor, doverlap: Tensor, ddrawn: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets = ctx.saved_tensors
        with torch.autocast(logits.device.type, enabled=False):
            x = _enlarged(logits, targets)
            g = targets.to(x.dtype)
            z = torch.addcmul(x, x, g, value=-2)
            q = z.sigmoid()
            dfocal = dfocal / g.shape[2:].numel()
            if ctx.alpha >= 0:  # (1 - 2 g) w dfocal
                away = torch.addcmul(_each((1 - ctx.alpha) * dfocal), _each(dfocal), g, value=-1)
            else:
                away = torch.addcmul(_each(dfocal), _each(dfocal), g, value=-2)
            slope = _times_power(torch.addcmul(q, _softplus(z), 1 - q, value=ctx.gamma), q, ctx.gamma).mul_(away)
            dp = torch.addcmul(_each(ddrawn), _each(doverlap), g)
            slope.add_(torch.ops.aten.sigmoid_backward(dp, q))  # dp q (1 - q)
            return _reduced(slope, logits.shape[2:]).to(logits.dtype), None, None, None


def _each(values: Tensor) -> Tensor:
    """Values [O M] for the pixels of maps [O M H W]."""
    return values[..., None, None]


def _enlarged(logits: Tensor, targets: Tensor) -> Tensor:
    """Maps [O M h w] at the size of the targets, upsampled as in SAM 2, in float32 or wider."""
    x, size = logits.to(torch.promote_types(logits.dtype, torch.float32)), targets.shape[2:]
    return x if x.shape[2:] == size else F.interpolate(x, size, mode="bilinear", align_corners=False)


def _reduced(dy: Tensor, size: torch.Size) -> Tensor:
    """The gradient at the small maps, of `size`, from that at the large ones [O M H W].

    Two products with the interpolation weights of each side: on a GPU they are deterministic, torch's own gradient of
    `interpolate` is not. Where TF32 is allowed, they are in TF32 like other products.
    """
    if dy.shape[2:] == size:
        return dy
    down, across = (_weights(small, large, dy) for small, large in zip(size, dy.shape[2:]))
    return down @ dy @ across.t()


def _weights(small: int, large: int, like: Tensor) -> Tensor:
    """The interpolation weight of each of `small` pixels in each of `large` ones, (small, large)."""
    unit = torch.eye(small, dtype=like.dtype, device=like.device)
    return F.interpolate(unit[None], large, mode="linear", align_corners=False)[0]


def _softplus(z: Tensor) -> Tensor:
    """log(1 + e^z); above 40 it is z in double precision too."""
    return F.softplus(z, threshold=40)


def _inside(x: Tensor, g: Tensor) -> Tensor:
    """The sums [O M] of x [O M H W] where g [O 1 H W] is 1."""
    return (x * g).sum((2, 3))


def _times_power(x: Tensor, q: Tensor, gamma: float) -> Tensor:
    """x q^gamma, computed in place in x."""
    return x.mul_(q).mul_(q) if gamma == 2 else x.mul_(q**gamma)
