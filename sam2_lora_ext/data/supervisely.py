"""Supervisely (Dataset Ninja) folders: `{split}/img/X.jpg` with `{split}/ann/X.jpg.json`, classes in `meta.json`.

An object of an annotation file is an instance.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from sam2_lora_ext.data.images import ImageError, ignored, list_images, not_taken, probe, turning
from sam2_lora_ext.data.json_file import read_annotations
from sam2_lora_ext.data.near_names import NearNames
from sam2_lora_ext.data.records import (
    MOST_CLASSES,
    ImageRecord,
    InvalidData,
    Problem,
    Unread,
    class_table,
    describe_classes,
    shorten,
    source_id,
)
from sam2_lora_ext.data.rle import encode_mask
from sam2_lora_ext.data.supervisely_bitmap import BitmapError, place_bitmap
from sam2_lora_ext.utils.errors import UserError

SPLIT_SUFFIXES = ("", "_images", "_split")  # `train`, `train_images`, `train_split`


class SuperviselyReader:
    """Reads one split of a Supervisely project, or all of them.

    Args:
        root: the project folder, or a split's folder (with `img` and `ann`).
        split: "train", "val", "test" ... also if the folder is named `train_images` or `train_split`; None takes
            `root` itself if it is a split, else all its splits (images are then named `train/img/X.jpg`).
        classes: class titles or their count; None takes them from `meta.json`: the number at the end of each title,
            or their order if a title has none; without the file Severstal's four.
        full_check: decode every image instead of checking its header and end.
        exif: turn images upright by their orientation tag; False reads them as stored.
    """

    instances = True

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

    def records(self) -> Iterator[ImageRecord | Problem | Unread]:
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
            known, near = set(names), NearNames(names)
            annotations = [path for path in sorted((folder / "ann").glob("*.json")) if not ignored(path.name)]
            for path in annotations:
                if (name := path.name.removesuffix(".json")) not in known:
                    sentence = f"there is no image {name} in {folder / 'img'}; "
                    if images := near.find(name):
                        sentence += f"it has {shorten(images)}: name the file {images[0]}.json if it belongs to it"
                    else:
                        sentence += "add it or remove the annotation"
                    yield Problem(str(path), None, "image missing", sentence)
            yield from not_taken(folder / "img", names)
            yield from not_taken(folder / "ann", [path.name for path in annotations])
        if self.split is None and self.root not in self.folders:
            yield from not_taken(self.root, (), [*self._meta, *self.folders])

    def _read(self, path: Path, record: ImageRecord, numbers: dict[str, int]) -> Iterator[Problem]:
        """Adds the masks of one annotation file to its record."""

        def problem(cause: str, sentence: str, row: int | None = None) -> Problem:
            return Problem(str(path), row, cause, sentence, record.name)

        if not path.exists():
            yield problem(
                "annotation missing",
                f"the image {record.name} has no annotation; add one (objects: [] if it is clean) or remove the image",
            )
            return
        try:
            annotation = read_annotations(path)
            objects, size = annotation["objects"], annotation.get("size")
            declared = (int(size["height"]), int(size["width"])) if size else (record.height, record.width)
            if not isinstance(objects, list):
                raise TypeError("objects is not a list")
        except UserError as error:
            yield problem("annotation unreadable", str(error))
            return
        except InvalidData as error:
            yield problem(error.cause, f"the file cannot be used: {error}")
            return
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
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
                record.add(numbers[title], encode_mask(mask), source_id(entry.get("id")))
            except BitmapError as error:
                yield problem(error.cause, f"object {row}: {error}", row)
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                yield problem(
                    "object fields", f"object {row} lacks a field or has a wrong one ({error!r}); export it again", row
                )


def meta_classes(path: Path) -> dict[int, str]:
    """Class number -> title of a `meta.json`."""
    try:
        titles = [str(entry["title"]) for entry in read_annotations(path)["classes"]]
    except (UserError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} lists no classes ({error}); correct it, or give the reader its classes") from error
    numbers = [re.search(r"(?<![0-9])0*([1-9][0-9]{0,4})$", title) for title in titles]
    table = {int(match[1]): title for match, title in zip(numbers, titles) if match is not None}
    return class_table(table if len(table) == len(titles) and max(table, default=1) <= MOST_CLASSES else titles)
