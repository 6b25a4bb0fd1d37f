"""COCO's masks as runs: polygons, compressed and plain RLE, with a check of `area` and `bbox`.

Boxes are half open, (x0, y0, x1, y1) in pixels.
"""

import math
from typing import Any

import numpy as np
from pycocotools import mask as mask_utils

from sam2_lora_ext.data.records import InvalidData
from sam2_lora_ext.data.rle import encode_mask, from_coco_counts, parse_coco_text

LONGEST = 4_000_000  # total outline of a mask's polygons in pixels: pycocotools takes 60 bytes a pixel, and crashes


def read_segmentation(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Runs of polygons (list of [x, y, x, y, ...]) or of an RLE (`counts` as list or compressed text).

    Raises:
        InvalidData: it is neither, has the wrong size, or contains no pixel.
    """
    try:
        if isinstance(segmentation, dict):
            counts, size = segmentation["counts"], [int(length) for length in segmentation["size"]]
            if size != [height, width]:
                raise InvalidData("RLE size", f"its RLE is for {size[1]}x{size[0]}, the image is {width}x{height}")
            counts = counts if isinstance(counts, list) else parse_coco_text(counts)
            if any(not isinstance(count, int) or count < 0 for count in counts) or sum(counts) != height * width:
                raise InvalidData("RLE out of range", f"its RLE counts must be at least 0 and sum to {height * width}")
            runs = from_coco_counts(counts)
        else:
            polygons = [np.asarray(polygon, dtype=float).ravel() for polygon in segmentation]
            if not polygons or any(
                len(polygon) < 6 or len(polygon) % 2 or not np.isfinite(polygon).all() for polygon in polygons
            ):
                raise InvalidData("polygon", "each of its polygons must be at least three finite x, y pairs")
            if not sum(map(_outline, polygons)) < LONGEST:
                raise InvalidData("polygon", f"its outlines are {LONGEST} pixels or longer; are they in pixels?")
            shapes = mask_utils.frPyObjects([polygon.tolist() for polygon in polygons], height, width)
            runs = encode_mask(mask_utils.decode(mask_utils.merge(shapes)))
    except InvalidData:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise InvalidData("segmentation", f"its segmentation is neither polygons nor RLE ({error!r})") from error
    if not len(runs):
        raise InvalidData("mask empty", f"its segmentation has no pixel inside the {width}x{height} image; remove it")
    return runs


def disagreement(entry: dict[str, Any], runs: np.ndarray, height: int) -> str | None:
    """Describes how an annotation's `area` or `bbox` differs from its pixels; None if neither does.

    For an RLE the area must be exact and the box within 1 px. A polygon's area is that of its outline, so it may differ
    by half the length of the outline, and its box by 2 px.
    """
    polygon = not isinstance(entry["segmentation"], dict)
    allowed = _half_way_around(entry["segmentation"]) + 2 if polygon else 0
    area, box = entry.get("area"), entry.get("bbox")
    pixels = int(runs[:, 1].sum())
    if area is not None and not (_is_number(area) and abs(area - pixels) <= allowed):
        return f"its area is {area!r}, but its mask has {pixels} pixels"
    if box in (None, []):
        return None
    given = [math.nan] * 4
    if isinstance(box, list) and len(box) == 4 and all(map(_is_number, box)):
        given = [box[0], box[1], box[0] + box[2], box[1] + box[3]]
    found = box_of(runs, height)
    if not all(abs(one - other) <= 1 + polygon for one, other in zip(given, found)):
        x0, y0, x1, y1 = found
        return f"its bbox is {box!r}, but that of its mask is {[x0, y0, x1 - x0, y1 - y0]}"
    return None


def box_of(runs: np.ndarray, height: int) -> tuple[int, int, int, int]:
    """The box around column-major runs, at least one."""
    first, last = runs[:, 0], runs[:, 0] + runs[:, 1] - 1
    whole = (first // height != last // height).any()  # the box of a run that continues in the next column has all rows
    y0, y1 = (0, height) if whole else (int((first % height).min()), int((last % height).max()) + 1)
    return int(first[0] // height), y0, int(last[-1] // height) + 1, y1


def _outline(polygon: np.ndarray) -> float:
    """The Chebyshev length of the closed path from the origin along a polygon [x, y, x, y, ...]."""
    corners = np.concatenate([[(0, 0)], polygon.reshape(-1, 2), [(0, 0)]])
    return float(np.abs(np.diff(corners, axis=0)).max(axis=1).sum())


def _half_way_around(polygons: list[list[float]]) -> float:
    """Half the length of the outlines of polygons, in pixels."""
    total = 0.0
    for polygon in polygons:
        corners = np.asarray(polygon, dtype=float).reshape(-1, 2)
        total += float(np.hypot(*(corners - np.roll(corners, 1, axis=0)).T).sum())
    return total / 2


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
