"""COCO instances: one JSON with images, categories and annotations (polygons, compressed or plain RLE, crowd)."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from pycocotools import mask as mask_utils

from sam2_lora_ext.data.images import probe
from sam2_lora_ext.data.records import MOST_CLASSES, ImageRecord, InvalidData, Problem, class_table
from sam2_lora_ext.data.rle import encode_mask, from_coco_counts, parse_coco_text
from sam2_lora_ext.errors import UserError

LONGEST = 4_000_000  # pixels around all polygons of a mask: pycocotools takes 60 bytes for each, and dies of too many


class COCOReader:
    """Reads the images that a COCO file lists; other files in the folder do not matter.

    Args:
        image_dir: the folder that `file_name` is relative to.
        json: the annotations.
        classes: class names or their count, in the order of the category ids; None takes the file's categories: their
            ids as class numbers, or their order where an id is none.
        crowd: whether annotations with `iscrowd` are used; an image that has one which is not used is never clean.
        full_check: decode every image instead of looking at its header and end.
    """

    instances = True

    def __init__(
        self,
        image_dir: str | Path,
        json: str | Path,
        classes: int | Sequence[str] | dict[int, str] | None = None,
        crowd: bool = True,
        full_check: bool = False,
    ):
        self.image_dir = Path(image_dir)
        self.json = Path(json)
        self.crowd = crowd
        self.full_check = full_check
        self._content = _load(self.json)
        categories = sorted((entry["id"], str(entry["name"])) for entry in self._content["categories"])
        ids = [category for category, _ in categories]
        if len(set(ids)) < len(ids):
            twice = next(category for category in ids if ids.count(category) > 1)
            raise UserError(f"{self.json} has two categories with the id {twice}; give each its own")
        if classes is None and ids and 1 <= ids[0] and ids[-1] <= MOST_CLASSES:
            classes = dict(categories)
        self.class_names = class_table([name for _, name in categories] if classes is None else classes)
        order = sorted(self.class_names)
        if len(order) < len(categories):
            raise UserError(f"{self.json} has {len(categories)} categories, but {len(order)} classes are given")
        self._numbers = {category: number for (category, _), number in zip(categories, order)}

    def files(self) -> list[Path]:
        return [self.json]

    def inputs(self) -> list[Path]:
        return [self.image_dir, self.json]

    def records(self) -> Iterator[ImageRecord | Problem]:
        records, bad, names = {}, set(), set()
        for row, entry in enumerate(self._content["images"], 1):
            image_id, name = _key(entry.get("id")), str(entry.get("file_name"))
            try:
                if image_id is None or image_id in records or image_id in bad:
                    raise InvalidData("duplicate row", f"image {row} has no id of its own (id {image_id})")
                if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name:
                    raise InvalidData("path in name", f"{name!r} of image {row} leads out of {self.image_dir}")
                if name in names:
                    raise InvalidData("duplicate row", f"image {row} names {name} a second time; keep one of them")
                names.add(name)
                height, width, deep = probe(self.image_dir / name, self.full_check)
                if (entry.get("height", height), entry.get("width", width)) != (height, width):
                    raise InvalidData(
                        "image size",
                        f"{name} is {width}x{height}, but the table says "
                        f"{entry.get('width')}x{entry.get('height')}; they must be equal",
                    )
                records[image_id] = ImageRecord(name, height, width, deep=deep)
            except InvalidData as error:
                bad.add(image_id)
                yield Problem(str(self.json), row, error.cause, f"{name}: {error}", name)
        for row, entry in enumerate(self._content["annotations"], 1):
            image_id = _key(entry.get("image_id"))
            if image_id in bad and image_id not in records:
                continue  # the image itself is reported
            if image_id not in records:
                yield Problem(
                    str(self.json),
                    row,
                    "image missing",
                    f"annotation {row} is for image id {image_id}, which the list of images does not have",
                )
                continue
            record = records[image_id]
            if entry.get("iscrowd") and not self.crowd:
                record.complete = False
                continue
            try:
                if _key(entry.get("category_id")) not in self._numbers:
                    raise InvalidData(
                        "unknown class",
                        f"the category {entry.get('category_id')!r} is unknown; the categories are "
                        f"{', '.join(f'{key} ({self.class_names[n]})' for key, n in self._numbers.items())}",
                    )
                runs = read_segmentation(entry.get("segmentation"), record.height, record.width)
                record.masks.append((self._numbers[entry["category_id"]], runs))
            except InvalidData as error:
                record.complete = False
                yield Problem(
                    str(self.json), row, error.cause, f"annotation {row} of {record.name}: {error}", record.name
                )
        yield from records.values()


def _key(value: Any) -> int | str | None:
    """What can be an id, else None."""
    return value if isinstance(value, int | str) else None


def read_segmentation(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Runs of polygons (list of [x, y, x, y, ...]) or of an RLE (`counts` as list or compressed text).

    Raises:
        InvalidData: neither of these, another size, or no pixel.
    """
    try:
        if isinstance(segmentation, dict):
            counts, size = segmentation["counts"], [int(length) for length in segmentation["size"]]
            if size != [height, width]:
                raise InvalidData("RLE size", f"its RLE is for {size[1]}x{size[0]}, the image is {width}x{height}")
            counts = counts if isinstance(counts, list) else parse_coco_text(counts)
            if any(not isinstance(count, int) or count < 0 for count in counts) or sum(counts) != height * width:
                raise InvalidData("RLE out of range", f"its RLE counts must be at least 0 and sum to {height * width}")
            runs = from_coco_counts(counts)
        else:
            polygons = [np.asarray(polygon, dtype=float).ravel() for polygon in segmentation]
            if not polygons or any(
                len(polygon) < 6 or len(polygon) % 2 or not np.isfinite(polygon).all() for polygon in polygons
            ):
                raise InvalidData("polygon", "each of its polygons must be at least three finite x, y pairs")
            if not sum(map(_outline, polygons)) < LONGEST:
                raise InvalidData("polygon", f"its polygons are {LONGEST} pixels around or more; are they in pixels?")
            shapes = mask_utils.frPyObjects([polygon.tolist() for polygon in polygons], height, width)
            runs = encode_mask(mask_utils.decode(mask_utils.merge(shapes)))
    except InvalidData:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise InvalidData("segmentation", f"its segmentation is neither polygons nor RLE ({error!r})") from error
    if not len(runs):
        raise InvalidData("mask empty", f"its segmentation has no pixel inside the {width}x{height} image; remove it")
    return runs


def _outline(polygon: np.ndarray) -> float:
    """The way around a polygon [x, y, x, y, ...] from and back to the corner of the image, in columns or rows."""
    corners = np.concatenate([[(0, 0)], polygon.reshape(-1, 2), [(0, 0)]])
    return float(np.abs(np.diff(corners, axis=0)).max(axis=1).sum())


def _load(path: Path) -> dict[str, list[dict[str, Any]]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON ({error}); is it cut off?") from error
    for key in ("images", "categories", "annotations"):
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise UserError(f"{path} is no COCO file: it must have a list of objects named {key}")
    if not all(isinstance(entry.get("id"), int) and "name" in entry for entry in content["categories"]):
        raise UserError(f"{path}: each category must have an integer id and a name")
    return content
