"""Early stopping and the choice of the best validation as pure functions of the values seen so far.

No counter is kept: a resumed run with the same history makes the same decision.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sam2_lora_ext.utils.errors import UserError


@dataclass(frozen=True)
class EarlyStop:
    """Stop after `patience` validations in a row that did not improve by more than `min_delta`.

    Args:
        patience: number of validations without improvement, at least 1.
        min_delta: an improvement exceeds the best value so far by more than this; at least 0.
        mode: "max" where higher is better, "min" where lower is.
    """

    patience: int = 7
    min_delta: float = 1e-4
    mode: str = "max"

    def __post_init__(self) -> None:
        if self.patience < 1 or self.min_delta < 0 or self.mode not in ("max", "min"):
            raise UserError(
                f"early_stop needs a patience of at least 1, a min_delta of at least 0 and the mode max or min, got "
                f"{self.patience}, {self.min_delta} and {self.mode}"
            )

    def stalled(self, values: Sequence[float]) -> int:
        """The number of validations since the last improvement; a NaN never improves, the first number always does."""
        best, since = None, 0
        for value in self._signed(values):
            if not math.isnan(value) and (best is None or value > best + self.min_delta):
                best, since = value, 0
            else:
                since += 1
        return since

    def should_stop(self, values: Sequence[float]) -> bool:
        """Whether training ends after these validations."""
        return self.stalled(values) >= self.patience

    def best(self, values: Sequence[float]) -> int | None:
        """The index of the best value, the earliest of equal ones; None without any number."""
        known = [(value, -index) for index, value in enumerate(self._signed(values)) if not math.isnan(value)]
        return -max(known)[1] if known else None

    def _signed(self, values: Sequence[float]) -> list[float]:
        return [value if self.mode == "max" else -value for value in values]
