"""Fits the threshold and the minimum areas of one class to maximise mean Dice, from the components of its masks.

    Dice(strip) = 2 sum_k [a_k >= A] i_k / (sum_k [a_k >= A] a_k + T), if the class is predicted present (score >= t)

with the areas a_k and overlaps i_k of the components and the area T of the truth; 1 if the mask is empty and T = 0.
"""

from dataclasses import dataclass, field

import numpy as np

from sam2_lora_ext.data.components import find_components
from sam2_lora_ext.data.rle import encode_mask

STEPS = 12  # candidate minimum areas: quantiles of the component areas
WEAK_SCORES = 6  # candidate bounds of a weak score
FACTORS = (1.5, 2.0, 4.0, 1e9)  # candidate ratios of the minimum area for weak scores to the usual one


@dataclass
class Table:
    """Scores, component areas and overlaps of one class on all strips."""

    scores: list[float] = field(default_factory=list)
    truths: list[int] = field(default_factory=list)  # area
    areas: list[np.ndarray] = field(default_factory=list)  # of the components
    overlaps: list[np.ndarray] = field(default_factory=list)  # of each with the truth

    def add(self, score: float, truth: int, areas: np.ndarray, overlaps: np.ndarray) -> None:
        """Adds a strip."""
        self.scores.append(score)
        self.truths.append(truth)
        self.areas.append(areas)
        self.overlaps.append(overlaps)

    def dice(self, smallest: np.ndarray) -> np.ndarray:
        """Dice of each strip if the class is predicted present, given each strip's minimum area."""
        values = []
        for truth, areas, overlaps, least in zip(self.truths, self.areas, self.overlaps, smallest, strict=True):
            kept = areas >= least
            total = int(areas[kept].sum()) + truth
            values.append(2 * int(overlaps[kept].sum()) / total if total else 1.0)
        return np.array(values)


def components_of(mask: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The areas of the components of a mask bool [H, W], and of their overlaps with the truth bool [H, W]."""
    runs = encode_mask(mask)
    if not len(runs):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    found = find_components(runs, np.array([0, len(runs)]), np.array([mask.shape[0]]), np.array([mask.shape[1]]))
    sums = np.append(0, np.cumsum(truth.T.ravel(), dtype=np.int64))
    inside = sums[found.runs.sum(1)] - sums[found.runs[:, 0]]
    return found.areas, np.add.reduceat(inside, found.run_offsets[:-1])


def best_areas(table: Table, usual: float = 0.0) -> tuple[float, dict[str, float | int]]:
    """The largest mean Dice, and the `threshold`, `min_area`, `weak_area` and `weak_score` that give it.

    Values that do not improve Dice keep their defaults: the threshold `usual`, and areas of 0.
    """
    scores, empty = np.array(table.scores), np.array(table.truths) == 0
    count = len(scores)
    every = np.concatenate([*table.areas, np.zeros(0, np.int64)])
    tried = np.unique(np.quantile(every, np.linspace(0, 0.95, STEPS)).astype(int) + 1) if len(every) else []
    best, found = -1.0, {}
    for least in (0, *map(int, tried)):
        drawn = table.dice(np.full(count, least))
        value, threshold = best_threshold(scores, drawn, empty, usual)
        if value > best + 1e-9:
            best, found = value, {"threshold": threshold, "min_area": least, "weak_area": least, "weak_score": 0.0}
    least, threshold = int(found["min_area"]), float(found["threshold"])
    said = scores >= threshold
    borders = np.unique(np.quantile(scores[said], np.linspace(0.1, 0.9, WEAK_SCORES))) if said.any() else []
    for border in map(float, borders):
        for factor in FACTORS:
            weak = int(min(max(least, 50) * factor, 1 << 30))
            drawn = table.dice(np.where(scores < border, weak, least))
            value = float(np.where(said, drawn, empty).mean())
            if value > best + 1 / count:  # at least one whole strip better; smaller gains may be chance
                best, found = value, {**found, "weak_area": weak, "weak_score": border}
    return best, found


def best_threshold(scores: np.ndarray, drawn: np.ndarray, empty: np.ndarray, usual: float) -> tuple[float, float]:
    """The largest mean Dice, and the threshold that gives it.

    Args:
        scores: of each strip.
        drawn: Dice of each strip if the class is predicted present.
        empty: bool, whether the class is absent in truth, which is Dice if it is predicted absent.
        usual: is returned if no other threshold is better.
    """
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    gains = np.append(0.0, np.cumsum((drawn - empty)[order]))  # by the number of strips predicted to have the class
    cuts = np.flatnonzero(np.append(np.append(True, np.diff(ordered) != 0), True))  # never between equal scores
    base, count = float(empty.sum()), len(scores)
    usual_gain = float(gains[int((scores >= usual).sum())])
    best = cuts[int(np.argmax(gains[cuts]))]
    if usual_gain >= gains[best] - 1e-9:
        return (base + usual_gain) / count, usual
    if best == 0:
        threshold = float(ordered[0]) + 1.0
    elif best == count:
        threshold = float(ordered[-1]) - 1.0
    else:
        threshold = float(ordered[best - 1] + ordered[best]) / 2
    return (base + float(gains[best])) / count, threshold
