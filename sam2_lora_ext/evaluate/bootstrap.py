"""Confidence intervals by resampling images, since the objects of one image are not independent."""

from collections.abc import Callable, Hashable, Sequence

import numpy as np


def bootstrap_interval(
    values: Sequence[float], groups: Sequence[Hashable], level: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """The percentile interval of the mean over objects, drawing whole images with replacement (Efron 1979).

    Args:
        values: one per object.
        groups: the image of each object.
        level: coverage, in (0, 1).
        draws: number of resamples.
        seed: seed of the draws.

    Returns:
        The lower and upper bound; with a single image both equal the mean.
    """
    names = {name: position for position, name in enumerate(dict.fromkeys(groups))}
    positions = np.array([names[group] for group in groups])
    sums, counts = np.bincount(positions, values, len(names)), np.bincount(positions, minlength=len(names))
    drawn = np.random.default_rng(seed).integers(len(names), size=(draws, len(names)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    tail = (1 - level) / 2
    return float(np.quantile(means, tail)), float(np.quantile(means, 1 - tail))


def bootstrap_sums(
    table: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """The percentile interval of a statistic of sums over images, such as a pooled Dice.

    Args:
        table: the terms of each image in each sum, [images, sums].
        statistic: sums [draws, sums] -> values [draws]; draws without a value are NaN and ignored.
        level: coverage, in (0, 1).
        draws: number of resamples.
        seed: seed of the draws.

    Returns:
        The lower and upper bound; NaN if no draw has a value.
    """
    count, rng = len(table), np.random.default_rng(seed)
    times = np.stack([np.bincount(rng.integers(count, size=count), minlength=count) for _ in range(draws)])
    values = statistic(times @ np.asarray(table, dtype=np.float64))
    values = values[np.isfinite(values)]
    if not len(values):
        return float("nan"), float("nan")
    tail = (1 - level) / 2
    return float(np.quantile(values, tail)), float(np.quantile(values, 1 - tail))
