"""Reads what runs and evaluations left on the disk, and says plainly what is missing."""

import csv
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sam2_lora_ext.adapter import CONFIG, load_adapter
from sam2_lora_ext.checkpoints import read_weights
from sam2_lora_ext.errors import UserError
from sam2_lora_ext.lora.adapter import Adapter


@dataclass
class Run:
    """One run folder; what the run has not written (yet) is empty."""

    path: Path
    name: str
    summary: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, str]] = field(default_factory=list)  # of logs/metrics.csv
    validations: list[dict[str, Any]] = field(default_factory=list)

    def curve(self, phase: str, column: str) -> tuple[list[float], list[float]]:
        """Steps and values of a column of metrics.csv, without empty cells."""
        points = [
            (float(row["step"]), float(row[column])) for row in self.rows if row["phase"] == phase and row.get(column)
        ]
        return [step for step, _ in points], [value for _, value in points]

    def adapter(self) -> tuple[str, Adapter] | None:
        """The adapter that the run would be used with, and its kind: best, else final, else latest."""
        for kind in ("best", "final", "latest"):
            if (self.path / "adapters" / kind / CONFIG).exists():
                return kind, load_adapter(self.path / "adapters" / kind)
        return None

    def base(self) -> dict[str, Any] | None:
        """The base's weights, when the file is still where it was."""
        path = self.lora.get("base_path")
        return read_weights(path) if path and Path(path).is_file() else None


@dataclass
class Evaluation:
    """One evaluation.json and the folder that its pictures are in."""

    folder: Path
    record: dict[str, Any]


def read_run(path: Path) -> Run:
    """A run folder of `LoRATrainer`.

    Raises:
        UserError: it is none, or a file in it is damaged.
    """
    if not (path / "run.json").is_file():
        raise UserError(
            f"{path} is no run folder (there is no run.json in it): give the folder of launcher.experiment_log_dir"
        )
    run = Run(path, str(_json(path / "run.json").get("name", path.name)))
    for attribute, file in (
        ("summary", "training_summary.json"),
        ("lora", "lora.json"),
        ("validations", "validations.json"),
    ):
        if (path / file).exists():
            setattr(run, attribute, _json(path / file))
    table = path / "logs/metrics.csv"
    if table.exists():
        with open(table, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if not {"step", "phase", "loss"} <= set(reader.fieldnames or ()):
                raise UserError(f"{table} is damaged: its header lacks step, phase or loss")
            run.rows = [
                row for row in reader if None not in row.values()
            ]  # a running job may be in the middle of a line
    return run


def read_evaluation(path: Path) -> Evaluation:
    """An evaluation folder, or its evaluation.json.

    Raises:
        UserError: there is none, or it is damaged.
    """
    file = path / "evaluation.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"there is no {file}: make it with tools/evaluate.py")
    record = _json(file)
    if not {"protocol", "models", "differences", "data"} <= set(record):
        raise UserError(f"{file} is not what tools/evaluate.py writes: give its folder")
    return Evaluation(file.parent, record)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged or cannot be read ({error}): restore it, or run again") from error
