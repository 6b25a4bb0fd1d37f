"""Scans a data set: statistics, problems and duplicates.

Legend: N usable images.
"""

import hashlib
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from sam2_lora_ext.data.duplicates import difference_hash, equal_pairs, groups, near_pairs, thumbnail
from sam2_lora_ext.data.ids import class_of
from sam2_lora_ext.data.images import DARK, ImageError, decode, mode_and_tag
from sam2_lora_ext.data.index import AnnotationIndex, collect
from sam2_lora_ext.data.objects import ObjectMode, ObjectTable, components_differ, components_note, make_objects
from sam2_lora_ext.data.records import Problem, Reader
from sam2_lora_ext.data.units import is_deep, to_eight, unit_warning


@dataclass
class PixelFacts:
    """Facts about the pixels of N images."""

    modes: list[str] = field(default_factory=list)  # of PIL, e.g. RGB; RGB;16 has 16 bits a channel
    black: list[float] = field(default_factory=list)  # share of columns that are unexposed
    digests: list[bytes] = field(default_factory=list)
    hashes: list[np.ndarray] = field(default_factory=list)
    thumbnails: list[np.ndarray] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    turned: int = 0  # images with an orientation tag
    deep: int = 0  # images with integers of more than 8 bits a channel
    largest: int = 0  # the largest value of these
    bits: int = 16  # the depth with which they were read

    def units(self) -> list[str]:
        """Warnings about the values."""
        warning = unit_warning(self.largest, self.deep, self.bits)
        return [] if warning is None else [warning]

    def equal(self) -> np.ndarray:
        """Pairs of images with the same pixels."""
        return equal_pairs(self.digests)

    def near(self) -> np.ndarray:
        """Pairs of images that look the same."""
        return near_pairs(
            np.array(self.hashes, bool).reshape(-1, 256), np.array(self.thumbnails, np.uint8).reshape(-1, 16, 64)
        )


def look_at_pixels(index: AnnotationIndex, progress: bool = True, bits: int = 16) -> PixelFacts:
    """Decodes every image once; an image that cannot be decoded is a problem and never a duplicate.

    Args:
        index: the images.
        progress: show a bar.
        bits: depth of images with more than 8 bits a channel; a value that does not fit is a problem.
    """
    facts = PixelFacts(bits=bits)
    for number in tqdm(range(len(index)), desc="images", unit="image", disable=not progress):
        path = index.path(number)
        try:
            mode, tag = mode_and_tag(path)
            values = decode(path, index.exif)
            digest = hashlib.sha256(f"{values.dtype}{values.shape}".encode() + values.tobytes()).digest()
            image = Image.fromarray(to_eight(values, bits)).convert("L")
            facts.turned += tag != 1
            if is_deep(values):
                facts.deep, facts.largest = facts.deep + 1, max(facts.largest, int(values.max()))
            grey, small, signs = np.asarray(image), thumbnail(image), difference_hash(image)
        except ImageError as error:
            facts.problems.append(Problem(path, None, error.cause, str(error), index.name(number)))
            mode, grey, digest = "unreadable", np.full((1, 1), 255), str(number).encode()
            small, signs = np.zeros((16, 64), np.uint8), np.zeros(256, bool)
        facts.modes.append(mode)
        facts.black.append(float((grey.max(axis=0) <= DARK).mean()))
        facts.digests.append(digest)
        facts.hashes.append(signs)
        facts.thumbnails.append(small)
    return facts


def scan(
    reader: Reader, progress: bool = True, bits: int = 16, objects: ObjectMode | None = None
) -> tuple[dict[str, Any], AnnotationIndex]:
    """The content of `scan.json` and its index; see `look_at_pixels` and `make_objects`."""
    index = collect(reader, progress)
    facts = look_at_pixels(index, progress, bits)
    return summarise(index, facts, objects), index


def summarise(index: AnnotationIndex, facts: PixelFacts, mode: ObjectMode | None = None) -> dict[str, Any]:
    """The content of `scan.json`; a mask is the union of one class in one image, an object is defined by `mode`."""
    masks, objects = make_objects(index, "classes"), make_objects(index, mode)
    joined, split = components_differ(index)
    notes = [*index.notes, components_note(index)] if objects.mode == "components" else index.notes
    sizes = Counter(f"{width}x{height}" for height, width in index.sizes.tolist())
    present = class_sets(index)
    problems = [*index.problems, *facts.problems]
    exact = facts.equal()
    same, near = _sets(groups(len(index), exact)), _sets(groups(len(index), exact, facts.near()))
    return {
        "images": len(index),
        "clean": int(index.clean().sum()),
        "unknown": len(index.unknown),
        "unknown_images": list(index.unknown),
        "may_lack_masks": [index.name(image) for image in np.flatnonzero(~index.complete)],
        "clean_share": float(index.clean().mean()) if len(index) else 0.0,
        "masks": len(masks),
        "masks_per_class": _per_class(index, masks),
        "objects": len(objects),
        "objects_are": objects.mode,
        "annotations": (
            {"count": len(index.mask_class), "joined_by_components": joined, "split_by_components": split}
            if index.instances
            else None
        ),
        "objects_per_class": _per_class(index, objects),
        "class_names": {str(number): name for number, name in sorted(index.class_names.items())},
        "combinations": {label: count for label, count in sorted(Counter(map(combination, present)).items())},
        "object_area": {
            str(number): _spread(objects.areas[class_of(objects.ids) == number]) for number in sorted(index.class_names)
        },
        "sizes": dict(sizes.most_common()),
        "modes": dict(Counter(facts.modes).most_common()),
        "turned": facts.turned,
        "units": facts.units(),
        "black_share": {
            "mean": float(np.mean(facts.black)) if facts.black else 0.0,
            "max": max(facts.black, default=0.0),
            "images_above_10_percent": sum(share > 0.1 for share in facts.black),
        },
        "duplicates": {
            "exact": _named(index, same),
            "near": _named(index, near),
            "exact_with_other_masks": _named(index, [images for images in same if _masks_differ(masks, images)]),
        },
        "unread": list(index.unread),
        "notes": [note for note in notes if note],
        "problems_per_cause": dict(Counter(problem.cause for problem in problems).most_common()),
        "problems": [asdict(problem) for problem in problems],
    }


def class_sets(index: AnnotationIndex) -> list[tuple[int, ...]]:
    """The classes of each image, ascending; empty for one without masks."""
    return [tuple(sorted({class_id for class_id, _ in index.masks(image)})) for image in range(len(index))]


def combination(classes: tuple[int, ...]) -> str:
    """`1+3`, or `clean`."""
    return "+".join(map(str, classes)) or "clean"


def _per_class(index: AnnotationIndex, objects: ObjectTable) -> dict[str, int]:
    classes = class_of(objects.ids)
    return {str(number): int((classes == number).sum()) for number in sorted(index.class_names)}


def _spread(areas: np.ndarray) -> dict[str, float]:
    """Quantiles in pixels; empty without objects."""
    if not len(areas):
        return {}
    levels = {"min": 0, "p10": 0.1, "median": 0.5, "p90": 0.9, "max": 1}
    return {name: float(np.quantile(areas, level)) for name, level in levels.items()}


def _sets(group: np.ndarray) -> list[list[int]]:
    """The images of each group of at least two."""
    members: dict[int, list[int]] = {}
    for image, number in enumerate(group.tolist()):
        members.setdefault(number, []).append(image)
    return [images for images in members.values() if len(images) > 1]


def _named(index: AnnotationIndex, sets: list[list[int]]) -> list[list[str]]:
    return [[index.name(image) for image in images] for images in sets]


def _masks_differ(masks: ObjectTable, images: list[int]) -> bool:
    """Whether the masks of these images (one for each class) are not all the same."""

    def content(image: int) -> list[tuple[int, bytes]]:
        places = range(*masks.offsets[image : image + 2])
        return [(int(masks.ids[place]), masks.runs_of(place).tobytes()) for place in places]

    return any(content(image) != content(images[0]) for image in images[1:])
