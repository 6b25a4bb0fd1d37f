"""Computes pixel counts of masks, IoU, Dice and means by pure functions on torch tensors.

Shapes: `...` any leading sizes, H W pixels, N objects. Counts are integers, so they add up exactly on any device.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sam2_lora_ext.data.ids import CLEAN


def mask_counts(prediction: Tensor, target: Tensor) -> Tensor:
    """Areas of the intersection, of the prediction and of the target, in pixels.

    Args:
        prediction: bool [... H W].
        target: bool [... H W]; its leading sizes broadcast against those of the prediction.

    Returns:
        int64 [... 3].
    """
    areas = [mask.sum((-2, -1)) for mask in (prediction & target, prediction, target)]
    return torch.stack(torch.broadcast_tensors(*areas), dim=-1)


def iou(counts: Tensor) -> Tensor:
    """`I / (P + T - I)` in float64 [...] of counts [... 3]; 1.0 where both masks are empty, 0.0 where only one is."""
    intersection, predicted, target = counts.unbind(-1)
    return _ratio(intersection, predicted + target - intersection)


def dice(counts: Tensor) -> Tensor:
    """`2 I / (P + T)` in float64 [...] of counts [... 3]; 1.0 where both masks are empty, 0.0 where only one is."""
    intersection, predicted, target = counts.unbind(-1)
    return _ratio(2 * intersection, predicted + target)


def exact_mean(values: Tensor) -> float | None:
    """The mean of [N] from a correctly rounded sum, the same in any order; `None` when there is no value."""
    return math.fsum(values.tolist()) / len(values) if len(values) else None


def class_means(values: Tensor, class_ids: Tensor, classes: Sequence[int]) -> dict[int, float]:
    """The mean of values [N] over the objects of each class (class_ids [N]); an absent class is left out."""
    means = {class_id: exact_mean(values[class_ids == class_id]) for class_id in classes}
    return {class_id: mean for class_id, mean in means.items() if mean is not None}


def score_accuracy(score_logits: Tensor, class_ids: Tensor) -> tuple[float | None, float | None]:
    """The accuracy of the object score on clean objects (right if logit <= 0) and on defects (right if logit > 0).

    Args:
        score_logits: [N].
        class_ids: [N], 0 for a clean object.

    Returns:
        The shares of right scores on clean objects and on defects; `None` where there are none.
    """
    clean, found = class_ids == CLEAN, score_logits > 0
    return exact_mean((~found[clean]).double()), exact_mean(found[~clean].double())


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    ratio = numerator.double() / denominator.clamp(min=1).double()
    return torch.where(denominator == 0, 1.0, ratio)
