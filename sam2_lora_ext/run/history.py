"""The validations of a run so far, the best of them, and early stopping."""

import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sam2_lora_ext.run.early_stop import EarlyStop
from sam2_lora_ext.utils.errors import UserError, check_keys


class History:
    """Validations, oldest first, each a dict of `epoch` (from 0), `step` and `metrics`.

    Args:
        monitor: the metric that is compared.
        rule: for early stopping; its mode also applies to the best validation.
        entries: the validations so far.
    """

    def __init__(self, monitor: str, rule: EarlyStop, entries: Sequence[Mapping[str, Any]] = ()):
        self.monitor, self.rule = monitor, rule
        self.entries = [dict(entry) for entry in entries]
        for entry in self.entries:
            self.check(entry["metrics"])

    @classmethod
    def of(cls, monitor: str, mode: str, early_stop: Mapping[str, Any] | None) -> "History":
        """An empty history for the settings of a config; without `early_stop` training never stops early.

        Raises:
            UserError: a setting is unknown or impossible.
        """
        check_keys("trainer.early_stop", early_stop or (), ("patience", "min_delta"))
        if monitor == "false_alarms" and mode == "max":
            raise UserError("trainer.monitor=false_alarms is better when lower: set trainer.monitor_mode=min")
        return cls(monitor, EarlyStop(**{"mode": mode, **(early_stop or {"patience": sys.maxsize})}))

    def add(self, epoch: int, step: int, metrics: Mapping[str, float]) -> None:
        """Appends a validation.

        Raises:
            UserError: it lacks the monitored metric.
        """
        self.check(metrics)
        self.entries.append({"epoch": epoch, "step": step, "metrics": dict(metrics)})

    @property
    def last_epoch(self) -> int:
        """The last validated epoch; -1 before the first validation."""
        return self.entries[-1]["epoch"] if self.entries else -1

    @property
    def best(self) -> dict[str, Any] | None:
        """The best validation; None before the first validation without NaN."""
        index = self.rule.best(self._values)
        return None if index is None else self.entries[index]

    @property
    def last_is_best(self) -> bool:
        """Whether the newest validation is the best one."""
        return bool(self.entries) and self.best is self.entries[-1]

    @property
    def stop_reason(self) -> str | None:
        """The reason for early stopping, as a sentence; None while training continues."""
        if not self.rule.should_stop(self._values):
            return None
        return (
            f"{self.monitor} has not improved by more than {self.rule.min_delta:g} for "
            f"{self.rule.stalled(self._values)} validations; best at step {self.best['step'] if self.best else '-'}"
        )

    @property
    def _values(self) -> list[float]:
        return [entry["metrics"][self.monitor] for entry in self.entries]

    def check(self, metrics: Collection[str]) -> None:
        """Raises a `UserError` when the monitored metric is not among `metrics`."""
        if self.monitor not in metrics:
            known = ", ".join(metrics)
            raise UserError(
                f"trainer.monitor is {self.monitor!r}, which the validation does not report: choose from {known}"
            )
