"""Metrics of an inspection: its masks and scores compared with the truth of whole strips.

    Dice(strip, class) = 2 |P and T| / (|P| + |T|), 1 where both are empty (Kaggle's; `dice_present` leaves those out)
    pooled Dice, IoU   = 2 TP / (2 TP + FP + FN), TP / (TP + FP + FN) over all pixels of all strips of a class
    margin             = max_c (score_c - threshold_c), the confidence that a strip has a defect

Every mean or share has a 95 % bootstrap interval over strips. Legend: N strips, C classes, H W pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sam2_lora_ext.adapters.decision import Decision
from sam2_lora_ext.evaluate.bootstrap import bootstrap_sums
from sam2_lora_ext.evaluate.metrics import dice, mask_counts
from sam2_lora_ext.evaluate.presence import Scores, auroc, presence_table
from sam2_lora_ext.inspection.matching import SIZES, TrueObject, true_objects
from sam2_lora_ext.inspection.pixel_ap import PixelRanks
from sam2_lora_ext.inspection.segmenter import Inspection

Value = dict[str, float]
IOUS = (0.1, 0.5)


@dataclass
class InspectionTally:
    """Collects inspected strips; `summary` computes the metrics.

    Args:
        class_names: in the order of the classes.
        decision: the one in use, for its thresholds.
    """

    class_names: Sequence[str]
    decision: Decision
    names: list[str] = field(default_factory=list)
    counts: list[Tensor] = field(default_factory=list)  # int64 [C, 3]: intersection, prediction, truth
    scores: list[Tensor] = field(default_factory=list)  # [C]
    objects: list[list[TrueObject]] = field(default_factory=list)
    drawn: list[int] = field(default_factory=list)  # predicted defects, true or false
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ranks = [PixelRanks() for _ in self.class_names]

    def add(self, name: str, found: Inspection, truth: Tensor, seconds: float) -> None:
        """Adds a strip: the inspection, the truth bool [C, H, W], and the seconds that it took."""
        self.names.append(name)
        self.counts.append(mask_counts(found.masks, truth))
        self.scores.append(found.scores)
        self.objects.append(true_objects(found.masks.numpy(), truth.numpy()))
        self.drawn.append(len(found.objects))
        self.seconds.append(seconds)
        for place, ranks in enumerate(self.ranks):
            sure = found.logits[place].sigmoid() * found.scores[place].sigmoid()
            ranks.add(sure.numpy(), truth[place].numpy())

    def summary(self) -> dict[str, Any]:
        """All metrics as JSON values; None where a mean would be over nothing."""
        counts = torch.stack(self.counts).numpy()  # N C 3
        there, said = counts[..., 2] > 0, counts[..., 1] > 0  # N C
        quality = dice(torch.from_numpy(counts)).numpy()
        sick = there.any(1)
        margins = (torch.stack(self.scores) - torch.tensor(self.decision.threshold)).amax(1).tolist()
        parted = Scores(*_by(margins, self.names, sick), *_by(margins, self.names, ~sick))
        presence = presence_table(parted) or {}
        pooled = counts.reshape(len(counts), -1).astype(np.float64)
        return {
            "strips": len(counts),
            "clean_strips": int((~sick).sum()),
            "kaggle_dice": mean_of(quality, np.ones_like(there)),
            "kaggle_dice_empty": float((~there).mean()),
            "dice_present": mean_of(quality, there),
            "macro_dice": _statistic(pooled, lambda sums: _macro(sums, True)),
            "macro_iou": _statistic(pooled, lambda sums: _macro(sums, False)),
            "recall": mean_of(said, there),
            "precision": mean_of(there, said),
            "false_alarms": mean_of(said.any(1)[:, None], ~sick[:, None]),
            "image_auroc": _named(presence, "auroc"),
            "false_alarms_at_recall_95": _named(presence, "false_alarms"),
            "false_objects_per_clean_strip": mean_of(np.array(self.drawn)[:, None], ~sick[:, None]),
            "objects": self._objects(),
            "classes": {name: self._class(place, counts, quality) for place, name in enumerate(self.class_names)},
            "ms_per_strip": 1000 * float(np.median(self.seconds)),
            "decision": self.decision.as_dict(),
        }

    def _class(self, place: int, counts: np.ndarray, quality: np.ndarray) -> dict[str, Any]:
        own = counts[:, place].astype(np.float64)  # N 3
        there, said = own[:, 2] > 0, own[:, 1] > 0
        scores = torch.stack(self.scores)[:, place].numpy()
        objects = [row for rows in self.objects for row in rows if row.place == place]
        return {
            "strips": int(there.sum()),
            "kaggle_dice": mean_of(quality[:, place, None], np.ones_like(there)[:, None]),
            "dice_present": mean_of(quality[:, place, None], there[:, None]),
            "dice": _statistic(own, lambda sums: _macro(sums, True)),
            "iou": _statistic(own, lambda sums: _macro(sums, False)),
            "pixel_ap": self.ranks[place].average_precision(),
            "image_auroc": auroc(scores[there], scores[~there]),
            "recall": mean_of(said[:, None], there[:, None]),
            "precision": mean_of(there[:, None], said[:, None]),
            "found": int((there & said).sum()),
            "missed": int((there & ~said).sum()),
            "false": int((~there & said).sum()),
            "objects": len(objects),
            "objects_found": sum(row.iou >= IOUS[0] for row in objects),
        }

    def _objects(self) -> dict[str, Any]:
        """Recall of the true objects at each IoU threshold, by size."""
        result = {}
        for name, (low, high) in {"all": (0, None), **SIZES}.items():
            taken = [[row.iou for row in rows if low <= row.area < (high or np.inf)] for rows in self.objects]
            total = np.array([len(row) for row in taken], dtype=np.float64)
            row: dict[str, Any] = {"objects": int(total.sum())}
            for bound in IOUS:
                found = np.array([sum(iou >= bound for iou in values) for values in taken], dtype=np.float64)
                row[f"recall_iou_{round(100 * bound)}"] = _statistic(np.stack([found, total], 1), _share)
            result[name] = row
        return result


def mean_of(values: np.ndarray, keep: np.ndarray) -> Value | None:
    """The mean of values [N, C] where `keep` (bool [N, C]), with its interval over strips; None if nothing is kept."""
    sums = np.stack([np.where(keep, values, 0).sum(1), keep.sum(1)], 1).astype(np.float64)
    return _statistic(sums, _share)


def _statistic(table: np.ndarray, statistic: Any) -> Value | None:
    value = float(statistic(table.sum(0, keepdims=True))[0])
    if not np.isfinite(value):
        return None
    low, high = bootstrap_sums(table, statistic)
    return {"mean": value, "low": low, "high": high}


def _share(sums: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[:, 0] / sums[:, 1]


def _macro(sums: np.ndarray, is_dice: bool) -> np.ndarray:
    """The mean over classes of pooled Dice or IoU, from sums [draws, C * 3], without classes that occur nowhere."""
    both, drawn, truth = np.moveaxis(sums.reshape(len(sums), -1, 3), -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        values = 2 * both / (drawn + truth) if is_dice else both / (drawn + truth - both)
    filled = np.isfinite(values)
    total = np.where(filled, values, 0).sum(1)
    return np.where(filled.any(1), total / np.maximum(filled.sum(1), 1), np.nan)


def _by(margins: Sequence[float], names: Sequence[str], keep: np.ndarray) -> tuple[list[float], list[str]]:
    taken = np.flatnonzero(keep)
    return [margins[place] for place in taken], [names[place] for place in taken]


def _named(presence: dict[str, Any], key: str) -> Value | None:
    if key not in presence:
        return None
    low, high = presence[f"{key}_ci95"]
    return {"mean": presence[key], "low": low, "high": high}
