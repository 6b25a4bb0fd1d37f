"""What a run remembers and writes beside its checkpoint: validations, rows of metrics, adapters, the summary."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from sam2_lora_ext.files import write_json
from sam2_lora_ext.history import History
from sam2_lora_ext.logger import MetricsCSV, metric_columns
from sam2_lora_ext.lora import LoRAConfig, format_report
from sam2_lora_ext.run_folder import RunFolder
from sam2_lora_ext.summary import summarize


class RunRecord:
    """Opens the files of a run; on a resume drops what lies behind the checkpoint, since it will be made again.

    Every rank has one; rank 0 writes.

    Args:
        run_dir: the run's folder.
        model: unwrapped.
        history: with `monitor` and rule, without entries yet.
        facts: about the base: `base_id`, `base_path`, `model_config`.
        lora: the config's `lora` block, or None.
        export: `merged` and `flat_files`.
        meter_keys: every metric that a validation may give.
        learning_rate: the highest of the schedule.
        epoch: validated epochs from this one on are forgotten.
        step: training rows beyond it are dropped.

    Raises:
        UserError: the monitored metric is none of `meter_keys`, or a file is damaged or of other settings.
    """

    def __init__(
        self, run_dir: Path, model: nn.Module, *, history: History, facts: Mapping[str, Any], lora: Any,
        export: Mapping[str, bool], meter_keys: Sequence[str], learning_rate: float, epoch: int, step: int,
    ):  # fmt: skip
        self.run_dir, self.facts, self.learning_rate = run_dir, dict(facts), learning_rate
        self.lora = LoRAConfig.of(lora).to_dict() if lora is not None else None
        self.csv = MetricsCSV(run_dir / "logs" / "metrics.csv", metric_columns(meter_keys))
        self.files: RunFolder | None = None
        self.name = ""
        entries: list[dict[str, Any]] = []
        if dist.get_rank() == 0:
            base_path = self.facts["base_path"]
            self.files = RunFolder(run_dir, model, facts, base_path=base_path, monitor=history.monitor, **export)
            self.name = self.files.name(learning_rate)
            entries = [entry for entry in self.files.validations() if entry["epoch"] < epoch]
            self.csv.truncate_after(step, entries[-1]["epoch"] if entries else -1)
            self.files.write_lora(self.lora, resumed=epoch > 0)
            logging.info("What is trained:\n" + format_report(self.files.report))
        shared = [entries]
        dist.broadcast_object_list(shared, src=0)
        self.history = History(history.monitor, history.rule, shared[0])

    def row(self, phase: str, step: int, epoch: int, values: Mapping[str, float], **more: float) -> None:
        """Writes a row of metrics.csv; `iou` and `dice` are those of the first prompt."""
        known = {key: value for key, value in values.items() if key in self.csv.columns}
        first = {name: values.get(f"{name}_1click", values.get(f"{name}_box")) for name in ("iou", "dice")}
        self.csv.write({"step": step, "epoch": epoch, "phase": phase, **first, **known, **more})

    def validation(self, step: int, epoch: int, metrics: Mapping[str, float]) -> None:
        """Takes note of a validation; the model is exported when it is the best so far."""
        self.history.add(epoch, step, metrics)
        self.row("val", step, epoch, metrics)
        if self.history.last_is_best:
            self.export("best", step)
        if self.files is not None:
            self.files.write_validations(self.history.entries)  # last: only now it has happened
        if reason := self.history.stop_reason:
            logging.info(f"Early stop at step {step}: {reason}")

    def export(self, kind: str, step: int) -> None:
        """Writes the model as it is now as `best`, `latest` or `final`."""
        if self.files is not None:
            metrics = self.history.entries[-1]["metrics"] if self.history.entries and kind != "latest" else {}
            self.files.export(kind, step, metrics, self.name)

    def finish(self, step: int, trained: bool, **facts: Any) -> None:
        """Writes `final` and training_summary.json, unless this is a finished run that was started again.

        Args:
            step: optimizer steps of the whole run.
            trained: whether any of them were made since this start.
            **facts: the rest of what `summarize` takes.
        """
        summary = self.run_dir / "training_summary.json"
        if self.files is None or (summary.exists() and not trained):
            return
        self.export("final", step)
        parameters = {name: self.files.report[name] for name in ("trained", "total")}
        content = summarize(
            name=self.name, lora=self.lora, learning_rate=self.learning_rate, history=self.history, steps=step,
            world_size=dist.get_world_size(), parameters=parameters, **self.facts, **facts,
        )  # fmt: skip
        write_json(summary, content)
