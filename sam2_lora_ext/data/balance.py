"""Class balance by repeat factors, for SAM 2's `RepeatFactorWrapper`."""

from typing import Any

import torch
from training.dataset.vos_dataset import VOSDataset

from sam2_lora_ext.data.dataset import SeverstalRawDataset
from sam2_lora_ext.utils.errors import UserError


class BalancedVOSDataset(VOSDataset):
    """`VOSDataset` whose `repeat_factors` show strips of rare classes more often.

    With f(c) the share of defective samples that have class c, a sample repeats r = max over its c of
    max(1, sqrt(t / f(c))) times (Gupta et al., LVIS, 2019). Clean samples repeat as often as defective ones do on
    average, so that their share does not change. Wrap it in `training.dataset.utils.RepeatFactorWrapper`.

    Args:
        video_dataset: the strips.
        class_threshold: t; classes rarer than that are repeated. None is natural sampling.
        multiplier: factor of all samples.
        **kwargs: as in `VOSDataset`.
    """

    def __init__(
        self,
        video_dataset: SeverstalRawDataset,
        class_threshold: float | None = 0.5,
        multiplier: float = 1,
        **kwargs: Any,
    ):
        if class_threshold is not None and not 0 < class_threshold <= 1:
            raise UserError(f"class_threshold is a share above 0 and at most 1, got {class_threshold}")
        super().__init__(video_dataset=video_dataset, multiplier=multiplier, **kwargs)
        if class_threshold is not None:
            self.repeat_factors *= repeat_factors(
                [video_dataset.classes_of(item) for item in range(len(video_dataset))], class_threshold
            )


def repeat_factors(classes: list[set[int]], threshold: float) -> torch.Tensor:
    """float32 [L]: the factor of each sample from the classes on it (an empty set for a clean one)."""
    defective = [present for present in classes if present]
    if not defective:
        return torch.ones(len(classes))
    shares = {c: sum(c in present for present in defective) / len(defective) for c in set().union(*defective)}
    factors = [
        max(max(1.0, (threshold / shares[c]) ** 0.5) for c in present) if present else 0.0 for present in classes
    ]
    mean = sum(factors) / len(defective)
    return torch.tensor([factor or mean for factor in factors], dtype=torch.float32)
