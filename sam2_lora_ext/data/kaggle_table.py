"""Reads the rows of Kaggle's csv, new and old, one at a time, and reports rows that cannot be read.

Columns are found by name. An unclosed quote may swallow rows, so reading ends at a syntax error or a field with a line
break; a last row without a final line break may be cut off.
"""

import csv
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from sam2_lora_ext.data.records import is_text
from sam2_lora_ext.utils.errors import UserError
from sam2_lora_ext.utils.files import open_regular

FIELD_LIMIT = 1 << 26  # characters of one RLE
LONGEST_NAME = 16  # fields of an unquoted image name with commas
TAIL = 4096  # bytes at the end that are searched for the last line break


@dataclass(frozen=True)
class Row:
    """A row of the table."""

    line: int  # of the file, from 1
    name: str
    class_text: str
    rle: str


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used."""

    line: int
    cause: str
    sentence: str
    names: tuple[str, ...] = ()  # texts of the row that may be its image's name, likeliest first
    doubt: bool = False  # whether other images may have lost rows with it


class KaggleTable:
    """A csv whose header determines its format.

    Args:
        path: the file.
    """

    def __init__(self, path: Path):
        self.path = path
        self.old = False  # one column `image_class`; set when `rows` starts

    def rows(self) -> Iterator[Row | BadRow]:
        """The rows in order, without blank ones.

        Raises:
            UserError: the file cannot be opened, or its header is not Kaggle's.
        """
        limit = csv.field_size_limit(FIELD_LIMIT)
        try:
            with io.TextIOWrapper(open_regular(self.path), "utf-8-sig", "surrogateescape", newline="") as file:
                yield from self._mark_cut(self._parse(csv.reader(file, strict=True)))
        except OSError as error:
            raise UserError(f"cannot read the table {self.path}: {error.strerror}; check the path") from error
        finally:
            csv.field_size_limit(limit)

    def _parse(self, lines: Iterator[list[str]]) -> Iterator[Row | BadRow]:
        try:
            header = [field.strip() for field in next(lines, [])]
        except csv.Error as error:
            raise UserError(f"the header of {self.path} cannot be read ({error}); is it a csv?") from error
        places = self._places(header)
        while True:
            line = lines.line_num + 1
            try:
                fields = next(lines, None)
            except csv.Error as error:
                yield BadRow(
                    line, "csv syntax", f"the table cannot be read from here on ({error}); is it cut off?", doubt=True
                )
                return
            if fields is None:
                return
            if any("\n" in field or "\r" in field for field in fields):
                yield BadRow(
                    line,
                    "csv syntax",
                    f"a field continues to line {lines.line_num}, so a quote is missing and rows may be swallowed; "
                    "correct the quotes (nothing after it is read)",
                    doubt=True,
                )
                return
            if any(field.strip() for field in fields):
                yield self._row(line, fields, len(header), places)

    def _row(self, line: int, fields: list[str], length: int, places: tuple[int, int, int]) -> Row | BadRow:
        first = places[0]
        names = (*(",".join(fields[first:stop]) for stop in range(first + 1, first + LONGEST_NAME)), *fields)
        if self.old:
            names = tuple(part for name in names for part in (name.rpartition("_")[0], name))
        if len(fields) != length:
            sentence = f"the row has {len(fields)} fields, the header has {length} (is the file cut off?)"
            joined = len(fields) >= 2 * length - 1  # two rows without the line break between them
            return BadRow(line, "row length", sentence, names, joined)
        name, class_text, rle = (fields[place] for place in places)
        if self.old:
            name, _, class_text = name.rpartition("_")
        if not all(map(is_text, fields)):
            sentence = "the row is not UTF-8 text; save the table as UTF-8 csv"
            return BadRow(line, "not UTF-8", sentence, (name,) if is_text(name) else ())
        if not name.strip():
            sentence = "the row does not name its image (image_class is expected); complete or remove it"
            if not self.old:
                sentence = "the row does not name its image; complete or remove it"
            return BadRow(line, "no image name", sentence, names if self.old else ())
        return Row(line, name.strip(), class_text.strip(), rle)

    def _mark_cut(self, rows: Iterator[Row | BadRow]) -> Iterator[Row | BadRow]:
        """The rows; the last one is bad if the file's last line has no line break, since later rows may be lost."""
        before: Row | BadRow | None = None
        for row in rows:
            if before is not None:
                yield before
            before = row
        if self._ends_with_a_line():
            yield from () if before is None else (before,)
        elif isinstance(before, BadRow):
            yield replace(before, doubt=True)
        elif before is None:
            yield BadRow(1, "row cut", "the table ends inside its header; fetch it again")
        else:
            sentence = (
                "the last row has no line break at its end, so the file may be cut off inside it; fetch it again, or "
                "end the row with a line break if it is complete"
            )
            yield BadRow(before.line, "row cut", sentence, (before.name,), doubt=True)

    def _ends_with_a_line(self) -> bool:
        """Whether nothing but blanks follows the last line break."""
        with open(self.path, "rb") as file:
            file.seek(max(0, os.path.getsize(self.path) - TAIL))
            tail = file.read()
        return not tail[max(tail.rfind(b"\n"), tail.rfind(b"\r")) + 1 :].strip(b" \t,")

    def _places(self, header: list[str]) -> tuple[int, int, int]:
        for wanted in (
            ("ImageId", "ClassId", "EncodedPixels"),
            ("ImageId_ClassId", "ImageId_ClassId", "EncodedPixels"),
        ):
            if all(header.count(column) == 1 for column in wanted):
                self.old = wanted[0] == wanted[1]
                return tuple(header.index(column) for column in wanted)
        shown = ",".join(header)[:200]
        if not is_text(shown):
            raise UserError(f"the table {self.path} is not UTF-8 text in its header; save it as UTF-8 csv")
        raise UserError(
            f"the header of {self.path} is {shown!r}, but ImageId,ClassId,EncodedPixels or "
            "ImageId_ClassId,EncodedPixels is expected; rename the columns"
        )
