"""The average precision of pixels, from counts by rank, so that no pixel is kept.

    AP = sum_k (R_k - R_{k-1}) P_k over falling thresholds, as scikit-learn has it

Probabilities are sorted into bins of equal width of their logit; what shares a bin is a tie.
"""

import numpy as np

BINS = 1 << 16
SURE = 20.0  # logits beyond it are ties


class PixelRanks:
    """How many pixels of a class, and how many others, are in each bin."""

    def __init__(self) -> None:
        self.counts = np.zeros((2, BINS), dtype=np.int64)

    def add(self, probability: np.ndarray, truth: np.ndarray) -> None:
        """Takes pixels of any shape: how likely each is of the class, and whether it is (bool)."""
        p = np.clip(probability.astype(np.float64), 1e-12, 1 - 1e-12)
        place = (np.clip(np.log(p / (1 - p)), -SURE, SURE) + SURE) * ((BINS - 1) / (2 * SURE))
        place = np.rint(place).astype(np.int64)
        self.counts[0] += np.bincount(place[~truth], minlength=BINS)
        self.counts[1] += np.bincount(place[truth], minlength=BINS)

    def average_precision(self) -> float | None:
        """AP; None where no pixel is of the class."""
        others, own = (np.cumsum(row[::-1]) for row in self.counts)
        if not own[-1]:
            return None
        precision = own / np.maximum(own + others, 1)
        return float((np.diff(own, prepend=0) * precision).sum() / own[-1])
