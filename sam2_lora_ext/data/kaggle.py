"""Kaggle's Severstal tables, new (`ImageId,ClassId,EncodedPixels`) and old (`ImageId_ClassId,EncodedPixels`).

An image without a mask in the table is clean, unless an unreadable row may belong to it. If an old table has rows for
empty masks, every image must have a row for each class. The field of an empty mask may be empty, NaN, -1, `0 0` or
`1 1`. Several rows of one image and class are united if they do not overlap.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from sam2_lora_ext.data.images import ImageError, list_images, not_taken, probe, turning
from sam2_lora_ext.data.kaggle_table import BadRow, KaggleTable, Row
from sam2_lora_ext.data.near_names import NearNames
from sam2_lora_ext.data.records import (
    ImageRecord,
    Note,
    Problem,
    Unread,
    class_table,
    describe_classes,
    shorten,
)
from sam2_lora_ext.data.rle import NO_RUNS, RLEError, is_absent, parse_rle, union_runs

SIZE = (256, 1600)  # rows and columns of every image of Severstal


class KaggleReader:
    """Reads an image folder and its csv.

    Args:
        image_dir: the folder of the images.
        csv: the table; its header determines its format.
        classes: class names or their count; None for Severstal's four.
        size: [H, W] that every image must have, since an RLE does not contain its image's size; None accepts any size.
        full_check: decode every image instead of checking its header and end.
        exif: turn images upright by their orientation tag; False reads them as stored.
    """

    instances = False

    def __init__(
        self,
        image_dir: str | Path,
        csv: str | Path,
        classes: int | Sequence[str] | dict[int, str] | None = None,
        size: Sequence[int] | None = SIZE,
        full_check: bool = False,
        exif: bool = True,
    ):
        self.image_dir = Path(image_dir)
        self.csv = Path(csv)
        self.class_names = class_table(classes)
        self.size = None if size is None else tuple(int(length) for length in size)
        self.full_check = full_check
        self.exif = exif

    def files(self) -> list[Path]:
        return [self.csv]

    def inputs(self) -> list[Path]:
        return [self.image_dir, self.csv]

    def records(self) -> Iterator[ImageRecord | Problem | Note | Unread]:
        names = list_images(self.image_dir)
        records: dict[str, ImageRecord] = {}
        for name in names:
            try:
                height, width, special = probe(self.image_dir / name, self.full_check, self.exif)
                if self.size is not None and (height, width) != self.size:
                    raise ImageError(
                        "image size",
                        f"the image is {width}x{height}, but {self.size[1]}x{self.size[0]} is "
                        "expected; replace it or set the reader's size"
                        + turning(self.image_dir / name, exif=self.exif),
                    )
                records[name] = ImageRecord(name, height, width, special=special)
            except ImageError as error:
                yield Problem(str(self.image_dir / name), None, error.cause, str(error), name)
        table, rows = KaggleTable(self.csv), _Rows(self, names, records)
        for row in table.rows():
            problem = rows.spoil(row) if isinstance(row, BadRow) else rows.take(row)
            if problem is not None:
                yield problem
        yield from rows.settle(table.old)
        yield from records.values()
        yield from not_taken(self.image_dir, names, [self.csv])


class _Rows:
    """Collects the masks of all rows, and the images that may have lost some.

    Args:
        reader: of the table.
        names: all images of the folder.
        records: of the readable images; the masks are added to them.
    """

    def __init__(self, reader: KaggleReader, names: Sequence[str], records: dict[str, ImageRecord]):
        self.csv, self.folder, self.class_names = str(reader.csv), reader.image_dir, reader.class_names
        self.names, self.records, self.near = set(names), records, NearNames(names)
        self.missing: set[str] = set()  # named in the table but missing in the folder
        self.seen: dict[tuple[str, int | None], list[tuple[int, np.ndarray]]] = {}  # (row, runs) of image and class
        self.before: list[str] = []  # the image of the last good row
        self.doubt = False  # any image may have lost a row

    def spoil(self, row: BadRow) -> Problem:
        """Records an unusable row: its image becomes incomplete, or if it names none, all images do."""
        images = sorted({name.strip() for name in row.names} & self.names)
        images = images or next(filter(None, map(self.near.find, row.names)), [])
        self.doubt = self.doubt or row.doubt or not images
        self._not_whole(images or self.before)  # a row without a name may be the torn-off end of the previous one
        where = f"; its image is {shorten(images)}" if images else "; no image without a good row counts as clean"
        return Problem(self.csv, row.line, row.cause, row.sentence + where, images[0] if images else None)

    def take(self, row: Row) -> Problem | None:
        """Adds the mask of a row to its record, or reports a problem."""
        name = row.name
        self.before = [name]
        if name in self.names:
            cause, sentence = self._add(row) if name in self.records else (None, "")  # the image itself is reported
            if cause is None:
                return None
            self._not_whole([name])
            return Problem(self.csv, row.line, cause, sentence, name)
        if images := self.near.find(name):
            self._not_whole(images)
            sentence = f"the row names {name}, but the folder has {shorten(images)}: correct the id"
            return Problem(self.csv, row.line, "image id", sentence, images[0])
        if name in self.missing:
            return None
        self.missing.add(name)
        if any(sign < " " or sign == '"' for sign in name):
            self.doubt = True
            sentence = f"{name!r} is not the name of an image; correct it (no image without a good row counts as clean)"
            return Problem(self.csv, row.line, "image id", sentence)
        if "/" in name or "\\" in name or name in (".", ".."):
            sentence = f"{name!r} is not a plain file name; images are directly in {self.folder}"
            return Problem(self.csv, row.line, "path in name", sentence)
        sentence = f"the image {name} is not in {self.folder}; add it or remove the row"
        return Problem(self.csv, row.line, "image missing", sentence, name)

    def _add(self, row: Row) -> tuple[str | None, str]:
        """Adds a row of an existing image; returns the cause and the sentence if it cannot be used, else None."""
        record, name = self.records[row.name], row.name
        absent = is_absent(row.rle)
        number = None
        if not (absent and is_absent(row.class_text)):  # such a row states that its image is clean
            number = _class_number(row.class_text)
            if number not in self.class_names:
                known = describe_classes(self.class_names)
                return "unknown class", f"class {row.class_text!r} of {name} is unknown; the classes are {known}"
        earlier = self.seen.setdefault((name, number), [])
        what = f"{name} {'without a class' if number is None else f'class {number}'}"
        if earlier and (absent or not len(earlier[0][1])):
            return "duplicate row", f"{what} is already in row {earlier[0][0]}; keep one of them"
        try:
            runs = NO_RUNS if absent else parse_rle(row.rle, record.height, record.width)
        except RLEError as error:
            return error.cause, f"{name} class {row.class_text}: {error}"
        for line, other in earlier:
            if union_runs([runs, other])[:, 1].sum() < runs[:, 1].sum() + other[:, 1].sum():
                return (
                    "rows overlap",
                    f"the mask of {what} overlaps that of row {line}; rows of one image and class are united only "
                    "where they do not overlap: keep one of them, or write their union",
                )
        earlier.append((row.line, runs))
        return None, ""

    def settle(self, old: bool) -> Iterator[Problem | Note]:
        """Unites the rows of each image and class, and marks incomplete images."""
        united = 0
        stated: dict[str, set[int]] = {}  # image -> classes with a good row
        cleared = {name for (name, number), rows in self.seen.items() if number is None and rows}
        absences = False
        for (name, number), rows in self.seen.items():
            if number is None or not rows:
                continue
            stated.setdefault(name, set()).add(number)
            absences = absences or not len(rows[0][1])
            united += len(rows) > 1
            if len(rows[0][1]):
                self.records[name].masks.append((number, union_runs([runs for _, runs in rows])))
        if united:
            yield Note(f"{self.csv}: {united} masks are the union of several rows of one image and class")
        expected = set().union(*stated.values()) if old and absences else None
        for name, record in self.records.items():
            lacking = set() if expected is None else expected - stated.get(name, set())
            if lacking and record.complete and name not in cleared:
                record.complete = False
                yield Problem(
                    self.csv,
                    None,
                    "row missing",
                    f"{name} has no row for class {', '.join(map(str, sorted(lacking)))}, but the table has rows for "
                    "empty masks; add the rows, or fetch the table again if it is cut off",
                    name,
                )
            elif self.doubt and (lacking or expected is None) and not (name in cleared and not record.masks):
                record.complete = False

    def _not_whole(self, images: Iterable[str]) -> None:
        for name in images:
            if name in self.records:
                self.records[name].complete = False


def _class_number(text: str) -> int | None:
    """3 for `3` and for pandas' `3.0`, else None."""
    try:
        number = float(text)
    except ValueError:
        return None
    return int(number) if number == number and number.is_integer() else None
