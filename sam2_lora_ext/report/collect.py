"""Reads the files of runs and evaluations; a missing or damaged file raises a `UserError`."""

import csv
import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sam2_lora_ext.adapters.folder import is_adapter_folder
from sam2_lora_ext.adapters.peft import load_adapter
from sam2_lora_ext.adapters.weights import read_weights
from sam2_lora_ext.lora.adapter_state import Adapter
from sam2_lora_ext.run.state import OLD_SUMMARY, SUMMARY, is_finished
from sam2_lora_ext.utils.errors import UserError
from sam2_lora_ext.utils.files import LARGEST_NOTE, read_json, read_text

TABLE = "logs/metrics.csv"


@dataclass
class Run:
    """One run folder; the fields of missing files are empty."""

    path: Path
    name: str
    label: str  # short, and unique among the runs of a report
    summary: dict[str, Any] = field(default_factory=dict)  # of a finished run
    extended: int | None = None  # steps at the earlier end of an extended run that is not finished again
    lora: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, str]] = field(default_factory=list)  # of logs/metrics.csv

    def curve(self, phase: str, column: str) -> tuple[list[float], list[float]]:
        """Steps and values of a column of metrics.csv, without empty cells and values that are not finite.

        Raises:
            UserError: a cell is not a number.
        """
        cells = [(row["step"], row[column]) for row in self.rows if row["phase"] == phase and row.get(column)]
        try:
            points = [(float(step), float(value)) for step, value in cells]
        except ValueError as error:
            raise UserError(f"{self.path / TABLE} is damaged in the column {column}: {error}") from error
        points = [point for point in points if math.isfinite(point[1])]
        return [step for step, _ in points], [value for _, value in points]

    def adapter(self) -> tuple[str, Adapter] | None:
        """The kind and the adapter of the run: best, else final, else latest."""
        for kind in ("best", "final", "latest"):
            if is_adapter_folder(self.path / "adapters" / kind):
                return kind, load_adapter(self.path / "adapters" / kind)
        return None

    def weights(self) -> tuple[str, dict[str, Any]] | None:
        """The kind and the full weights of a run that trained no adapter: best, else final."""
        for kind in ("best", "final"):
            if (self.path / "weights" / f"{kind}.pt").exists():
                return kind, read_weights(self.path / "weights" / f"{kind}.pt")
        return None

    def base(self) -> dict[str, Any] | None:
        """The base's weights, if the file still exists."""
        path = self.lora.get("base_path")
        return read_weights(path) if path and Path(path).is_file() else None


@dataclass
class Evaluation:
    """One evaluation.json and the folder of its pictures."""

    folder: Path
    record: dict[str, Any]


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Reads several run folders; labels of folders with the same name are made unique.

    Raises:
        UserError: see `read_run`; or a run is given twice.
    """
    places = [path.resolve() for path in paths]
    if len(set(places)) < len(places):
        raise UserError(f"a run is given twice: {', '.join(map(str, paths))}")
    parts = 1
    while len({place.parts[-parts:] for place in places}) < len(places):
        parts += 1
    return [read_run(path, "/".join(place.parts[-parts:])) for path, place in zip(paths, places, strict=True)]


def read_run(path: Path, label: str | None = None) -> Run:
    """Reads a run folder of `LoRATrainer`.

    Raises:
        UserError: it is not a run folder, or a file in it is damaged.
    """
    if not (path / "run.json").is_file():
        raise UserError(
            f"{path} is not a run folder (it has no run.json): give the folder set by launcher.experiment_log_dir"
        )
    run = Run(path, str(_json(path / "run.json", dict).get("name", path.name)), label or path.resolve().name)
    for attribute, file in (("summary", SUMMARY), ("lora", "lora.json")):
        if (path / file).exists():
            setattr(run, attribute, _json(path / file, dict))
    if not is_finished(path):
        before = run.summary or (_json(path / OLD_SUMMARY, dict) if (path / OLD_SUMMARY).exists() else {})
        run.summary, run.extended = {}, before.get("steps")
    if (path / TABLE).exists():
        run.rows = _rows(path / TABLE)
    return run


def read_evaluation(path: Path) -> Evaluation:
    """Reads an evaluation folder, or its evaluation.json.

    Raises:
        UserError: evaluation.json is missing or damaged.
    """
    file = path / "evaluation.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"there is no {file}: create it with tools/evaluate.py")
    record = _json(file, dict)
    if not {"protocol", "models", "differences", "data"} <= set(record) or not record["models"]:
        raise UserError(f"{file} was not written by tools/evaluate.py: give the folder of an evaluation")
    return Evaluation(file.parent, record)


@contextmanager
def understood(what: str) -> Iterator[None]:
    """Turns errors from unexpected content of the JSON files `what` into a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        sentence = f"{what} is damaged or from another version ({error!r}): restore it, or run again"
        raise UserError(sentence) from error


def _rows(table: Path) -> list[dict[str, str]]:
    try:
        with io.StringIO(read_text(table), newline="") as file:
            reader = csv.DictReader(file)
            if not {"step", "phase", "loss"} <= set(reader.fieldnames or ()):
                raise UserError(f"{table} is damaged: its header lacks step, phase or loss")
            return [
                row for row in reader if None not in row.values()
            ]  # a running job may have written only part of the last line
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{table} is damaged or cannot be read ({error}): restore it, or move it away") from error


def _json(path: Path, kind: type) -> Any:
    try:
        content = read_json(path, LARGEST_NOTE)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged or cannot be read ({error}): restore it, or run again") from error
    if not isinstance(content, kind):
        raise UserError(f"{path} is damaged: it contains a {type(content).__name__}; restore it, or run again")
    return content
