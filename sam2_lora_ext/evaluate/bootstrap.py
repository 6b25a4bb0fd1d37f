"""Confidence intervals by resampling images, since the objects of one image are not independent."""

from collections.abc import Hashable, Sequence

import numpy as np


def bootstrap_interval(
    values: Sequence[float], groups: Sequence[Hashable], level: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """The percentile interval of the mean over objects, drawing whole images with replacement (Efron 1979).

    Args:
        values: one per object.
        groups: the image of each object.
        level: covered share, in (0, 1).
        draws: number of resamples.
        seed: of the draws.

    Returns:
        The lower and upper bound; both are the mean itself where there is one image.
    """
    names = {name: place for place, name in enumerate(dict.fromkeys(groups))}
    places = np.array([names[group] for group in groups])
    sums, counts = np.bincount(places, values, len(names)), np.bincount(places, minlength=len(names))
    drawn = np.random.default_rng(seed).integers(len(names), size=(draws, len(names)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    tail = (1 - level) / 2
    return float(np.quantile(means, tail)), float(np.quantile(means, 1 - tail))
