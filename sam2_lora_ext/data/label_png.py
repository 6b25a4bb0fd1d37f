"""Reads label images: one per image, with the same stem, and the class of each pixel (grey value, index or colour)."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from sam2_lora_ext.data import tiff
from sam2_lora_ext.data.decode import decode
from sam2_lora_ext.data.images import ImageError, list_images, mode_and_tag, not_taken, probe, turning
from sam2_lora_ext.data.near_names import NearNames
from sam2_lora_ext.data.records import ImageRecord, Problem, Unread, class_table, describe_classes, shorten
from sam2_lora_ext.data.rle import encode_mask
from sam2_lora_ext.utils.errors import UserError

LOSSY = frozenset({"JPEG", "MPO", "WEBP"})
JPEG_2000 = dict.fromkeys((33003, 33005, 34712), "JPEG 2000")
LOSSY_TIFF = {**dict.fromkeys((6, 7, 34892), "JPEG"), **JPEG_2000, 50001: "WebP"}  # by the tag Compression


class LabelPNGReader:
    """Reads an image folder and a folder of label images.

    Args:
        image_dir: the folder of the images.
        label_dir: the folder of the label images: `X.png` belongs to `X.jpg`.
        classes: class names or their count; None for Severstal's four.
        colors: class number -> [r, g, b] for coloured labels; black is background. None takes grey values or palette
            indices (0 is background).
        full_check: decode every image instead of checking its header and end.
        exif: turn images upright by their orientation tag; False reads them as stored.
    """

    instances = False

    def __init__(
        self,
        image_dir: str | Path,
        label_dir: str | Path,
        classes: int | Sequence[str] | dict[int, str] | None = None,
        colors: Mapping[int, Sequence[int]] | None = None,
        full_check: bool = False,
        exif: bool = True,
    ):
        self.image_dir = Path(image_dir)
        self.label_dir = Path(label_dir)
        self.class_names = class_table(classes)
        self.colors = None if colors is None else {int(number): _packed(color) for number, color in colors.items()}
        if self.colors is not None and (
            set(self.colors) != set(self.class_names)
            or 0 in self.colors.values()
            or len(set(self.colors.values())) < len(self.colors)
        ):
            raise UserError(
                f"colors must give each class ({describe_classes(self.class_names)}) its own colour that is not "
                f"black, got {dict(colors)}"
            )
        self.full_check = full_check
        self.exif = exif

    def files(self) -> list[Path]:
        return [self.label_dir / name for name in list_images(self.label_dir)]

    def inputs(self) -> list[Path]:
        return [self.image_dir, self.label_dir]

    def records(self) -> Iterator[ImageRecord | Problem | Unread]:
        labels, images = {}, set()
        label_names, image_names = list_images(self.label_dir), list_images(self.image_dir)
        twice = {stem for names in (label_names, image_names) for stem, count in _stems(names).items() if count > 1}
        for name in label_names:
            stem = Path(name).stem
            if stem in labels:
                yield Problem(
                    str(self.label_dir / name),
                    None,
                    "duplicate label",
                    f"{labels[stem]} has the same stem; keep one of them",
                )
            labels.setdefault(stem, name)
        near = NearNames(label_names)
        for name in image_names:
            stem = Path(name).stem
            try:
                if stem in images:
                    raise ImageError(
                        "duplicate image", f"another image has the stem {stem}, so they would share a label"
                    )
                images.add(stem)
                height, width, special = probe(self.image_dir / name, self.full_check, self.exif)
            except ImageError as error:
                yield Problem(str(self.image_dir / name), None, error.cause, str(error), name)
                continue
            if stem not in labels:
                known = near.find(name)
                advice = "add it (all zeros for a clean image)"
                advice = f"it has {shorten(known)}: give both the same name" if known else advice
                yield Problem(
                    str(self.image_dir / name),
                    None,
                    "label missing",
                    f"no label image {stem}.png in {self.label_dir}; {advice} or remove the image",
                    name,
                )
                continue
            path = self.label_dir / labels[stem]
            record = ImageRecord(name, height, width, special=special)
            if stem in twice:  # the pair of image and label is ambiguous: reported with the second file
                record.complete = False
                yield record
                continue
            try:
                for problem in self._read(path, record):
                    record.complete = False
                    yield problem
            except ImageError as error:
                yield Problem(
                    str(path),
                    None,
                    error.cause.replace("an image", "a label").replace("image", "label"),
                    str(error),
                    name,
                )
                continue
            yield record
        for stem, name in labels.items():
            if stem not in images:
                yield Problem(
                    str(self.label_dir / name),
                    None,
                    "image missing",
                    f"no image {stem} in {self.image_dir}; add it or remove the label",
                )
        for folder, names, other in (
            (self.image_dir, image_names, self.label_dir),
            (self.label_dir, label_names, self.image_dir),
        ):
            yield from not_taken(folder, names, [other])

    def _read(self, path: Path, record: ImageRecord) -> Iterator[Problem]:
        """Adds the masks of one label image to its record; yields a problem for each value that is not a class."""
        label = read_label(path, self.colors is not None, self.exif)
        if label.shape != (record.height, record.width):
            raise ImageError(
                "label size",
                f"the label is {label.shape[1]}x{label.shape[0]}, its image "
                f"{record.width}x{record.height}; they must be equal"
                + turning(self.image_dir / record.name, path, exif=self.exif),
            )
        values = {number: number for number in self.class_names} if self.colors is None else self.colors
        rest = label != 0
        for number, value in values.items():
            mask = label == value
            if mask.any():
                record.masks.append((number, encode_mask(mask)))
                rest &= ~mask
        for value in np.unique(label[rest]).tolist():
            shown = value if self.colors is None else f"colour {[value >> 16, value >> 8 & 255, value & 255]}"
            yield Problem(
                str(path),
                None,
                "unknown class",
                f"the label has the value {shown}, but the classes are "
                f"{describe_classes(self.class_names)}, and 0 is background",
                record.name,
            )


def read_label(path: Path, color: bool = False, exif: bool = True) -> np.ndarray:
    """Integers [H, W] of a label image: grey values (1, 8 or 16 bit) or palette indices; with `color` 0xRRGGBB.

    Raises:
        ImageError: the file cannot be read, was saved with loss, or has colours where numbers are expected.
    """
    probe(path, exif=exif)
    if color and mode_and_tag(path)[0].endswith(";16"):  # PIL keeps only their high bytes, which are usually 0
        raise ImageError("label mode", "the label has 16 bits a channel; save it with 8, like its colors")
    return decode(path, exif, _colours if color else _numbers, whole=False)


def _numbers(image: Image.Image) -> np.ndarray:
    """Grey values or palette indices of a decoded label image."""
    _refuse_lossy(image)
    if image.mode not in ("1", "L", "P", "I", "I;16", "I;16B", "I;16L", "I;16N"):
        raise ImageError(
            "label mode",
            f"the label has the mode {image.mode}, but grey values or a palette are expected; save it with one "
            "number per pixel, or give the reader its colors",
        )
    return np.asarray(image) * 1  # a bool becomes a number


def _colours(image: Image.Image) -> np.ndarray:
    """0xRRGGBB of a decoded label image."""
    _refuse_lossy(image)
    red, green, blue = np.asarray(image.convert("RGB")).astype(np.int32).transpose(2, 0, 1)
    return red << 16 | green << 8 | blue


def _refuse_lossy(image: Image.Image) -> None:
    """Refuses a file of a lossy format, whatever its suffix."""
    form = image.format
    if form == "TIFF" and (packing := LOSSY_TIFF.get(image.tag_v2.get(tiff.COMPRESSION))) is not None:
        form = f"{packing} in TIFF"
    if form in LOSSY or form != image.format:
        raise ImageError(
            "lossy label",
            f"the file is {form}, a lossy label image whose values differ from the drawn ones; export it as PNG from "
            "the labelling tool",
        )


def _stems(names: Sequence[str]) -> Counter[str]:
    return Counter(Path(name).stem for name in names)


def _packed(color: Sequence[int]) -> int:
    if len(color) != 3 or not all(0 <= value <= 255 for value in color):
        raise UserError(f"a colour is [r, g, b] of 0..255, got {list(color)}")
    return color[0] << 16 | color[1] << 8 | color[2]
