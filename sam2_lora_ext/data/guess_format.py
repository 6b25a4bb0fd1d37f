"""Guesses the format of a data set from its files, for tools whose user names only a folder."""

import csv
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from sam2_lora_ext.data.blocks import PLACES, READER_NAMES, describe
from sam2_lora_ext.data.coco import COCOReader
from sam2_lora_ext.data.images import SUFFIXES, ignored
from sam2_lora_ext.data.kaggle import SIZE, KaggleReader
from sam2_lora_ext.data.label_png import LabelPNGReader
from sam2_lora_ext.data.records import Reader
from sam2_lora_ext.data.source import Source
from sam2_lora_ext.data.supervisely import SuperviselyReader
from sam2_lora_ext.utils.errors import UserError
from sam2_lora_ext.utils.files import open_regular, read_json

HEADER = 1 << 16  # bytes of a table that are read to identify it
LABEL_FOLDERS = ("annotations", "labels", "masks", "label", "mask", "gt")


def guess_reader(
    path: str | Path,
    images: str | Path | None = None,
    classes: int | Sequence[str] | dict[int, str] | None = None,
    size: Sequence[int] | None = SIZE,
    split: str | None = None,
    colors: Mapping[int, Sequence[int]] | None = None,
) -> Reader:
    """The reader for a data set on disk; see `guessed`, and the readers for `classes`, `size` [H, W] and `colors`."""
    given = {"classes": classes, "size": size, "colors": colors}
    return guessed(path, images, split, given).make_reader()


def guessed(
    path: str | Path,
    images: str | Path | None = None,
    split: str | None = None,
    given: Mapping[str, Any] | None = None,
    like: Source | None = None,
    **more: Any,
) -> Source:
    """A data set on disk, whose format is guessed from its files.

    Args:
        path: see `guess_format`.
        images: see `guess_format`.
        split: of a Supervisely project.
        given: arguments of the reader: classes, size, colors, exif. Only Kaggle's csv uses a size.
        like: a run's source, which provides the class table and, for the same format, the settings that `given` lacks.
        **more: fields of the source, such as bits.

    Raises:
        UserError: no format or several formats fit, or there are colors for another format.
    """
    kind, places = guess_format(path, images, split)
    settings = {key: value for key, value in (given or {}).items() if value is not None or key == "size"}
    if kind is not KaggleReader:
        settings.pop("size", None)
    if kind is not LabelPNGReader and "colors" in settings:
        raise UserError(f"colors are for label images, but {path} is {READER_NAMES[kind.__name__]}: leave them out")
    if "colors" in settings and "classes" not in settings:
        settings["classes"] = {number: f"defect_{number}" for number in settings["colors"]}
    if like is not None:
        same = like.settings if like.format == kind.__name__ else {}
        same = {key: value for key, value in same.items() if key not in places}
        settings = {**same, "classes": like.class_names(), **settings}
    return Source(
        origin=f"{path} (format guessed)",
        data=describe({"_target_": kind.__name__, **places}),
        places={key: place for key, place in places.items() if key in PLACES},
        make_reader=cache(lambda: kind(**places, **settings)),
        settings=settings,
        format=kind.__name__,
        **more,
    )


def guess_format(
    path: str | Path, images: str | Path | None = None, split: str | None = None
) -> tuple[type, dict[str, Any]]:
    """The reader's class for a data set on disk, and its arguments with the paths of the data.

    Args:
        path: a Kaggle csv, a COCO JSON, or a folder that contains such a file, Supervisely's `img` and `ann` (or splits
            with these), or images and a folder of label images.
        images: the image folder, unless it is in the folder of the annotations.
        split: of a Supervisely project.

    Raises:
        UserError: no format or several formats fit.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix.lower() not in (".csv", ".json"):
            raise UserError(
                f"{path} is neither a Kaggle csv nor a COCO json; name one of them, or the data set's folder"
            )
        folder = Path(images) if images is not None else image_folder(path.parent)
        if path.suffix.lower() == ".csv":
            return KaggleReader, {"image_dir": folder, "csv": path}
        return COCOReader, {"image_dir": folder, "json": path}
    if not path.is_dir():
        there = f"{path} is a pipe or a device, not a file" if path.exists() else f"there is no {path}"
        raise UserError(f"{there}; name a data set's folder, its csv or its json")
    if split is not None or any(path.glob("img")) or any(path.glob("*/img")):
        if images is not None:
            raise UserError(f"a Supervisely project has its own images: leave out {images}")
        return SuperviselyReader, {"root": path, "split": split}
    candidates = sorted(path.glob("*.csv")) + sorted(path.glob("*.json"))
    tables = [table for table in candidates if (_is_kaggle if table.suffix == ".csv" else _is_coco)(table)]
    if len(tables) > 1:
        tables = [table for table in tables if table.stem == "train"] or tables
    if len(tables) > 1:
        raise UserError(
            f"{path} has several annotation files ({', '.join(table.name for table in tables)}); name one of them"
        )
    if tables:
        return guess_format(tables[0], images)
    labels = [path / name for name in LABEL_FOLDERS if (path / name).is_dir()]
    if len(labels) == 1:
        folder = images if images is not None else image_folder(path, labels[0])
        return LabelPNGReader, {"image_dir": folder, "label_dir": labels[0]}
    raise UserError(
        f"{path} has no annotations of a known format: no csv of Kaggle, no json of COCO, no folders img and ann "
        f"(Supervisely), no folder of label images ({', '.join(LABEL_FOLDERS)})"
        + (f"; name the file to see what is wrong with {candidates[0].name}" if candidates else "")
    )


def image_folder(parent: Path, *others: Path) -> Path:
    """The image folder in `parent`; `others` are its annotation folders."""
    named = [parent / name for name in ("train_images", "images", "img", "imgs") if (parent / name).is_dir()]
    if named:
        return named[0]
    try:
        folders = sorted(folder for folder in parent.iterdir() if folder.is_dir() and folder not in others)
    except OSError as error:
        raise UserError(f"cannot list {parent}: {error.strerror}; check its permissions, or name the images") from error
    holding = [folder for folder in folders if _holds_images(folder)]
    if not holding and _holds_images(parent):
        return parent
    if len(holding) != 1:
        raise UserError(
            f"cannot tell which folder in {parent} has the images "
            f"({', '.join(folder.name for folder in holding) or 'none has any'}); "
            "name it"
        )
    return holding[0]


def _holds_images(folder: Path) -> bool:
    try:
        return any(entry.suffix.lower() in SUFFIXES and not ignored(entry.name) for entry in folder.iterdir())
    except OSError:  # unreadable folders are not candidates
        return False


def _is_kaggle(path: Path) -> bool:
    try:
        with open_regular(path) as file:
            first = file.readline(HEADER).decode("utf-8-sig")
        header = {field.strip() for field in next(csv.reader([first]), [])}
    except (UserError, UnicodeDecodeError, csv.Error):
        return False
    return "EncodedPixels" in header


def _is_coco(path: Path) -> bool:
    try:
        content = read_json(path)
    except UserError:
        return False
    return isinstance(content, dict) and {"images", "annotations"} <= set(content)
