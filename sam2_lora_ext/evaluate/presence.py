"""Evaluates the object score as a detector of defects: AUROC, and false alarms at 95 % recall.

Legend: P clicks on defects, N clicks on clean steel.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RECALL = 0.95
TAILS = (0.025, 0.975)
DRAWS = 500


def auroc(defects: Sequence[float], sound: Sequence[float]) -> float | None:
    """The probability that a defect scores higher than clean steel, ties counting half; None if either is missing.

    AUROC = sum_pn ([d_p > s_n] + 1/2 [d_p = s_n]) / (P N), the Mann-Whitney statistic.
    """
    if not len(defects) or not len(sound):
        return None
    ordered = np.sort(np.asarray(sound, dtype=np.float64))
    below, upto = (np.searchsorted(ordered, defects, side=side).sum() for side in ("left", "right"))
    return float((int(below) + int(upto)) / (2 * len(defects) * len(sound)))


def false_alarms(defects: Sequence[float], sound: Sequence[float], recall: float = 0.95) -> tuple[float, float] | None:
    """The share of clean clicks detected as defects, at the highest threshold that finds `recall` of the defects.

    Returns:
        The share and the threshold t (a score of at least t predicts a defect); None if clicks of a kind are missing.
    """
    if not len(defects) or not len(sound):
        return None
    needed = math.ceil(recall * len(defects) - 1e-9)
    threshold = float(np.sort(np.asarray(defects, dtype=np.float64))[::-1][max(needed, 1) - 1])
    return float((np.asarray(sound) >= threshold).mean()), threshold


@dataclass(frozen=True)
class Scores:
    """The object scores of one model, each with its image."""

    defects: Sequence[float]
    defect_images: Sequence[Hashable]
    sound: Sequence[float]
    sound_images: Sequence[Hashable]


def presence_table(scores: Scores, recall: float = RECALL) -> dict[str, Any] | None:
    """AUROC and false alarms with 95 % intervals from resampled images; None without defects or clean clicks."""
    area, alarms = auroc(scores.defects, scores.sound), false_alarms(scores.defects, scores.sound, recall)
    if area is None or alarms is None:
        return None
    areas, rates = resampled(scores, recall).T
    return {
        "auroc": area,
        "auroc_ci95": np.quantile(areas, TAILS).tolist(),
        "false_alarms": alarms[0],
        "false_alarms_ci95": np.quantile(rates, TAILS).tolist(),
        "recall": recall,
        "threshold": alarms[1],
        "defect_clicks": len(scores.defects),
        "sound_clicks": len(scores.sound),
        "clean_images": len(set(scores.sound_images)),
    }


def presence_difference(first: Scores, other: Scores, recall: float = RECALL) -> dict[str, dict[str, float | int]]:
    """`other - first` of AUROC and false alarms of two models with the same prompts, on the same resampled images.

    Empty without defects or clean clicks.
    """
    before, after = presence_table(first, recall), presence_table(other, recall)
    if before is None or after is None:
        return {}
    draws = resampled(other, recall) - resampled(first, recall)  # draws 2
    result = {}
    for name, column in zip(("auroc", "false_alarms"), draws.T, strict=True):
        low, high = np.quantile(column, TAILS).tolist()
        clicks = before["defect_clicks"] + before["sound_clicks"]
        result[name] = {"mean": after[name] - before[name], "low": low, "high": high, "objects": clicks}
    return result


def resampled(scores: Scores, recall: float = RECALL, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """AUROC and false alarms float64 [draws, 2] of resampled images.

    Defective and clean images are drawn separately, so that every draw contains both.
    """
    rng = np.random.default_rng(seed)
    groups = [_by_image(scores.defects, scores.defect_images), _by_image(scores.sound, scores.sound_images)]
    values = []
    for _ in range(draws):
        drawn = [np.concatenate([group[i] for i in rng.integers(len(group), size=len(group))]) for group in groups]
        values.append((auroc(*drawn), false_alarms(*drawn, recall)[0]))
    return np.array(values)


def _by_image(values: Sequence[float], images: Sequence[Hashable]) -> list[np.ndarray]:
    members: dict[Hashable, list[float]] = {}
    for value, image in zip(values, images, strict=True):
        members.setdefault(image, []).append(value)
    return [np.array(group) for group in members.values()]
