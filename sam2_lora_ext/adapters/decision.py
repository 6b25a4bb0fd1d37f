"""The decision from class logits and scores to masks: present classes and their pixels (`class_prompts.decide`).

    z_c = scale_c * logit_c + bias_c             calibrated logits, comparable between classes
    class c is present where score_c >= threshold_c
    pixel p is of class c where z_c(p) > 0, c is present and, if classes exclude each other, z_c(p) is the largest
    a component (8-connected) of c is kept with at least min_area_c pixels, or weak_area_c where score_c < weak_score_c

Legend: C classes, by their position · H W pixels. Areas are in pixels of the image, scores and logits have no unit.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from sam2_lora_ext.utils.errors import UserError

MOST = 1e30  # upper bound of the absolute value of every number in a decision
ABSENT = -1024.0  # SAM 2's own logit where an object is absent


@dataclass(frozen=True)
class Decision:
    """The numbers of the formulas above, one for each class.

    Args:
        threshold: minimum presence score of a present class.
        scale: factor of a class's logits, above 0.
        bias: added to a class's logits.
        min_area: minimum area of a component.
        weak_area: minimum area of a component where the score is weak.
        weak_score: scores below it are weak.
        exclusive: a pixel has at most one class.
        fitted: whether these numbers were fitted to validation data; otherwise they are the default.
    """

    threshold: tuple[float, ...]
    scale: tuple[float, ...]
    bias: tuple[float, ...]
    min_area: tuple[int, ...]
    weak_area: tuple[int, ...]
    weak_score: tuple[float, ...]
    exclusive: bool = True
    fitted: bool = False

    def __post_init__(self) -> None:
        rows = {field.name: getattr(self, field.name) for field in fields(self)}
        flags = {name: rows.pop(name) for name in ("exclusive", "fitted")}
        for name, row in rows.items():
            if not isinstance(row, tuple) or len(row) != len(self.threshold) or not all(map(_is_number, row)):
                raise UserError(f"{name} of a decision must have one finite number per class, got {str(row)[:100]}")
        if any(not isinstance(flag, bool) for flag in flags.values()):
            raise UserError(f"exclusive and fitted of a decision must be true or false, got {flags}")
        if min(self.scale, default=1) <= 0 or min(*self.min_area, *self.weak_area, 0, 0) < 0:
            raise UserError("a decision needs scales above 0 and areas of at least 0 pixels")

    @classmethod
    def default(cls, classes: int, exclusive: bool = True) -> "Decision":
        """The decision before fitting: scores and logits above 0 as in SAM 2, and no minimum area."""
        zeros, ones = (0.0,) * classes, (1.0,) * classes
        return cls(zeros, ones, zeros, (0,) * classes, (0,) * classes, zeros, exclusive)

    def __len__(self) -> int:
        return len(self.threshold)

    def as_dict(self) -> dict[str, Any]:
        """The decision as JSON values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Decision":
        """The inverse of `as_dict`; raises `UserError` for anything else."""
        names = {field.name for field in fields(cls)}
        if not isinstance(values, Mapping) or set(values) != names:
            raise UserError(f"a decision must have {', '.join(sorted(names))}, got {str(values)[:200]}")
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})

    def note(self) -> str | None:
        """A warning before the decision is fitted."""
        if self.fitted:
            return None
        return "the thresholds are not fitted, so classes with scores above 0 are present: run tools/fit_decision.py"

    def smallest(self, scores: Tensor) -> list[int]:
        """The minimum area of a component of each class, given the scores [C]."""
        rows = zip(scores.tolist(), self.weak_score, self.weak_area, self.min_area, strict=True)
        return [weak if score < bound else usual for score, bound, weak, usual in rows]


def calibrated(logits: Tensor, decision: Decision) -> Tensor:
    """Calibrated logits z [..., C, H, W] from logits [..., C, H, W]."""
    scale, bias = (torch.tensor(row, device=logits.device)[:, None, None] for row in (decision.scale, decision.bias))
    return logits.float() * scale + bias


def claim(z: Tensor, present: Tensor, exclusive: bool) -> Tensor:
    """The pixels bool [..., C, H, W] of each class, before small components are removed.

    Args:
        z: calibrated logits [..., C, H, W].
        present: bool [..., C].
        exclusive: a pixel belongs only to the class with the largest z; the first class wins ties.
    """
    z = z.masked_fill(~present.to(z.device)[..., None, None], ABSENT)
    masks = z > 0
    if exclusive and z.shape[-3] > 1:
        place = torch.arange(z.shape[-3], device=z.device)[:, None, None]
        masks = masks & (z.argmax(-3, keepdim=True) == place)
    return masks


def _is_number(value: Any) -> bool:
    """Whether a value is a number that fits into float32 and int64 tensors; JSON allows larger ones."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < MOST
