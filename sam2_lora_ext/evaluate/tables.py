"""From single objects to tables: means with 95 % intervals by image, classes, sizes, and paired differences.

Legend: O objects.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from sam2_lora_ext.bootstrap import bootstrap_interval
from sam2_lora_ext.data.ids import class_of
from sam2_lora_ext.errors import UserError
from sam2_lora_ext.evaluate.presence import presence_table
from sam2_lora_ext.evaluate.run import ModelResult, ObjectResult, Protocol
from sam2_lora_ext.metrics import dice, iou

SIZES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, None)}  # COCO's, in pixels of the strip
GOALS = (0.80, 0.90)
AUTOMATIC_IOU = 0.5

Interval = dict[str, float | int]


def columns(objects: Sequence[ObjectResult], protocol: Protocol) -> dict[str, np.ndarray]:
    """Every metric as float64 [O].

    `iou_*`, `dice_*` and `boundary_*` by prompt; `clicks_to_80` is the number of clicks to an IoU of 0.80, and
    `max_clicks` where it is not reached (`missed_80` is 1 there); `automatic_recall` is 1 where an automatic mask has an
    IoU of at least 0.5, `automatic_iou` that of the best.
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
    """`{metric: {mean, low, high, objects}}` of all objects, or of those in `keep` (bool [O]); empty for none."""
    keep = np.ones(len(images), dtype=bool) if keep is None else keep
    groups = [image for image, kept in zip(images, keep, strict=True) if kept]
    return {name: _interval(values[keep], groups) for name, values in table.items()} if groups else {}


def summarize(result: ModelResult, protocol: Protocol, class_names: Mapping[int, str]) -> dict[str, Any]:
    """The tables of one model: `metrics`, `classes`, `sizes`, `presence`, `automatic_masks_per_image`, `speed`."""
    table = columns(result.objects, protocol)
    images = [row.image for row in result.objects]
    classes = np.array([class_of(row.object_id) for row in result.objects])
    areas = np.array([row.by_clicks[0][2] for row in result.objects])
    by_size = {name: (areas >= low) & (areas < (high or np.inf)) for name, (low, high) in SIZES.items()}
    return {
        "metrics": means(table, images),
        "classes": {
            name: means(table, images, classes == number)
            for number, name in sorted(class_names.items())
            if (classes == number).any()
        },
        "sizes": {name: means(table, images, keep) for name, keep in by_size.items() if keep.any()},
        "presence": presence_table(
            [row.score for row in result.objects],
            images,
            [row.score for row in result.clean],
            [row.image for row in result.clean],
        ),
        "automatic_masks_per_image": float(np.mean(result.automatic_counts)) if result.automatic_counts else None,
        "speed": {
            "encode_ms": _median_ms(result.image_seconds),
            "click_ms": _median_ms(result.click_seconds),
            "images": len(result.image_seconds),
        },
    }


def differences(first: ModelResult, other: ModelResult, protocol: Protocol) -> dict[str, Interval]:
    """Mean of `other - first` object by object, with the interval of that difference.

    Raises:
        UserError: they were not asked about the same objects.
    """
    if [(row.item, row.object_id) for row in first.objects] != [(row.item, row.object_id) for row in other.objects]:
        raise UserError("the models were not asked about the same objects: evaluate them together with --compare")
    before, after = columns(first.objects, protocol), columns(other.objects, protocol)
    return means({name: after[name] - before[name] for name in before}, [row.image for row in first.objects])


def text_table(
    columns: Sequence[tuple[str, Mapping[str, Interval]]], metrics: Mapping[str, str], signed: bool = False
) -> str:
    """A Markdown table: a column for each name, a row for each metric (key -> title); `*` marks a difference from 0."""
    lines = [["", *[name for name, _ in columns]], ["---"] * (len(columns) + 1)]
    lines += [
        [title, *[cell(values.get(metric), signed) for _, values in columns]] for metric, title in metrics.items()
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def cell(value: Interval | None, signed: bool = False) -> str:
    """`0.512 [0.490, 0.530]`; a signed one has a `*` where its interval leaves out 0."""
    if value is None:
        return "-"
    sign = "+" if signed else ""
    if value["objects"] == 1:  # one object has no interval
        return f"{value['mean']:{sign}.3f}"
    mark = "*" if signed and (value["low"] > 0 or value["high"] < 0) else ""
    return f"{value['mean']:{sign}.3f}{mark} [{value['low']:{sign}.3f}, {value['high']:{sign}.3f}]"


def headline(protocol: Protocol) -> dict[str, str]:
    """The metrics of the main table and their titles."""
    titles = {
        f"iou_{prompt}": f"IoU {prompt.replace('clicks', ' clicks').replace('1click', '1 click').replace('box_', 'box ±')}"
        for prompt in protocol.prompts
    }
    titles = {key: f"{title} %" if "±" in title else title for key, title in titles.items()}
    first = protocol.prompts[0]
    titles |= {
        f"dice_{first}": f"Dice {first.replace('1click', '1 click')}",
        f"boundary_{first}": "boundary F 1 click" if first == "1click" else f"boundary F {first}",
        "boundary_box": "boundary F box",
    }
    titles |= {f"clicks_to_{round(100 * goal)}": f"clicks to {goal:.2f}" for goal in GOALS}
    titles |= {f"missed_{round(100 * goal)}": f"{goal:.2f} missed" for goal in GOALS}
    return titles | ({"automatic_recall": "automatic recall"} if protocol.automatic else {})


def _interval(values: np.ndarray, groups: Sequence[str]) -> Interval:
    low, high = bootstrap_interval(values, groups)
    return {"mean": float(np.mean(values)), "low": low, "high": high, "objects": len(values)}


def _median_ms(seconds: Sequence[float]) -> float | None:
    return round(1000 * float(np.median(seconds)), 2) if seconds else None
