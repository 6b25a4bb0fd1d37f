"""The objects that are prompted and scored: instances, components, classes, or one for all masks of an image.

Legend: N images, P objects, K runs of all objects.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from sam2_lora_ext.data.components import find_components
from sam2_lora_ext.data.ids import OBJECTS_PER_CLASS, class_of
from sam2_lora_ext.data.index import AnnotationIndex
from sam2_lora_ext.data.rle import union_runs
from sam2_lora_ext.utils.errors import UserError

ObjectMode = Literal["instances", "components", "classes", "all"]
MODES: tuple[str, ...] = get_args(ObjectMode)


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
    annotation: np.ndarray  # int64 [P]: the file's annotation id of an instance, -1 otherwise
    mode: ObjectMode  # definition of an object

    def __len__(self) -> int:
        return len(self.ids)

    def runs_of(self, item: int) -> np.ndarray:
        """The runs of one object."""
        return self.runs[self.run_offsets[item] : self.run_offsets[item + 1]]

    def place_of(self, image: int, object_id: int) -> int:
        """The index of an image's object; identifiers ascend."""
        low, high = self.offsets[image : image + 2]
        place = int(low + np.searchsorted(self.ids[low:high], object_id))
        assert place < high and self.ids[place] == object_id, (image, object_id)
        return place

    def class_of(self, item: int) -> int:
        """The class of one object."""
        return int(class_of(self.ids[item]))


def resolve_mode(index: AnnotationIndex, mode: ObjectMode | None) -> ObjectMode:
    """The definition of an object: None means instances if the format has them, else components.

    Raises:
        UserError: the mode is unknown, or it is instances and the format has none.
    """
    if mode is None:
        return "instances" if index.instances else "components"
    if mode not in MODES:
        raise UserError(f"objects must be {', '.join(MODES)} or null, got {mode!r}")
    if mode == "instances" and not index.instances:
        raise UserError(
            f"objects is instances, but the format of {index.image_dir} does not define the pixels of an object (COCO "
            "and Supervisely do); choose components, classes or all, or null for the format's default"
        )
    return mode


def make_objects(index: AnnotationIndex, mode: ObjectMode | None = None) -> ObjectTable:
    """Objects of all images.

    Args:
        index: the annotations.
        mode: "instances": each annotation of the file is an object, even if it has several parts or touches another;
            "components": each 8-connected component of a class is an object; "classes": each class of an image is one;
            "all": the union of all defects of an image is one object, of a single class 1, "defect"; None: see
            `resolve_mode`.
    """
    mode = resolve_mode(index, mode)
    if mode == "instances":
        image, class_id, run_offsets, runs = index.mask_image(), index.mask_class, index.run_offsets, index.runs
    else:
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
        index.mask_id[found.mask] if mode == "instances" else np.full(len(owner), -1, dtype=np.int64),
        mode,
    )


def components_note(index: AnnotationIndex) -> str | None:
    """A sentence on how components change the annotations of the data; None if they change nothing."""
    joined, split = components_differ(index)
    if not joined and not split:
        return None
    return (
        f"objects: components joins {joined} of {len(index.mask_class)} annotations with a touching one of their class "
        f"and splits {split} that have several parts; objects: instances keeps them"
    )


def components_differ(index: AnnotationIndex) -> tuple[int, int]:
    """How many annotations components would join with another one, and how many they would split.

    Each 8-connected piece of an annotation is within one component of its class: an annotation is joined when one of
    these components also has a piece of another annotation, and split when its pieces are in several components.
    """
    if not index.instances or not len(index.mask_class):
        return 0, 0
    image = index.mask_image()
    heights, widths = index.sizes[:, 0], index.sizes[:, 1]
    pieces = find_components(index.runs, index.run_offsets, heights[image], widths[image])
    whole_image, whole_class, offsets, runs = _masks(index, union_classes=False)
    wholes = find_components(runs, offsets, heights[whole_image], widths[whole_image])

    def keys(images: np.ndarray, classes: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """A number for a pixel of a class of an image, ascending by image, class and pixel."""
        pixels = int(heights.max().astype(np.int64) * widths.max()) + 1
        return (images.astype(np.int64) * (int(classes.max()) + 1) + classes) * pixels + starts

    counts = np.diff(wholes.run_offsets)
    owner = np.repeat(wholes.mask, counts)
    run_keys = keys(whole_image[owner], whole_class[owner], wholes.runs[:, 0])
    order = np.argsort(run_keys)
    piece_keys = keys(image[pieces.mask], index.mask_class[pieces.mask], pieces.runs[pieces.run_offsets[:-1], 0])
    place = order[np.searchsorted(run_keys[order], piece_keys, side="right") - 1]
    component = np.repeat(np.arange(len(counts)), counts)[place]
    pairs = np.unique(np.stack([component, pieces.mask], axis=1), axis=0)  # pairs of component and annotation
    shared = np.bincount(pairs[:, 0])[pairs[:, 0]] > 1
    return len(np.unique(pairs[shared, 1])), int((np.bincount(pairs[:, 1]) > 1).sum())


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
