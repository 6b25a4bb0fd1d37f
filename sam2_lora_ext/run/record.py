"""What a run remembers and writes beside its checkpoint: validations, rows of metrics, adapters, the summary."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import nn

from sam2_lora_ext.class_prompts.pairs import TrainingWindow
from sam2_lora_ext.logger import MetricsCSV, metric_columns
from sam2_lora_ext.lora import LoRAConfig, format_report
from sam2_lora_ext.run.folder import RunFolder
from sam2_lora_ext.run.history import History
from sam2_lora_ext.run.start import RunStart, on_rank_0
from sam2_lora_ext.run.state import SUMMARY
from sam2_lora_ext.run.summary import summarize
from sam2_lora_ext.utils.files import write_json


def metrics_of(outs: Mapping[str, Any], meters: Iterable[str]) -> dict[str, float]:
    """What meters gave, by their own keys, of all that the Trainer's validation returns."""
    metrics: dict[str, float] = {}
    for name in meters:
        prefix = f"Meters_train/{name}/"
        metrics |= {key.removeprefix(prefix): value for key, value in outs.items() if key.startswith(prefix)}
    logging.info("Validation: " + ", ".join(f"{key} {value:.4f}" for key, value in metrics.items()))
    return metrics


class RunRecord:
    """Opens the files of a run; on a resume drops what lies behind the checkpoint, since it will be made again.

    Every rank has one; rank 0 writes. A start that trains nothing writes nothing: the run is `finished`, or only
    validated.

    Args:
        start: of the run; it is accepted here.
        model: unwrapped.
        history: with `monitor` and rule, without entries yet.
        facts: about the base: `base_id`, `base_path`, `model_config`.
        lora: the config's `lora` block, or None.
        export: `merged` and `flat_files`.
        meter_keys: every metric that a validation may give.
        learning_rate: the highest of the schedule.
        epoch: validated epochs from this one on are forgotten.
        step: training rows beyond it are dropped.
        last_epoch: the run is finished when its epoch has come this far, or its history says so, and it has a summary.
        trains: whether training is what was asked for.

    Raises:
        UserError: the monitored metric is none of `meter_keys`, or a file is damaged or of other settings.
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
            logging.info("What is trained:\n" + format_report(files.report))

        on_rank_0(open_files)
        dist.broadcast_object_list(shared, src=0)
        self.history, self.finished = History(history.monitor, history.rule, shared[0]), shared[1]
        if self.finished and trains:
            logging.info(f"The run in {self.run_dir} is finished: nothing is trained, and its records stay as they are")

    @property
    def notes(self) -> dict[str, Any]:
        """What a checkpoint says about itself; on rank 0."""
        return {} if self.files is None else self.files.notes

    def row(self, phase: str, step: int, epoch: int, values: Mapping[str, float], **more: float) -> None:
        """Writes a row of metrics.csv; `iou` and `dice` are those of the first prompt."""
        if self.csv is None:
            return
        known = {key: value for key, value in values.items() if key in self.csv.columns}
        first = {name: values.get(f"{name}_1click", values.get(f"{name}_box")) for name in ("iou", "dice")}
        self.csv.write({"step": step, "epoch": epoch, "phase": phase, **first, **known, **more})

    def window_row(self, step: int, epoch: int, window: TrainingWindow, learning_rate: float) -> None:
        """Writes a row of training metrics since the last one, and forgets them; to be called by all ranks."""
        values = window.compute_synced()
        window.reset()
        self.row("train", step, epoch, values, learning_rate=learning_rate)

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

    def finish(self, step: int, **facts: Any) -> None:
        """Writes `final` and training_summary.json, unless this is a finished run that was started again.

        Args:
            step: optimizer steps of the whole run.
            **facts: the rest of what `summarize` takes.
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
