"""Boundary F of masks, which measures the agreement of outlines within a few pixels (Perazzi et al., CVPR 2016).

Legend: H W pixels.
"""

import cv2
import numpy as np


def outline(mask: np.ndarray) -> np.ndarray:
    """bool [H, W]: pixels of a mask bool [H, W] that differ from the right, lower or lower right neighbour.

    As in DAVIS, the edge of the image is not part of the outline.
    """
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (mask != padded[:-1, 1:]) | (mask != padded[1:, :-1]) | (mask != padded[1:, 1:])


def disk(radius: int) -> np.ndarray:
    """uint8 [2 r + 1, 2 r + 1]: 1 where the distance from the middle is at most `radius`."""
    offsets = np.arange(-radius, radius + 1)
    return (offsets[:, None] ** 2 + offsets[None] ** 2 <= radius**2).astype(np.uint8)


def boundary_f(prediction: np.ndarray, target: np.ndarray, tolerance: int = 2) -> float:
    """`F = 2 P R / (P + R)` of two outlines.

    P is the share of the prediction's outline within `tolerance` pixels of the target's, R the share of the target's
    within `tolerance` of the prediction's. An empty mask, or one that fills the image, has no outline. F is 1 if both
    masks have no outline and 0 if only one has none.

    Args:
        prediction: bool [H, W].
        target: bool [H, W].
        tolerance: in pixels.
    """
    found, wanted = outline(prediction), outline(target)
    kernel = disk(tolerance)
    near_wanted, near_found = (cv2.dilate(edge.astype(np.uint8), kernel) for edge in (wanted, found))
    precision = near_wanted[found].mean() if found.any() else 1.0
    recall = near_found[wanted].mean() if wanted.any() else 1.0
    if not found.any() and wanted.any():
        recall = 0.0
    if found.any() and not wanted.any():
        precision = 0.0
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0
