"""Writes inspected strips as annotations that this package's readers and annotation tools can read.

label_png/annotations/X.png        the class number as grey value
coco/annotations.json              RLE, score, area and box of each defect; `polygons.json`: outlines instead
supervisely/                       a project with a copy of the images
submission.csv                     Kaggle's table, a row for each image and class
overlays/X.jpg                     strips with defects, which are outlined
inspection.csv                     a row for each strip
"""

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from sam2_lora_ext.data.index import AnnotationIndex, pack
from sam2_lora_ext.data.instance_writers import write_coco, write_supervisely
from sam2_lora_ext.data.records import ImageRecord
from sam2_lora_ext.data.rle import NO_RUNS, decode_runs, format_rle, union_runs
from sam2_lora_ext.data.writers import write_label_png
from sam2_lora_ext.evaluate.pictures import overlay
from sam2_lora_ext.inspection.journal import Record
from sam2_lora_ext.utils.csv_text import csv_text
from sam2_lora_ext.utils.errors import UserError
from sam2_lora_ext.utils.files import read_json, write_atomic, write_json

PRELABELS = ("label_png", "coco", "supervisely", "kaggle", "overlays")
COLOURS = ((255, 70, 70), (70, 150, 255), (60, 200, 90), (240, 150, 40), (200, 90, 230), (40, 200, 200))
KAGGLE = ("ImageId", "ClassId", "EncodedPixels")


def index_of(records: Iterable[Record], class_names: dict[int, str], exif: bool = True) -> AnnotationIndex:
    """The annotations of inspected strips; every defect is an instance, numbered from 1 across all strips."""
    rows, number = [], 0
    for record in records:
        row = ImageRecord(record.name, record.height, record.width)
        for place, (class_id, *_) in sorted(enumerate(record.objects), key=lambda item: item[1][0]):
            number += 1
            row.add(int(class_id), record.runs(place), number)
        rows.append(row)
    return replace(pack(rows, ".", class_names, exif=exif), instances=True)


class Prelabels:
    """Writes the found defects to a folder.

    Args:
        folder: of the inspection.
        formats: some of `PRELABELS`.
        class_names: class id -> name, ascending.
    """

    def __init__(self, folder: Path, formats: Sequence[str], class_names: dict[int, str]):
        self.folder, self.formats, self.class_names = folder, formats, class_names
        self.colours = {number: COLOURS[place % len(COLOURS)] for place, number in enumerate(class_names)}
        for name, inner in (("label_png", "annotations"), ("supervisely", "train/ann"), ("supervisely", "train/img")):
            if name in formats:
                (folder / name / inner).mkdir(parents=True, exist_ok=True)

    def original(self, path: Path) -> bytes | None:
        """The contents of an image file that a format needs next to its annotations."""
        return path.read_bytes() if "supervisely" in self.formats else None

    def write_strip(self, record: Record, image: np.ndarray, original: bytes | None) -> None:
        """Writes the files of one strip, uint8 [H, W, 3], whose file has the contents `original`."""
        index = index_of([record], self.class_names)
        if "label_png" in self.formats:
            write_label_png(index, [record.name], self.folder / "label_png", False)
        if original is not None:
            kept = self.folder / "supervisely/train/img" / record.name
            write_atomic(kept, lambda path: path.write_bytes(original))
            write_supervisely(index, [record.name], self.folder / "supervisely", False)
        drawn = self.folder / "overlays" / f"{Path(record.name).stem}.jpg"
        if "overlays" in self.formats and record.objects:
            picture = Image.fromarray(self.draw(record, image))
            write_atomic(drawn, lambda path: picture.save(path, format="JPEG", quality=92))
        else:
            drawn.unlink(missing_ok=True)  # an overlay from an earlier file of this name

    def draw(self, record: Record, image: np.ndarray) -> np.ndarray:
        """The strip with its defects tinted and outlined in the colours of their classes."""
        for class_id in self.class_names:
            if len(runs := _runs_of(record, class_id)):
                mask = decode_runs(runs, record.height, record.width) > 0
                image = overlay(image, np.ascontiguousarray(mask), self.colours[class_id])
        return image

    def write_tables(self, records: Sequence[Record]) -> None:
        """Writes the files that cover all strips."""
        good = [record for record in records if record.error is None]
        self._text(
            "inspection.csv",
            inspection_header(self.class_names),
            [inspection_row(record, self.class_names) for record in records],
        )
        if "kaggle" in self.formats:
            rows = [
                (record.name, number, format_rle(_runs_of(record, number)))
                for record in good
                for number in self.class_names
            ]
            self._text("submission.csv", KAGGLE, rows)
        if "coco" in self.formats:
            self._coco(good)

    def _text(self, name: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        text = csv_text(header, rows)
        write_atomic(self.folder / name, lambda path: path.write_text(text, "utf-8", "backslashreplace"))

    def _coco(self, records: Sequence[Record]) -> None:
        """Writes the RLE and score of each defect, and a second file with outlines for tools without RLE."""
        folder = self.folder / "coco"
        made = folder / ".new"
        made.mkdir(parents=True, exist_ok=True)
        index = index_of(records, self.class_names)
        write_coco(index, index.names(), made, False)
        content = read_json(made / "annotations.json")
        shutil.rmtree(made)
        rows = [row for record in records for row in sorted(record.objects, key=lambda row: row[0])]
        for annotation in content["annotations"]:
            annotation["score"] = rows[annotation["id"] - 1][1]
        write_json(folder / "annotations.json", content)
        outlined = []
        for annotation, runs in zip(content["annotations"], _runs(index), strict=True):
            if outline := outlines(runs, *annotation["segmentation"]["size"]):
                outlined.append({**annotation, "segmentation": outline})
        write_json(folder / "polygons.json", {**content, "annotations": outlined})


def _runs(index: AnnotationIndex) -> list[np.ndarray]:
    return [index.runs[slice(*index.run_offsets[mask : mask + 2])] for mask in range(len(index.mask_class))]


def _runs_of(record: Record, class_id: int) -> np.ndarray:
    """The pixels of a class."""
    own = [record.runs(place) for place, row in enumerate(record.objects) if row[0] == class_id]
    return union_runs(own) if own else NO_RUNS


def outlines(runs: np.ndarray, height: int, width: int) -> list[list[float]]:
    """Polygons [x, y, x, y, ...] around the parts of a mask, holes filled, without contours of under three points."""
    mask = np.ascontiguousarray(decode_runs(runs, height, width))
    contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    return [contour.reshape(-1).astype(float).tolist() for contour in contours if len(contour) >= 3]


def inspection_header(class_names: dict[int, str]) -> list[str]:
    """Columns of inspection.csv: score, area in pixels and number of defects for each class."""
    columns = [f"{name}_{what}" for name in class_names.values() for what in ("score", "area", "objects")]
    return ["image", "decision", *columns, "milliseconds", "error"]


def inspection_row(record: Record, class_names: dict[int, str]) -> list[Any]:
    """A strip's row; its decision is "clean", the names of its classes joined by "+", or "unknown" after an error."""
    cells: list[Any] = []
    found = []
    for place, (number, name) in enumerate(class_names.items()):
        own = [row for row in record.objects if row[0] == number]
        score = round(record.scores[place], 4) if record.scores else ""
        cells += [score, sum(row[2] for row in own), len(own)] if record.error is None else ["", "", ""]
        found += [name] if own else []
    decision = "unknown" if record.error is not None else "+".join(found) or "clean"
    return [record.name, decision, *cells, round(record.milliseconds, 2), record.error or ""]


def check_formats(text: str, exclusive: bool, class_ids: Sequence[int]) -> tuple[str, ...]:
    """The formats named by a text such as `coco,kaggle` or `all`.

    Raises:
        UserError: there is no such format, or label images cannot represent the classes.
    """
    names = PRELABELS if text == "all" else tuple(part.strip() for part in text.split(",") if part.strip())
    if wrong := next((name for name in names if name not in PRELABELS), None):
        raise UserError(f"--formats must be {', '.join(PRELABELS)} or all, got {wrong!r}")
    if "label_png" in names and not exclusive:
        raise UserError("label images cannot represent overlapping classes: leave label_png out of --formats")
    if "label_png" in names and max(class_ids) > 255:
        raise UserError(f"label images hold class ids up to 255, got {max(class_ids)}: leave label_png out")
    return names
