"""CSV files in addition to TensorBoard: rows of metrics for `LoRATrainer`, single scalars for the plain Trainer.

Both write on rank 0 only, flush every row, and survive a kill: an unfinished last line is removed when a file is opened
again. Floats are written by `repr`, so reading returns the same number.
"""

import csv
import io
import os
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

from training.utils.logger import Scalar, TensorBoardLogger, make_tensorboard_logger

from sam2_lora_ext.utils.errors import UserError
from sam2_lora_ext.utils.files import write_atomic

BASE_COLUMNS = (
    "step",
    "epoch",
    "phase",
    "loss",
    "loss_mask",
    "loss_dice",
    "loss_iou",
    "loss_class",
    "loss_tversky",
    "iou",
    "dice",
    "learning_rate",
)
SCALAR_COLUMNS = ("step", "name", "value")
TRAIN = "train"

Cell = float | int | str | None


def metric_columns(meter_keys: Sequence[str]) -> list[str]:
    """The columns of metrics.csv: `BASE_COLUMNS` (`iou` and `dice` at the first prompt), then the other meter keys."""
    return list(dict.fromkeys([*BASE_COLUMNS, *meter_keys]))


class CSVFile:
    """A CSV file that grows by complete rows only; on ranks other than 0 it does nothing.

    Args:
        path: the file; created with its folder and header if missing.
        columns: the header.

    Raises:
        UserError: the file has another header, a damaged row before its last line, or cannot be written.
    """

    def __init__(self, path: str | Path, columns: Sequence[str]):
        self.path = Path(path)
        self.columns = list(columns)
        self.enabled = int(os.environ.get("RANK", "0")) == 0
        if self.enabled:
            self._rewrite(lambda row: True)

    def write(self, row: Mapping[str, Cell]) -> None:
        """Appends a row; a column without a value stays empty.

        Raises:
            UserError: a key is not a column, or the file cannot be written.
        """
        unknown = [key for key in row if key not in self.columns]
        if unknown:
            raise UserError(f"{self.path} has no column {', '.join(unknown)}: choose from {', '.join(self.columns)}")
        if not self.enabled:
            return
        try:
            with open(self.path, "a", encoding="utf-8", newline="") as file:
                file.write(_line(_text(row.get(column)) for column in self.columns))
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"cannot write {self.path}: {reason}; check the folder and the free disk") from error

    def read(self) -> list[dict[str, str]]:
        """The complete rows, as text; an unfinished last line is left out."""
        try:
            text = self.path.read_bytes().decode("utf-8", errors="replace")
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror or error}; check the path") from error
        whole = text[: text.rfind("\n") + 1]
        lines = list(csv.reader(io.StringIO(whole, newline="")))
        if not lines:
            return []
        if lines[0] != self.columns:
            raise UserError(
                f"{self.path} has the columns {', '.join(lines[0])}, but this run writes {', '.join(self.columns)}: "
                "resume with the settings of its run, or move it away"
            )
        for number, line in enumerate(lines[1:], start=2):
            if len(line) != len(self.columns):
                raise UserError(
                    f"{self.path}, row {number}, has {len(line)} cells, but the header has {len(self.columns)}: "
                    "fix or delete that row"
                )
        return [dict(zip(self.columns, line, strict=True)) for line in lines[1:]]

    def _rewrite(self, keep: Callable[[dict[str, str]], bool]) -> int:
        """Keeps the header and selected rows, atomically if anything changes; returns the number of removed rows."""
        rows = self.read()
        kept = [row for row in rows if keep(row)]
        text = _line(self.columns) + "".join(_line(row.values()) for row in kept)
        if not self.path.exists() or self.path.read_bytes() != text.encode():
            write_atomic(self.path, lambda temporary: temporary.write_bytes(text.encode()))
        return len(rows) - len(kept)


class MetricsCSV(CSVFile):
    """logs/metrics.csv: a row for training every N steps and one for each validation (columns: `metric_columns`)."""

    def truncate_after(self, step: int, epoch: int | None = None) -> int:
        """Drops the rows that a resumed run will write again; the file is replaced atomically.

        Args:
            step: training rows (with `phase` "train") beyond this step are dropped.
            epoch: other rows beyond this epoch are dropped; None compares their `step` too.

        Returns:
            The number of rows dropped.

        Raises:
            UserError: the step or epoch of a row is not a whole number.
        """

        def keep(row: dict[str, str]) -> bool:
            column, last = ("step", step) if row["phase"] == TRAIN or epoch is None else ("epoch", epoch)
            try:
                return int(row[column]) <= last
            except ValueError:
                raise UserError(f"{self.path} has a row with the {column} {row[column]!r}: fix or delete it") from None

        return self._rewrite(keep) if self.enabled else 0


class ScalarsLogger:
    """The Trainer's logger hook: TensorBoard as stock, and each scalar as a row `step, name, value` of a CSV file.

    A resumed run appends: of two rows with the same step and name the later one counts. See `make_csv_logger`.
    """

    def __init__(self, tensorboard: TensorBoardLogger, scalars: CSVFile):
        self.tensorboard = tensorboard
        self.scalars = scalars

    def log(self, name: str, data: Scalar, step: int) -> None:
        """Writes one scalar."""
        self.tensorboard.log(name, data, step)
        self.scalars.write({"step": int(step), "name": name, "value": float(data)})

    def log_dict(self, payload: Mapping[str, Scalar], step: int) -> None:
        """Writes several scalars of one step."""
        for name, data in payload.items():
            self.log(name, data, step)

    def log_hparams(self, hparams: dict[str, Scalar], meters: dict[str, Scalar]) -> None:
        """Hyperparameters go to TensorBoard only."""
        self.tensorboard.log_hparams(hparams, meters)

    def flush(self) -> None:
        """Flushes TensorBoard; the CSV file has no buffer."""
        self.tensorboard.flush()

    def close(self) -> None:
        """Closes TensorBoard's file."""
        self.tensorboard.close()


def make_csv_logger(log_dir: str, csv_path: str, **writer: Any) -> ScalarsLogger:
    """The logger for `trainer.logging.tensorboard_writer._target_`, instead of stock's `make_tensorboard_logger`.

    Args:
        log_dir: TensorBoard's folder.
        csv_path: the scalars' file, such as `${launcher.experiment_log_dir}/logs/scalars.csv`.
        writer: further arguments of TensorBoard's `SummaryWriter`, such as `flush_secs`.
    """
    return ScalarsLogger(make_tensorboard_logger(log_dir, **writer), CSVFile(csv_path, SCALAR_COLUMNS))


def _text(cell: Cell) -> str:
    if cell is None:
        return ""
    return str(cell) if isinstance(cell, Integral | str) else repr(float(cell))  # numpy's own repr includes the type


def _line(cells: Any) -> str:
    buffer = io.StringIO(newline="")
    csv.writer(buffer, lineterminator="\n").writerow(cells)
    return buffer.getvalue()
