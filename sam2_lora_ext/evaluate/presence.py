"""Is there a defect? What the object score is worth: AUROC, and false alarms where 95 % of the defects are found.

Legend: P clicks on defects, N clicks on sound steel, I images.
"""

import math
from collections.abc import Hashable, Sequence

import numpy as np


def auroc(defects: Sequence[float], sound: Sequence[float]) -> float | None:
    """The chance that a defect scores higher than sound steel, ties counted half; None where one of them is missing.

    AUROC = sum_pn ([d_p > s_n] + 1/2 [d_p = s_n]) / (P N), the Mann-Whitney statistic.
    """
    if not len(defects) or not len(sound):
        return None
    ordered = np.sort(np.asarray(sound, dtype=np.float64))
    below, upto = (np.searchsorted(ordered, defects, side=side).sum() for side in ("left", "right"))
    return float((int(below) + int(upto)) / (2 * len(defects) * len(sound)))


def false_alarms(defects: Sequence[float], sound: Sequence[float], recall: float = 0.95) -> tuple[float, float] | None:
    """The share of sound clicks that are taken for defects at the highest threshold that finds `recall` of the defects.

    Returns:
        The share and the threshold t (a click with a score of at least t is a defect); None where clicks are missing.
    """
    if not len(defects) or not len(sound):
        return None
    needed = math.ceil(recall * len(defects) - 1e-9)
    threshold = float(np.sort(np.asarray(defects, dtype=np.float64))[::-1][max(needed, 1) - 1])
    return float((np.asarray(sound) >= threshold).mean()), threshold


def presence_table(
    defects: Sequence[float],
    defect_images: Sequence[Hashable],
    sound: Sequence[float],
    sound_images: Sequence[Hashable],
    recall: float = 0.95,
    draws: int = 500,
    seed: int = 0,
) -> dict[str, float | list[float] | int] | None:
    """Both numbers with 95 % intervals from resampled images; None where defects or sound clicks are missing.

    Defective and clean images are drawn apart, so that no draw lacks one of them.
    """
    area, alarms = auroc(defects, sound), false_alarms(defects, sound, recall)
    if area is None or alarms is None:
        return None
    rng = np.random.default_rng(seed)
    areas, rates = [], []
    groups = [_by_image(defects, defect_images), _by_image(sound, sound_images)]
    for _ in range(draws):
        drawn = [np.concatenate([group[i] for i in rng.integers(len(group), size=len(group))]) for group in groups]
        areas.append(auroc(*drawn))
        rates.append(false_alarms(*drawn, recall)[0])
    return {
        "auroc": area,
        "auroc_ci95": np.quantile(areas, (0.025, 0.975)).tolist(),
        "false_alarms": alarms[0],
        "false_alarms_ci95": np.quantile(rates, (0.025, 0.975)).tolist(),
        "recall": recall,
        "threshold": alarms[1],
        "defect_clicks": len(defects),
        "sound_clicks": len(sound),
        "clean_images": len(set(sound_images)),
    }


def _by_image(values: Sequence[float], images: Sequence[Hashable]) -> list[np.ndarray]:
    members: dict[Hashable, list[float]] = {}
    for value, image in zip(values, images, strict=True):
        members.setdefault(image, []).append(value)
    return [np.array(group) for group in members.values()]
