"""Kaggle's Severstal tables, new (`ImageId,ClassId,EncodedPixels`) and old (`ImageId_ClassId,EncodedPixels`).

An image of the folder without a mask in the table is clean. A field that says "no mask" may be empty, NaN, -1, `0 0`
or `1 1`. Columns are found by name.
"""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from sam2_lora_ext.data.images import ImageError, list_images, probe
from sam2_lora_ext.data.records import ImageRecord, Problem, class_table, describe_classes
from sam2_lora_ext.data.rle import RLEError, is_absent, parse_rle
from sam2_lora_ext.errors import UserError

FIELD_LIMIT = 1 << 26  # characters of one RLE


class KaggleReader:
    """Reads an image folder and its csv.

    Args:
        image_dir: the folder of the images.
        csv: the table; its format is told by its header.
        classes: class names or their count; None for Severstal's four.
        size: [H, W] that every image must have, since an RLE does not tell its image's size; None takes each as it is.
        full_check: decode every image instead of looking at its header and end.
    """

    instances = False

    def __init__(
        self,
        image_dir: str | Path,
        csv: str | Path,
        classes: int | Sequence[str] | dict[int, str] | None = None,
        size: Sequence[int] | None = (256, 1600),
        full_check: bool = False,
    ):
        self.image_dir = Path(image_dir)
        self.csv = Path(csv)
        self.class_names = class_table(classes)
        self.size = None if size is None else tuple(int(length) for length in size)
        self.full_check = full_check

    def files(self) -> list[Path]:
        return [self.csv]

    def inputs(self) -> list[Path]:
        return [self.image_dir, self.csv]

    def records(self) -> Iterator[ImageRecord | Problem]:
        records = {}
        bad = set()
        for name in list_images(self.image_dir):
            try:
                height, width, deep = probe(self.image_dir / name, self.full_check)
                if self.size is not None and (height, width) != self.size:
                    raise ImageError(
                        "image size",
                        f"the image is {width}x{height}, but {self.size[1]}x{self.size[0]} is "
                        "expected; replace it or set the reader's size",
                    )
                records[name] = ImageRecord(name, height, width, deep=deep)
            except ImageError as error:
                bad.add(name)
                yield Problem(str(self.image_dir / name), None, error.cause, str(error), name)
        seen = {}
        for row, name, class_text, rle in self._rows():
            if isinstance(name, Problem):
                yield name
                continue
            problem = self._take(row, name, class_text, rle, records, bad, seen)
            if problem is not None:
                if name in records:
                    records[name].complete = False
                yield problem
        yield from records.values()

    def _take(
        self,
        row: int,
        name: str,
        class_text: str,
        rle: str,
        records: dict[str, ImageRecord],
        bad: set[str],
        seen: dict[tuple[str, int | None], int],
    ) -> Problem | None:
        """Adds the mask of one row to its record, or says why not."""

        def problem(cause: str, sentence: str) -> Problem:
            return Problem(str(self.csv), row, cause, sentence, name)

        absent = is_absent(rle)
        if absent and is_absent(class_text):  # a clean image written as a row of its own
            number = None
        elif (number := _class_number(class_text)) not in self.class_names:
            return problem(
                "unknown class",
                f"class {class_text!r} of {name} is unknown; the classes are {describe_classes(self.class_names)}",
            )
        if (name, number) in seen:
            what = "without a class" if number is None else f"class {number}"
            return problem(
                "duplicate row", f"{name} {what} stands in row {seen[name, number]} already; keep one of them"
            )
        seen[name, number] = row
        if name in bad:
            return None  # the image itself is reported
        if name not in records:
            if "/" in name or "\\" in name or name in ("", ".", ".."):
                return problem("path in name", f"{name!r} is no plain file name; images lie right in {self.image_dir}")
            bad.add(name)
            return problem("image missing", f"the image {name} is not in {self.image_dir}; add it or remove the row")
        if absent:
            return None
        record = records[name]
        try:
            runs = parse_rle(rle, record.height, record.width)
        except RLEError as error:
            return problem(error.cause, f"{name} class {class_text}: {error}")
        record.masks.append((number, runs))
        return None

    def _rows(self) -> Iterator[tuple[int, str | Problem, str, str]]:
        """(row, image, class, RLE) of each line, or (row, problem, "", "")."""
        limit = csv.field_size_limit(FIELD_LIMIT)
        try:
            with open(self.csv, encoding="utf-8-sig", newline="") as file:
                lines = csv.reader(file, strict=True)
                header = [field.strip() for field in next(lines, [])]
                places = self._places(header)
                for fields in lines:
                    if not any(field.strip() for field in fields):
                        continue
                    if len(fields) != len(header):
                        yield (
                            lines.line_num,
                            Problem(
                                str(self.csv),
                                lines.line_num,
                                "row length",
                                f"the row has {len(fields)} fields, the header "
                                f"has {len(header)} (is the file cut off?)",
                            ),
                            "",
                            "",
                        )
                        continue
                    name, class_text, rle = (fields[place] for place in places)
                    if len(places) == 3 and places[0] == places[1]:  # old format: `name_class`
                        name, _, class_text = name.rpartition("_")
                    yield lines.line_num, name.strip(), class_text.strip(), rle
        except OSError as error:
            raise UserError(f"cannot read the table {self.csv}: {error.strerror}; check the path") from error
        except UnicodeDecodeError as error:
            raise UserError(
                f"the table {self.csv} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8 csv"
            ) from error
        except csv.Error as error:
            yield (
                lines.line_num,
                Problem(
                    str(self.csv),
                    lines.line_num,
                    "csv syntax",
                    f"the table cannot be read on from here ({error}); is it cut off?",
                ),
                "",
                "",
            )
        finally:
            csv.field_size_limit(limit)

    def _places(self, header: list[str]) -> tuple[int, int, int]:
        for wanted in (
            ("ImageId", "ClassId", "EncodedPixels"),
            ("ImageId_ClassId", "ImageId_ClassId", "EncodedPixels"),
        ):
            if all(header.count(column) == 1 for column in wanted):
                return tuple(header.index(column) for column in wanted)
        raise UserError(
            f"the header of {self.csv} is {','.join(header)[:200]!r}, but ImageId,ClassId,EncodedPixels or "
            "ImageId_ClassId,EncodedPixels is expected; rename the columns"
        )


def _class_number(text: str) -> int | None:
    """3 for `3` and for pandas' `3.0`, else None."""
    try:
        number = float(text)
    except ValueError:
        return None
    return int(number) if number == number and number.is_integer() else None
