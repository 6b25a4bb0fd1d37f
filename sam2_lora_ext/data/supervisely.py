"""Supervisely (Dataset Ninja) folders: `{split}/img/X.jpg` with `{split}/ann/X.jpg.json`, classes in `meta.json`.

An object is a bitmap: base64 of a PNG (zlib-compressed or not) whose top left corner stands at `origin` = [x, y].
"""

import base64
import binascii
import io
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sam2_lora_ext.data.decode import decode
from sam2_lora_ext.data.images import ImageError, ignored, list_images, probe, turning
from sam2_lora_ext.data.records import MOST_CLASSES, ImageRecord, InvalidData, Problem, class_table, describe_classes
from sam2_lora_ext.data.rle import encode_mask
from sam2_lora_ext.errors import UserError

LARGEST = 1 << 26  # bytes of a bitmap's PNG: a few base64 letters can say that there are gigabytes
SPLIT_SUFFIXES = ("", "_images", "_split")  # `train`, `train_images`, `train_split`


class SuperviselyReader:
    """Reads one split of a Supervisely project, or all of them.

    Args:
        root: the project folder, or a split's folder (that holds `img` and `ann`).
        split: "train", "val", "test" ... also where the folder is named `train_images` or `train_split`; None takes
            `root` itself if it is a split, else all its splits (images are then named `train/img/X.jpg`).
        classes: class titles or their count; None takes them from `meta.json`: the number that each title ends with,
            or if they do not all have one then their order; without the file Severstal's four.
        full_check: decode every image instead of looking at its header and end.
        exif: turn images upright by their orientation tag; False takes them as stored.
    """

    def __init__(
        self,
        root: str | Path,
        split: str | None = None,
        classes: int | Sequence[str] | dict[int, str] | None = None,
        full_check: bool = False,
        exif: bool = True,
    ):
        self.root = Path(root)
        self.split = split
        self.full_check = full_check
        self.exif = exif
        self.folders = self._folders()
        self.image_dir = self.folders[0] / "img" if len(self.folders) == 1 else self.root
        meta = next((path for path in (self.root / "meta.json", self.root.parent / "meta.json") if path.exists()), None)
        self.class_names = class_table(classes) if classes is not None or meta is None else meta_classes(meta)
        self._meta = [] if meta is None else [meta]

    def _folders(self) -> list[Path]:
        def is_split(folder: Path) -> bool:
            return (folder / "img").is_dir() and (folder / "ann").is_dir()

        if self.split is not None:
            folders = [self.root / (self.split + suffix) for suffix in SPLIT_SUFFIXES]
            folders = [folder for folder in folders if is_split(folder)][:1]
        elif is_split(self.root):
            folders = [self.root]
        else:
            folders = sorted(path for path in self.root.glob("*") if is_split(path))
        if not folders:
            known = ", ".join(sorted(path.name for path in self.root.glob("*") if is_split(path))) or "none"
            raise UserError(
                f"{self.root} has no split {self.split or ''!r} with the folders img and ann; it has {known}"
            )
        return folders

    def files(self) -> list[Path]:
        return self._meta + [path for folder in self.folders for path in sorted((folder / "ann").glob("*.json"))]

    def inputs(self) -> list[Path]:
        return [*self._meta, *self.folders]

    def records(self) -> Iterator[ImageRecord | Problem]:
        numbers = {title: number for number, title in self.class_names.items()}
        for folder in self.folders:
            names = list_images(folder / "img")
            for name in names:
                path = folder / "img" / name
                shown = str(path.relative_to(self.image_dir))
                try:
                    height, width, special = probe(path, self.full_check, self.exif)
                except ImageError as error:
                    yield Problem(str(path), None, error.cause, str(error), shown)
                    continue
                record = ImageRecord(shown, height, width, special=special)
                for problem in self._read(folder / "ann" / f"{name}.json", record, numbers):
                    record.complete = False
                    yield problem
                yield record
            for path in sorted((folder / "ann").glob("*.json")):
                if path.name.removesuffix(".json") not in names and not ignored(path.name):
                    yield Problem(
                        str(path),
                        None,
                        "image missing",
                        f"there is no image {path.name.removesuffix('.json')} in "
                        f"{folder / 'img'}; add it or remove the annotation",
                    )

    def _read(self, path: Path, record: ImageRecord, numbers: dict[str, int]) -> Iterator[Problem]:
        """Adds the masks of one annotation file to its record."""

        def problem(cause: str, sentence: str, row: int | None = None) -> Problem:
            return Problem(str(path), row, cause, sentence, record.name)

        try:
            annotation = json.loads(path.read_text(encoding="utf-8-sig"))
            objects, size = annotation["objects"], annotation.get("size")
            declared = (int(size["height"]), int(size["width"])) if size else (record.height, record.width)
            if not isinstance(objects, list):
                raise TypeError("objects is no list")
        except FileNotFoundError:
            yield problem(
                "annotation missing",
                f"the image {record.name} has no annotation; add one (objects: [] if it is clean) or remove the image",
            )
            return
        except OSError as error:
            yield problem("annotation unreadable", f"the file cannot be read ({error.strerror}); check its permissions")
            return
        except (ValueError, RecursionError) as error:  # no JSON, or no UTF-8
            yield problem("not JSON", f"the file is no JSON ({error}); is it cut off?")
            return
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            yield problem(
                "JSON without objects",
                f"the annotation has no list `objects` or a wrong `size` ({error!r}); export it again",
            )
            return
        if declared != (record.height, record.width):
            yield problem(
                "image size",
                f"the annotation is for {declared[1]}x{declared[0]}, the image is "
                f"{record.width}x{record.height}; they must be equal"
                + turning(self.image_dir / record.name, exif=self.exif),
            )
            return
        for row, entry in enumerate(objects, 1):
            try:
                title = entry["classTitle"]
                if title not in numbers:
                    raise BitmapError(
                        "unknown class",
                        f"the class {title!r} is unknown; the classes are {describe_classes(self.class_names)}",
                    )
                mask = place_bitmap(entry, record.height, record.width)
                record.masks.append((numbers[title], encode_mask(mask)))
            except BitmapError as error:
                yield problem(error.cause, f"object {row}: {error}", row)
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                yield problem(
                    "object fields", f"object {row} lacks a field or has a wrong one ({error!r}); export it again", row
                )


class BitmapError(InvalidData):
    """A bitmap that cannot be used."""


def place_bitmap(entry: dict[str, Any], height: int, width: int) -> np.ndarray:
    """The mask bool [height, width] of one object; what reaches over the border is cut.

    Raises:
        BitmapError: another geometry, invalid base64, no PNG, or no pixel inside the image.
    """
    if "bitmap" not in entry:
        raise BitmapError(
            "geometry",
            f"its geometry is {entry.get('geometryType')!r}, but a bitmap is expected; convert it to "
            "a bitmap in Supervisely",
        )
    bitmap = decode_bitmap(entry["bitmap"]["data"])
    x, y = (int(value) for value in entry["bitmap"]["origin"])
    mask = np.zeros((height, width), dtype=bool)
    top, left = max(y, 0), max(x, 0)
    part = bitmap[top - y : height - y if height > y else 0, left - x : width - x if width > x else 0]
    mask[top : top + part.shape[0], left : left + part.shape[1]] = part
    if not mask.any():
        raise BitmapError(
            "bitmap outside",
            f"the {bitmap.shape[1]}x{bitmap.shape[0]} bitmap at ({x}, {y}) has no pixel inside the "
            f"{width}x{height} image; correct its origin",
        )
    return mask


def decode_bitmap(data: str) -> np.ndarray:
    """bool [h, w] of base64 text, see `_shape`."""
    try:
        raw = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError, TypeError) as error:
        raise BitmapError("invalid base64", f"its bitmap is no base64 ({error}); export it again") from error
    try:
        if not raw.startswith(b"\x89PNG"):
            raw = zlib.decompressobj().decompress(raw, LARGEST)
    except zlib.error as error:
        raise BitmapError("bitmap damaged", f"its bitmap is no PNG, zlib-compressed or not ({error})") from error
    try:
        return decode(io.BytesIO(raw), exif=False, take=_shape)
    except ImageError as error:
        cause = "bitmap too large" if error.cause == "image too large" else "bitmap damaged"
        raise BitmapError(cause, f"its bitmap cannot be used: {error}") from error


def _shape(image: Image.Image) -> np.ndarray:
    """bool [h, w]: what is not transparent, or where nothing is transparent what is not black."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        pixels = np.asarray(image.convert("RGBA"))
        opaque = pixels[..., 3] > 0
        return pixels[..., :3].any(axis=2) if opaque.all() and pixels[..., :3].any() else opaque
    pixels = np.asarray(image)
    return pixels.any(axis=2) if pixels.ndim == 3 else pixels != 0


def encode_bitmap(mask: np.ndarray) -> dict[str, Any]:
    """The `bitmap` of an object: base64(zlib(palette PNG with transparency)) of its box, and the box's corner."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    part = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    image = Image.fromarray(part.astype(np.uint8)).convert("P")
    image.putpalette([0, 0, 0, 255, 255, 255])
    file = io.BytesIO()
    image.save(file, format="PNG", transparency=0, bits=1)
    data = base64.b64encode(zlib.compress(file.getvalue())).decode("ascii")
    return {"data": data, "origin": [int(columns[0]), int(rows[0])]}


def meta_classes(path: Path) -> dict[int, str]:
    """Class number -> title of a `meta.json`."""
    try:
        titles = [str(entry["title"]) for entry in json.loads(path.read_text(encoding="utf-8-sig"))["classes"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} lists no classes ({error}); mend it, or give the reader its classes") from error
    numbers = [re.search(r"(?<![0-9])0*([1-9][0-9]{0,4})$", title) for title in titles]
    table = {int(match[1]): title for match, title in zip(numbers, titles) if match is not None}
    return class_table(table if len(table) == len(titles) and max(table, default=1) <= MOST_CLASSES else titles)
