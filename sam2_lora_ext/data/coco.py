"""COCO instances: one JSON with images, categories and annotations (polygons, compressed or plain RLE, crowd)."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from sam2_lora_ext.data.coco_masks import disagreement, read_segmentation
from sam2_lora_ext.data.coco_names import ImageFinder, number_categories
from sam2_lora_ext.data.images import not_taken, probe, turning
from sam2_lora_ext.data.json_file import read_annotations
from sam2_lora_ext.data.records import ImageRecord, InvalidData, Note, Problem, Unread, source_id
from sam2_lora_ext.utils.errors import UserError


class COCOReader:
    """Reads the images that a COCO file lists; an annotation is an instance. Other files are reported as unread.

    Args:
        image_dir: the folder that `file_name` is relative to.
        json: the annotations.
        classes: class names (a list, or a table with numbers) or their count; categories are matched by name. None
            takes the file's categories, with their ids as class numbers, or their order if an id cannot be one.
        crowd: whether annotations with `iscrowd` are used; an image with an unused one is never clean.
        full_check: decode every image instead of checking its header and end.
        exif: turn images upright by their orientation tag; False reads them as stored.
    """

    instances = True

    def __init__(
        self,
        image_dir: str | Path,
        json: str | Path,
        classes: int | Sequence[str] | dict[int, str] | None = None,
        crowd: bool = True,
        full_check: bool = False,
        exif: bool = True,
    ):
        self.image_dir = Path(image_dir)
        self.json = Path(json)
        self.crowd = crowd
        self.full_check = full_check
        self.exif = exif
        self._content = _load(self.json)
        self._finder = ImageFinder(self.image_dir)
        used = [_key(entry.get("category_id")) for entry in self._content["annotations"]]
        self.class_names, self._numbers = number_categories(self._content["categories"], used, classes, self.json)
        self._category_names = {entry["id"]: str(entry["name"]) for entry in self._content["categories"]}
        self.class_source = {number: category for category, number in self._numbers.items()}

    def files(self) -> list[Path]:
        return [self.json]

    def inputs(self) -> list[Path]:
        return [self.image_dir, self.json]

    def records(self) -> Iterator[ImageRecord | Problem | Note | Unread]:
        records: dict[int | str, ImageRecord] = {}
        lost: set[int | str | None] = set()  # ids of images that were reported
        yield from self._images(records, lost)
        as_text = {str(key): key for key in records}
        doubt, odd, odd_row = False, 0, 0
        for row, entry in enumerate(self._content["annotations"], 1):
            image_id = _key(entry.get("image_id"))
            if image_id is not None and image_id in lost:
                continue
            if image_id not in records:
                said = f"annotation {row} is for image id {entry.get('image_id')!r}, which the list of images lacks"
                if (alike := as_text.get(_text(entry.get("image_id")))) is not None:
                    records[alike].complete = False
                    name = records[alike].name
                    said += f", but {name} has {alike!r}: write both the same way"
                    yield Problem(str(self.json), row, "image id", said, name)
                else:
                    doubt = True
                    said += ", so images without annotations are not clean; add the image or remove the annotation"
                    yield Problem(str(self.json), row, "image missing", said)
                continue
            record = records[image_id]
            if entry.get("iscrowd") and not self.crowd:
                record.complete = False
                continue
            try:
                if self._take(entry, record):
                    odd, odd_row = odd + 1, odd_row or row
            except InvalidData as error:
                record.complete = False
                yield Problem(
                    str(self.json), row, error.cause, f"annotation {row} of {record.name}: {error}", record.name
                )
        if doubt:
            for record in records.values():
                record.complete = False
        if odd:
            yield Note(
                f"{self.json}: the area or bbox of {odd} polygons differs from that of their pixels, first in "
                f"annotation {odd_row}; the pixels are used"
            )
        twice = [number for record in records.values() for number in record.ids if number >= 0]
        if repeated := len(twice) - len(set(twice)):
            yield Note(f"{self.json}: {repeated} annotations repeat the id of another one")
        yield from records.values()
        yield from self._unread()

    def _images(
        self, records: dict[int | str, ImageRecord], lost: set[int | str | None]
    ) -> Iterator[Problem | ImageRecord]:
        """Fills `records` by image id, and `lost` with the ids of images that cannot be used."""
        times = Counter(_key(entry.get("id")) for entry in self._content["images"])
        first: dict[int | str, str] = {}  # the name of the first image of an id
        names: dict[str, int | str] = {}
        for row, entry in enumerate(self._content["images"], 1):
            image_id, name = _key(entry.get("id")), str(entry.get("file_name"))
            try:
                if image_id is None:
                    raise InvalidData("duplicate row", f"image {row} has no id (id {entry.get('id')!r})")
                name = self._finder.find(entry.get("file_name"))
                if image_id in first:
                    raise InvalidData("duplicate row", f"image {row} has the same id {image_id} as {first[image_id]}")
                first[image_id] = name
                if name in names:
                    if names[name] in records:
                        records[names[name]].complete = False
                    raise InvalidData("duplicate row", f"image {row} names {name} a second time; keep one of them")
                names[name] = image_id
                height, width, special = probe(self.image_dir / name, self.full_check, self.exif)
                if (entry.get("height", height), entry.get("width", width)) != (height, width):
                    raise InvalidData(
                        "image size",
                        f"{name} is {width}x{height}, but the JSON gives "
                        f"{entry.get('width')}x{entry.get('height')}; they must be equal"
                        + turning(self.image_dir / name, exif=self.exif),
                    )
                record = ImageRecord(name, height, width, special=special, source_id=source_id(image_id))
                if times[image_id] > 1:  # its annotations could belong to either image
                    lost.add(image_id)
                    record.complete = False
                    yield record
                else:
                    records[image_id] = record
            except InvalidData as error:
                lost.add(image_id)
                yield Problem(str(self.json), row, error.cause, f"{name}: {error}", name)

    def _take(self, entry: dict[str, Any], record: ImageRecord) -> bool:
        """Adds the mask of an annotation; returns whether a polygon's area or bbox differs from its pixels.

        Raises:
            InvalidData: the annotation cannot be used.
        """
        category = _key(entry.get("category_id"))
        if category not in self._numbers:
            known = ", ".join(f"{key} ({self._category_names[key]})" for key in self._numbers)
            raise InvalidData(
                "unknown class", f"the category {entry.get('category_id')!r} is unknown; the categories are {known}"
            )
        runs = read_segmentation(entry.get("segmentation"), record.height, record.width)
        wrong = disagreement(entry, runs, record.height)
        if wrong and isinstance(entry["segmentation"], dict):
            raise InvalidData("RLE disagrees", f"{wrong}, so one of them is damaged; export it again")
        record.add(self._numbers[category], runs, source_id(entry.get("id")), bool(entry.get("iscrowd")))
        return bool(wrong)

    def _unread(self) -> list[Unread]:
        """Files in the image folder, or in a folder of a listed image, that are not listed."""
        taken: dict[Path, set[str]] = {self.image_dir: set()}
        for entry in self._content["images"]:
            try:
                path = PurePosixPath(self._finder.find(entry.get("file_name")))
            except InvalidData:
                continue
            for inner in (path, *path.parents[:-1]):
                taken.setdefault(self.image_dir / inner.parent, set()).add(inner.name)
        return [item for folder in sorted(taken) for item in not_taken(folder, taken[folder], [self.json])]


def _key(value: Any) -> int | str | None:
    """The value if it can be an id, else None."""
    return value if isinstance(value, int | str) and not isinstance(value, bool) else None


def _text(value: Any) -> str:
    """An id as text; a whole float is written as an integer."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _load(path: Path) -> dict[str, list[dict[str, Any]]]:
    try:
        content = read_annotations(path)
    except InvalidData as error:
        raise UserError(f"{path} cannot be used: {error}") from error
    for key in ("images", "categories", "annotations"):
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise UserError(f"{path} is not a COCO file: it must have a list of objects named {key}")
    categories = content["categories"]
    if not all(isinstance(_key(entry.get("id")), int) and "name" in entry for entry in categories):
        raise UserError(f"{path}: each category must have an integer id and a name")
    return content
