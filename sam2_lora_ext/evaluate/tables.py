"""Computes tables from results per object: means with 95 % intervals by image, classes, sizes, paired differences.

Legend: O objects.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from sam2_lora_ext.data.ids import class_of
from sam2_lora_ext.evaluate.bootstrap import bootstrap_interval
from sam2_lora_ext.evaluate.evaluation import ModelResult, ObjectResult
from sam2_lora_ext.evaluate.metrics import dice, iou
from sam2_lora_ext.evaluate.presence import Scores, presence_difference, presence_table
from sam2_lora_ext.evaluate.protocol import Protocol
from sam2_lora_ext.utils.errors import UserError

SIZES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, None)}  # COCO's, in pixels of the strip
GOALS = (0.80, 0.90)
AUTOMATIC_IOU = 0.5

Interval = dict[str, float | int]


def columns(objects: Sequence[ObjectResult], protocol: Protocol) -> dict[str, np.ndarray]:
    """Every metric as float64 [O].

    `iou_*`, `dice_*` and `boundary_*` by prompt; `clicks_to_80` is the number of clicks to an IoU of 0.80, or
    `max_clicks` if it is not reached (then `missed_80` is 1); `automatic_iou` is the IoU of the best automatic mask,
    and `automatic_recall` is 1 if that is at least 0.5.
    """
    table: dict[str, np.ndarray] = {}
    for prompt in protocol.prompts:
        areas = torch.tensor([row.areas[prompt] for row in objects]).reshape(-1, 3)
        table[f"iou_{prompt}"], table[f"dice_{prompt}"] = iou(areas).numpy(), dice(areas).numpy()
        table[f"boundary_{prompt}"] = np.array([row.boundary[prompt] for row in objects], dtype=np.float64)
    steps = iou(torch.tensor([row.by_clicks for row in objects]).reshape(len(objects), -1, 3)).numpy()  # O clicks
    for goal in GOALS:
        reached = steps >= goal
        missed = ~reached.any(1)
        table[f"clicks_to_{round(100 * goal)}"] = np.where(missed, steps.shape[1], reached.argmax(1) + 1.0)
        table[f"missed_{round(100 * goal)}"] = missed.astype(np.float64)
    if protocol.automatic:
        table["automatic_iou"] = np.array([row.automatic for row in objects], dtype=np.float64)
        table["automatic_recall"] = (table["automatic_iou"] >= AUTOMATIC_IOU).astype(np.float64)
    return table


def means(
    table: Mapping[str, np.ndarray], images: Sequence[str], keep: np.ndarray | None = None
) -> dict[str, Interval]:
    """`{metric: {mean, low, high, objects}}` of all objects, or of those in `keep` (bool [O]); else empty."""
    keep = np.ones(len(images), dtype=bool) if keep is None else keep
    groups = [image for image, kept in zip(images, keep, strict=True) if kept]
    return {name: interval(values[keep], groups) for name, values in table.items()} if groups else {}


def summarize(result: ModelResult, protocol: Protocol, class_names: Mapping[int, str]) -> dict[str, Any]:
    """The tables of one model: `metrics`, `classes`, `sizes`, `presence`, `automatic_masks_per_image`, `speed`."""
    table = columns(result.objects, protocol)
    images = [row.image for row in result.objects]
    classes = np.array([class_of(row.object_id) for row in result.objects])
    areas = np.array([row.by_clicks[0][2] for row in result.objects])
    by_class = {name: classes == number for number, name in sorted(class_names.items())}
    by_size = {name: (areas >= low) & (areas < (high or np.inf)) for name, (low, high) in SIZES.items()}
    return {
        "metrics": means(table, images),
        "classes": {name: means(table, images, keep) for name, keep in by_class.items() if keep.any()},
        "sizes": {name: means(table, images, keep) for name, keep in by_size.items() if keep.any()},
        "presence": presence_table(scores_of(result)),
        "automatic_masks_per_image": float(np.mean(result.automatic_counts)) if result.automatic_counts else None,
        "speed": {
            "encode_ms": _median_ms(result.image_seconds),
            "click_ms": _median_ms(result.click_seconds),
            "box_ms": _median_ms(result.box_seconds),
            "automatic_ms": _median_ms(result.automatic_seconds),
            "images": len(result.image_seconds),
        },
    }


def scores_of(result: ModelResult) -> Scores:
    """The object scores of a model's first clicks."""
    return Scores(
        [row.score for row in result.objects],
        [row.image for row in result.objects],
        [row.score for row in result.clean],
        [row.image for row in result.clean],
    )


def differences(first: ModelResult, other: ModelResult, protocol: Protocol) -> dict[str, Interval]:
    """Means of the paired differences `other - first` with their intervals; also for AUROC and false alarms.

    Raises:
        UserError: the models were not evaluated on the same objects.
    """
    if [(row.item, row.object_id) for row in first.objects] != [(row.item, row.object_id) for row in other.objects]:
        raise UserError("the models were not evaluated on the same objects: evaluate them together with --compare")
    before, after = columns(first.objects, protocol), columns(other.objects, protocol)
    paired = means({name: after[name] - before[name] for name in before}, [row.image for row in first.objects])
    return paired | presence_difference(scores_of(first), scores_of(other))


def interval(values: np.ndarray, groups: Sequence[str]) -> Interval:
    """The mean of values [O] and its 95 % interval by group."""
    low, high = bootstrap_interval(values, groups)
    counts = {"objects": len(values), "images": len(set(groups))}
    return {"mean": float(np.mean(values)), "low": low, "high": high, **counts}


def _median_ms(seconds: Sequence[float]) -> float | None:
    return round(1000 * float(np.median(seconds)), 2) if seconds else None
