"""Inspects image files one by one, from a list or a watched folder; unreadable files are reported and skipped.

The next file is read while the model works. Each result is written to the journal before the next strip.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from sam2_lora_ext.data.images import SUFFIXES, ImageError, ignored, list_images, probe, read_rgb
from sam2_lora_ext.inspection.journal import Journal, Record, row_of
from sam2_lora_ext.inspection.prelabels import Prelabels, inspection_row
from sam2_lora_ext.inspection.segmenter import Segmenter
from sam2_lora_ext.utils.csv_text import csv_text
from sam2_lora_ext.utils.errors import UserError

POLL = 0.5  # seconds between listings of a watched folder
SELDOM = 20  # writing the tables of all strips may take at most 1 / SELDOM of the time
BAD = (ImageError, UserError, OSError, MemoryError, torch.OutOfMemoryError)


@dataclass
class Tally:
    """Counts of a call."""

    defective: int = 0
    clean: int = 0
    bad: int = 0
    seconds: float = 0.0  # of the model and the decision
    reason: str = ""  # of the last bad file

    @property
    def inspected(self) -> int:
        """Strips with a decision."""
        return self.defective + self.clean


def find_images(paths: Sequence[str | Path], journal: Journal) -> list[Path]:
    """The given image files and those in given folders, without files that were inspected and have not changed since.

    Raises:
        UserError: a file does not exist, or two files would have the same names of results.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            files += [path / name for name in list_images(path)]
        elif path.exists():
            files.append(path)
        else:
            raise UserError(f"there is no {path}: give image files or folders of them")
    stems: dict[str, str] = {Path(name).stem: journal.path_of(name) for name in journal.places}
    unique = list(dict.fromkeys(Path(os.path.abspath(file)) for file in files))
    for file in unique:
        other = stems.setdefault(file.stem, str(file))
        if other != str(file):
            raise UserError(f"the results of {file} and {other} would have the same names: use another --out for one")
    return [file for file in unique if journal.failed(file.name) or journal.state(file.name) != state_of(file)]


def state_of(path: Path) -> tuple[int, int]:
    """A file's size in bytes and modification time in nanoseconds; zeros if it is gone."""
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_size, found.st_mtime_ns


def watch(folder: Path, journal: Journal, idle: float | None = None, poll: float = POLL) -> Iterator[Path | None]:
    """Yields new image files in a folder once they are the same in two listings, and None if there are none.

    Args:
        folder: listed every `poll` seconds; hidden files are ignored.
        journal: of earlier inspections; changed files, and files that could not be inspected, are yielded again.
        idle: end after so many seconds without a new file; None continues until Ctrl-C.
        poll: in seconds.

    Raises:
        UserError: there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder} to watch: create it first")
    folder, seen, last = Path(os.path.abspath(folder)), {}, time.monotonic()
    again = {name for name in journal.places if journal.failed(name)}  # failed in an earlier call: try once more
    while idle is None or time.monotonic() - last < idle:
        ready = []
        for name in _images_in(folder):
            state = state_of(folder / name)
            if state != journal.state(name) or name in again:
                if seen.get(name) == state:
                    ready.append(name)
                seen[name] = state
        for name in ready:
            yield folder / name
            del seen[name]
            again.discard(name)
            last = time.monotonic()
        if not ready:
            yield None
            time.sleep(poll)


def _images_in(folder: Path) -> list[str]:
    try:
        names = os.listdir(folder)
    except OSError:  # a network share may be unavailable for a moment
        return []
    return sorted(name for name in names if Path(name).suffix.lower() in SUFFIXES and not ignored(name))


class Inspector:
    """Inspects files and writes the results to a folder.

    Args:
        segmenter: the model.
        journal: of the folder.
        prelabels: writes the formats.
        bits: depth of images with more than 8 bits per channel.
        exif: turn images upright by their orientation tag.
    """

    def __init__(self, segmenter: Segmenter, journal: Journal, prelabels: Prelabels, bits: int = 16, exif: bool = True):
        self.segmenter, self.journal, self.prelabels = segmenter, journal, prelabels
        self.bits, self.exif, self.stale = bits, exif, False
        self.owners = {Path(name).stem: name for name in journal.places if not journal.failed(name)}

    def run(self, files: Iterable[Path | None], total: int | None = None, progress: bool = True) -> Tally:
        """Inspects the files and writes the tables, even if Ctrl-C stops it.

        Args:
            files: see `find_images`, `watch`.
            total: number of files, for the progress bar.
            progress: show the bar.

        Raises:
            UserError: a result cannot be written.
        """
        tally, due = Tally(), 0.0
        bar = tqdm(total=total, desc="strips", unit="strip", disable=not progress)
        try:
            self.write_tables()
            with ThreadPoolExecutor(1) as reader, bar:
                for path, read in _ahead(files, lambda file: reader.submit(self._read, file)):
                    if path is not None:
                        self._note(self._inspect(path, *read.result(), tally))
                        bar.update()
                    elif self.stale and time.monotonic() >= due:  # a pause of the line
                        began = time.monotonic()
                        self.write_tables()
                        due = began + SELDOM * (time.monotonic() - began)
        finally:
            if self.stale:
                self.write_tables()
        return tally

    def _note(self, record: Record) -> None:
        """Adds a strip to inspection.csv at once; the other tables are written in a pause or at the end."""
        self.stale = True
        table = self.prelabels.folder / "inspection.csv"
        try:
            with open(table, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(csv_text(inspection_row(record, self.prelabels.class_names), []))
        except OSError as error:
            raise UserError(f"cannot write {table}: {error.strerror or error}; check the disk space") from error

    def write_tables(self) -> None:
        """Writes the files that cover all strips."""
        self.prelabels.write_tables(list(self.journal.records()))
        self.stale = False

    def _read(self, path: Path) -> tuple[tuple[int, int], np.ndarray | Exception]:
        """The state of a file before reading, and its pixels or the error."""
        state = state_of(path)
        try:
            probe(path, exif=self.exif)
            return state, read_rgb(path, self.bits, self.exif)
        except BAD as error:
            return state, error

    def _inspect(self, path: Path, state: tuple[int, int], image: np.ndarray | Exception, tally: Tally) -> Record:
        try:
            if isinstance(image, Exception):
                raise image
            if (owner := self.owners.setdefault(path.stem, path.name)) != path.name:
                raise UserError(f"its results would have the same names as those of {owner}: rename it")
            original = self.prelabels.original(path)
            began = time.perf_counter()
            found = self.segmenter(image)
        except BAD as error:
            tally.bad, tally.reason = tally.bad + 1, f"{path}: {error}"
            tqdm.write(f"not inspected: {tally.reason}")
            record = Record(path.name, str(path), state, error=" ".join(str(error).split()))
        else:
            seconds = time.perf_counter() - began
            tally.seconds += seconds
            tally.defective, tally.clean = tally.defective + bool(found.objects), tally.clean + (not found.objects)
            record = Record(
                path.name,
                str(path),
                state,
                *image.shape[:2],
                found.scores.tolist(),
                [row_of(row) for row in found.objects],
                1000 * seconds,
            )
            try:
                self.prelabels.write_strip(record, image, original)
            except OSError as error:
                raise UserError(f"cannot write to {self.prelabels.folder}: {error.strerror or error}") from error
        self.journal.add(record)
        return record


def _ahead(
    files: Iterable[Path | None], submit: Callable[[Path], Future]
) -> Iterator[tuple[Path, Future] | tuple[None, None]]:
    """Yields each file with its future, once the next file is being read; (None, None) for a pause."""
    waiting = None
    for file in files:
        begun = None if file is None else (file, submit(file))
        if waiting is not None:
            yield waiting
        waiting = begun
        if begun is None:
            yield None, None
    if waiting is not None:
        yield waiting
