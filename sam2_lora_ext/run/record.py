"""Writes what a run records besides its checkpoint: validations, rows of metrics, adapters, the summary."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch.distributed as dist
from torch import nn

from sam2_lora_ext.logger import MetricsCSV, metric_columns
from sam2_lora_ext.lora import LoRAConfig, format_report
from sam2_lora_ext.run.folder import RunFolder
from sam2_lora_ext.run.history import History
from sam2_lora_ext.run.start import RunStart, on_rank_0
from sam2_lora_ext.run.state import SUMMARY
from sam2_lora_ext.run.summary import summarize
from sam2_lora_ext.utils.files import write_json


class Meter(Protocol):
    """A meter by the contract of SAM 2's Trainer, such as `meters.SegmentationMeter`."""

    def compute_synced(self) -> Mapping[str, float]: ...

    def reset(self) -> None: ...


def metrics_of(outs: Mapping[str, Any], meters: Iterable[str]) -> dict[str, float]:
    """The meters' values, by their own keys, from everything that the Trainer's validation returns."""
    metrics: dict[str, float] = {}
    for name in meters:
        prefix = f"Meters_train/{name}/"
        metrics |= {key.removeprefix(prefix): value for key, value in outs.items() if key.startswith(prefix)}
    logging.info("Validation: " + ", ".join(f"{key} {value:.4f}" for key, value in metrics.items()))
    return metrics


class RunRecord:
    """Opens the files of a run; a resume drops records after the checkpoint, since training will write them again.

    Every rank has one; rank 0 writes. A start that does not train writes nothing: its run is `finished`, or it only
    validates.

    Args:
        start: the run's start; accepted here.
        model: the unwrapped model.
        history: has `monitor` and rule, but no entries yet.
        facts: about the base: `base_id`, `base_path`, `model_config`.
        lora: the config's `lora` block, or None.
        export: `merged` and `flat_files`.
        meter_keys: every metric that a validation may report.
        learning_rate: the highest rate of the schedule.
        epoch: validations of this epoch and later ones are dropped.
        step: training rows after this step are dropped.
        last_epoch: a run with a summary is finished when its epoch has reached this, or when it stopped early.
        trains: whether this start should train.

    Raises:
        UserError: the monitored metric is not in `meter_keys`, or a file is damaged or was written with other settings.
    """

    def __init__(
        self,
        start: RunStart,
        model: nn.Module,
        *,
        history: History,
        facts: Mapping[str, Any],
        lora: Any,
        export: Mapping[str, bool],
        meter_keys: Sequence[str],
        learning_rate: float,
        epoch: int,
        step: int,
        last_epoch: int,
        trains: bool,
    ):
        self.run_dir, self.facts, self.learning_rate = start.run_dir, dict(facts), learning_rate
        self.lora = LoRAConfig.of(lora).to_dict() if lora is not None else None
        self.csv: MetricsCSV | None = None
        self.files: RunFolder | None = None
        self.name, self.finished = "", False
        shared: list[Any] = [[], False]

        def open_files() -> None:
            files = RunFolder(
                self.run_dir,
                model,
                facts,
                self.lora,
                base_path=self.facts["base_path"],
                monitor=history.monitor,
                **export,
            )
            entries = [entry for entry in files.validations() if entry["epoch"] < epoch]
            ended = epoch >= last_epoch or History(history.monitor, history.rule, entries).stop_reason is not None
            shared[:] = [entries, ended and (self.run_dir / SUMMARY).exists()]
            if not trains or shared[1]:
                start.withdraw()
                return
            self.csv = MetricsCSV(self.run_dir / "logs" / "metrics.csv", metric_columns(meter_keys))
            start.accept(step)
            self.files, self.name = files, files.name(learning_rate)
            self.csv.truncate_after(step, entries[-1]["epoch"] if entries else -1)
            files.write_lora()
            logging.info("Trained parameters:\n" + format_report(files.report))

        on_rank_0(open_files)
        dist.broadcast_object_list(shared, src=0)
        self.history, self.finished = History(history.monitor, history.rule, shared[0]), shared[1]
        if self.finished and trains:
            logging.info(f"The run in {self.run_dir} is finished: nothing is trained and its records do not change")

    @property
    def notes(self) -> dict[str, Any]:
        """The notes stored in a checkpoint; empty on ranks other than 0."""
        return {} if self.files is None else self.files.notes

    def row(self, phase: str, step: int, epoch: int, values: Mapping[str, float], **more: float) -> None:
        """Writes a row of metrics.csv; `iou` and `dice` are those of the first prompt."""
        if self.csv is None:
            return
        known = {key: value for key, value in values.items() if key in self.csv.columns}
        first = {name: values.get(f"{name}_1click", values.get(f"{name}_box")) for name in ("iou", "dice")}
        self.csv.write({"step": step, "epoch": epoch, "phase": phase, **first, **known, **more})

    def window_row(self, step: int, epoch: int, window: Meter, learning_rate: float) -> None:
        """Writes a row of the training metrics since the last row and resets them; all ranks must call this."""
        values = window.compute_synced()
        window.reset()
        self.row("train", step, epoch, values, learning_rate=learning_rate)

    def validation(self, step: int, epoch: int, metrics: Mapping[str, float]) -> None:
        """Records a validation; exports the model when it is the best so far."""
        self.history.add(epoch, step, metrics)
        self.row("val", step, epoch, metrics)
        if self.history.last_is_best:
            self.export("best", step)
        if self.files is not None:
            self.files.write_validations(self.history.entries)  # last, so that a recorded validation is complete
        if reason := self.history.stop_reason:
            logging.info(f"Early stop at step {step}: {reason}")

    def export(self, kind: str, step: int) -> None:
        """Writes the current model as `best`, `latest` or `final`."""
        if self.files is not None:
            metrics = self.history.entries[-1]["metrics"] if self.history.entries and kind != "latest" else {}
            self.files.export(kind, step, metrics, self.name)

    def finish(self, step: int, **facts: Any) -> None:
        """Writes `final` and training_summary.json, unless the run was already finished at its start.

        Args:
            step: optimizer steps of the whole run.
            **facts: the other arguments of `summarize`.
        """
        if self.files is None:
            return
        self.export("final", step)
        parameters = {name: self.files.report[name] for name in ("trained", "total")}
        content = summarize(
            name=self.name,
            lora=self.lora,
            learning_rate=self.learning_rate,
            history=self.history,
            steps=step,
            world_size=dist.get_world_size(),
            parameters=parameters,
            **self.facts,
            **facts,
        )
        write_json(self.run_dir / SUMMARY, content)
