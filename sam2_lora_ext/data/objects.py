"""What is prompted and scored: the masks of an index as objects (components, classes, or one for all).

Legend: N images, P objects, K runs of all objects.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from sam2_lora_ext.data.components import find_components
from sam2_lora_ext.data.ids import OBJECTS_PER_CLASS, class_of
from sam2_lora_ext.data.index import AnnotationIndex
from sam2_lora_ext.data.rle import union_runs
from sam2_lora_ext.errors import UserError

ObjectMode = Literal["components", "classes", "all"]


@dataclass
class ObjectTable:
    """Objects sorted by image; image i has the objects `offsets[i]..offsets[i + 1]`."""

    class_names: dict[int, str]
    offsets: np.ndarray  # int64 [N + 1]
    ids: np.ndarray  # int64 [P]: class * OBJECTS_PER_CLASS + number within image and class
    areas: np.ndarray  # int64 [P] in pixels
    boxes: np.ndarray  # int32 [P, 4]: x0, y0, x1, y1, half open
    run_offsets: np.ndarray  # int64 [P + 1]
    runs: np.ndarray  # int32 [K, 2] of (start, length)

    def __len__(self) -> int:
        return len(self.ids)

    def runs_of(self, item: int) -> np.ndarray:
        """The runs of one object."""
        return self.runs[self.run_offsets[item] : self.run_offsets[item + 1]]

    def class_of(self, item: int) -> int:
        """The class of one object."""
        return int(class_of(self.ids[item]))


def make_objects(index: AnnotationIndex, mode: ObjectMode = "components") -> ObjectTable:
    """Objects of all images.

    Args:
        index: the annotations.
        mode: "components": each 8-connected part of a class is an object; "classes": each class of an image is one;
            "all": whatever is defective in an image is one object, of a single class 1, "defect".
    """
    if mode not in ("components", "classes", "all"):
        raise UserError(f"objects must be components, classes or all, got {mode!r}")
    image, class_id, run_offsets, runs = _masks(index, union_classes=mode == "all")
    class_names = {1: "defect"} if mode == "all" else dict(index.class_names)
    found = find_components(runs, run_offsets, index.sizes[image, 0], index.sizes[image, 1], split=mode == "components")
    owner = image[found.mask]
    group = owner.astype(np.int64) * (max(class_names) + 1) + class_id[found.mask]
    first = np.flatnonzero(np.diff(group, prepend=-1))
    number = np.arange(len(group)) - np.repeat(first, np.diff(np.append(first, len(group))))
    assert number.max(initial=0) < OBJECTS_PER_CLASS
    return ObjectTable(
        class_names,
        np.append(0, np.cumsum(np.bincount(owner, minlength=len(index)))),
        class_id[found.mask].astype(np.int64) * OBJECTS_PER_CLASS + number,
        found.areas,
        found.boxes,
        found.run_offsets,
        found.runs,
    )


def _masks(index: AnnotationIndex, union_classes: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(image, class, run offsets, runs), one mask per image and class: masks of one class (formats with a mask per
    component have several) are united."""
    image = index.mask_image()
    class_id = np.ones_like(index.mask_class) if union_classes else index.mask_class
    new = np.ones(len(image), dtype=bool)
    new[1:] = (image[1:] != image[:-1]) | (class_id[1:] != class_id[:-1])
    if new.all():
        return image, class_id, index.run_offsets, index.runs
    first = np.flatnonzero(new)
    pieces = []
    for low, high in zip(first, np.append(first[1:], len(image))):
        runs = [index.runs[slice(*index.run_offsets[mask : mask + 2])] for mask in range(low, high)]
        pieces.append(runs[0] if len(runs) == 1 else union_runs(runs))
    return (
        image[first],
        class_id[first],
        np.append(0, np.cumsum([len(runs) for runs in pieces])),
        np.concatenate(pieces),
    )
