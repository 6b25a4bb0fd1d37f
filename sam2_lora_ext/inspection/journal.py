"""The journal of an inspection, `records.jsonl`, with a line for each strip, so that it resumes where it stopped.

The first line has the model and settings. If a strip has several lines, the last one is valid. An incomplete last line,
as after a kill, is dropped. Only one process can open the file at a time.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from sam2_lora_ext.data.rle import format_rle, parse_rle
from sam2_lora_ext.inspection.objects import Found
from sam2_lora_ext.utils.errors import UserError

NAME = "records.jsonl"


@dataclass(frozen=True)
class Record:
    """The result of one strip.

    Args:
        name: of the file.
        path: of the file when it was inspected.
        state: its size in bytes and modification time in nanoseconds.
        height: H.
        width: W.
        scores: presence score of each class.
        objects: (class, score, area, box, Kaggle's run-length text) of each defect.
        milliseconds: of the model and the decision.
        error: why it could not be inspected; None if it was.
    """

    name: str
    path: str
    state: tuple[int, int]
    height: int = 0
    width: int = 0
    scores: Sequence[float] = ()
    objects: Sequence[tuple[int, float, int, tuple[int, ...], str]] = field(default=())
    milliseconds: float = 0.0
    error: str | None = None

    def runs(self, place: int) -> np.ndarray:
        """The pixels of an object, int32 [R, 2]."""
        return parse_rle(self.objects[place][4], self.height, self.width)


def row_of(found: Found) -> tuple[int, float, int, tuple[int, ...], str]:
    """An object in the form that a record stores."""
    return found.class_id, round(found.score, 6), found.area, found.box, format_rle(found.runs)


class Journal:
    """The journal in a folder, open for writing and locked until the end of a `with` block.

    Args:
        folder: created if missing.
        facts: the model and settings; a journal with other facts is an error.
        force: start a new journal.

    Raises:
        UserError: the folder contains something else or another model's inspection, or another process uses it.
    """

    def __init__(self, folder: Path, facts: dict[str, Any], force: bool):
        self.path = folder / NAME
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file: --out must name the folder of the results")
        if not self.path.is_file() and folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"{folder} is not empty and has no inspection (no {NAME}): choose another folder")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.file: IO[bytes] = open(self.path, "a+b")
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror or error}; check the folder") from error
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.close()
            raise UserError(f"another inspection writes to {folder}: wait for it, or choose another --out") from None
        except OSError:
            pass  # a file system without locks
        self._begin(json.loads(json.dumps(facts)), force)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def _begin(self, facts: dict[str, Any], force: bool) -> None:
        """Reads the records, drops an incomplete last line, and compares or writes the facts."""
        self.places: dict[str, tuple[int, tuple[int, int], str, bool]] = {}  # name -> offset, state, path, whether bad
        known, end = None, 0
        self.file.seek(0)
        for line in () if force else self.file:
            try:
                value = json.loads(line) if line.endswith(b"\n") else None
            except (ValueError, RecursionError):
                value = None
            if known is None and line.endswith(b"\n") and not isinstance(value, dict):
                raise UserError(f"{self.path} is not a journal of an inspection: choose another --out")
            if value is None:
                break
            if known is None:
                known = value
            else:
                self._note(_record(value, self.path), end)
            end += len(line)
        self.file.truncate(end)
        if known is None:
            self._append(facts)
        elif known != facts:
            other = next((key for key in facts if known.get(key) != facts[key]), "version")
            raise UserError(
                f"{self.path.parent} has an inspection with another {other}: choose another --out, or "
                "give --force to start again"
            )

    def _note(self, record: Record, offset: int) -> None:
        self.places[record.name] = offset, record.state, record.path, record.error is not None

    def _append(self, value: dict[str, Any]) -> int:
        """Writes a line and returns its offset."""
        self.file.seek(0, os.SEEK_END)
        offset = self.file.tell()
        try:
            self.file.write(json.dumps(value, allow_nan=False).encode() + b"\n")
            self.file.flush()
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror or error}; check the disk space") from error
        return offset

    def add(self, record: Record) -> None:
        """Appends a strip."""
        self._note(record, self._append(asdict(record)))

    def state(self, name: str) -> tuple[int, int] | None:
        """Size and modification time of the file of that name when it was inspected; None if it was not."""
        return self.places[name][1] if name in self.places else None

    def path_of(self, name: str) -> str | None:
        """The path of the file of that name; None if it was not inspected."""
        return self.places[name][2] if name in self.places else None

    def failed(self, name: str) -> bool:
        """Whether the file of that name could not be inspected."""
        return name in self.places and self.places[name][3]

    def records(self) -> Iterator[Record]:
        """The last record of each strip, by name."""
        for name in sorted(self.places):
            self.file.seek(self.places[name][0])
            yield _record(json.loads(self.file.readline()), self.path)


def _record(value: Any, where: Path) -> Record:
    try:
        record = Record(**{**value, "state": tuple(value["state"])})
        rows = [tuple(map(type, row)) for row in record.objects]
        whole = (*record.state, record.height, record.width)
        fits = {tuple(map(type, whole)) == (int,) * 4, {str} >= {type(record.name), type(record.path)}}
        fits |= {row == (int, float, int, list, str) for row in rows}
        fits |= {{float} >= set(map(type, record.scores)), isinstance(record.error, str | None)}
    except (TypeError, KeyError) as error:
        raise UserError(f"{where} is damaged: a line is not a record; give --force to start again") from error
    if not all(fits):
        raise UserError(f"{where} is damaged: a record has invalid values; give --force to start again")
    return record
