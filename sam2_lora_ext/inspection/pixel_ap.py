"""The average precision (AP) of pixels, from a histogram of their probabilities, so that no pixels are stored.

    AP = sum_k (R_k - R_{k-1}) P_k over descending thresholds, as in scikit-learn

Probabilities are counted in bins of equal width of their logit; pixels in the same bin are tied.
"""

import numpy as np

BINS = 1 << 16
SURE = 20.0  # logits are clipped to [-SURE, SURE]


class PixelRanks:
    """The number of pixels of a class, and of other pixels, in each bin."""

    def __init__(self) -> None:
        self.counts = np.zeros((2, BINS), dtype=np.int64)

    def add(self, probability: np.ndarray, truth: np.ndarray) -> None:
        """Adds pixels of any shape: the predicted probability of the class, and the truth (bool)."""
        p = np.clip(probability.astype(np.float64), 1e-12, 1 - 1e-12)
        place = (np.clip(np.log(p / (1 - p)), -SURE, SURE) + SURE) * ((BINS - 1) / (2 * SURE))
        place = np.rint(place).astype(np.int64)
        self.counts[0] += np.bincount(place[~truth], minlength=BINS)
        self.counts[1] += np.bincount(place[truth], minlength=BINS)

    def average_precision(self) -> float | None:
        """AP; None if no pixel is of the class."""
        others, own = (np.cumsum(row[::-1]) for row in self.counts)
        if not own[-1]:
            return None
        precision = own / np.maximum(own + others, 1)
        return float((np.diff(own, prepend=0) * precision).sum() / own[-1])
