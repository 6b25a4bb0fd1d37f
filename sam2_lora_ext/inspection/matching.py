"""Which true defects were found, by the best matching mask component of their class.

Legend: C classes, H W pixels of a strip. Areas are in pixels of the strip.
"""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

SIZES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, None)}  # COCO's
CONNECTED = np.ones((3, 3))  # 8-connected


@dataclass(frozen=True)
class TrueObject:
    """A true defect: the position of its class, its area, and the IoU of the best mask component, or 0 without one."""

    place: int
    area: int
    iou: float


def true_objects(masks: np.ndarray, truth: np.ndarray) -> list[TrueObject]:
    """The components of truth bool [C, H, W], compared with those of masks bool [C, H, W] of the same class."""
    found = []
    for place, (mask, wanted) in enumerate(zip(masks, truth, strict=True)):
        if not wanted.any():
            continue
        (own, count), (other, others) = (ndimage.label(part, CONNECTED) for part in (wanted, mask))
        both = np.bincount(own.ravel() * (others + 1) + other.ravel(), minlength=(count + 1) * (others + 1))
        both = both.reshape(count + 1, others + 1)  # pixels shared by a true and a found component; 0 is background
        areas, drawn = both.sum(1), both.sum(0)
        unions = areas[1:, None] + drawn[None, 1:] - both[1:, 1:]
        best = (both[1:, 1:] / unions).max(1) if others else np.zeros(count)
        found += [TrueObject(place, int(area), float(iou)) for area, iou in zip(areas[1:], best, strict=True)]
    return found
