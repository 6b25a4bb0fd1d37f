"""The target of each class in a window of a strip: a mask, an empty mask, or no target for a small part.

    visible_c  = pixels in the window that any object of class c covers
    class c is present     if its objects of at least `min_area` px have at least `min_area` px in it; target: visible_c
    class c is absent      if visible_c is empty
    class c is not used    otherwise: a speck, or the edge of a defect, is neither a target nor clean steel

Masks are column-major runs, never decoded here; a window is the columns [start, stop) of the strip, with all rows.
Legend: H rows of the strip.
"""

import random

import numpy as np
import torch
from PIL import Image
from training.utils.data_utils import Frame, Object, VideoDatapoint

from sam2_lora_ext.data.ids import class_prompt_id
from sam2_lora_ext.data.objects import ObjectTable
from sam2_lora_ext.data.rle import NO_RUNS, crop_columns, decode_runs, union_runs


def class_runs(objects: ObjectTable, image: int, min_area: int = 1) -> dict[int, np.ndarray]:
    """Class -> runs of the union of an image's objects of at least `min_area` pixels, for classes with any."""
    found: dict[int, list[np.ndarray]] = {}
    for place in range(*objects.offsets[image : image + 2]):
        if objects.areas[place] >= min_area:
            found.setdefault(objects.class_of(place), []).append(objects.runs_of(place))
    return {class_id: union_runs(runs) for class_id, runs in found.items()}


def window_targets(
    objects: ObjectTable, image: int, height: int, window: tuple[int, int], min_area: int
) -> dict[int, np.ndarray]:
    """Class -> runs in the window, empty where it is absent; classes that are not used are left out.

    Args:
        objects: of all images.
        image: index of the image.
        height: H.
        window: its first column and the one after its last.
        min_area: in pixels of the strip.
    """
    everything, sizable = class_runs(objects, image), class_runs(objects, image, min_area)
    found = {}
    for class_id in sorted(objects.class_names):
        visible = crop_columns(everything.get(class_id, NO_RUNS), height, *window)
        large = crop_columns(sizable.get(class_id, NO_RUNS), height, *window)
        if not len(visible) or large[:, 1].sum() >= min_area:
            found[class_id] = visible
    return found


def bounded(targets: dict[int, np.ndarray], most: int | None) -> dict[int, np.ndarray]:
    """At most `most` of the classes, drawn with `random`: present ones first, absent ones in the remaining slots."""
    if most is None or len(targets) <= most:
        return targets
    present = [class_id for class_id, runs in targets.items() if len(runs)]
    absent = [class_id for class_id, runs in targets.items() if not len(runs)]
    taken = set((random.sample(present, len(present)) + random.sample(absent, len(absent)))[:most])
    return {class_id: runs for class_id, runs in targets.items() if class_id in taken}


def datapoint(
    pixels: Image.Image, targets: dict[int, np.ndarray], image: int, part: int = 0, corrected: bool = False
) -> VideoDatapoint:
    """A sample of a window, with an object for each class, in the form that SAM 2's transforms take.

    Args:
        pixels: of the window.
        targets: class -> runs in the window.
        image: the strip's row in the index, as in click samples.
        part: number of the tile, used as the frame number, so that (image, class, tile) is unique.
        corrected: whether correction clicks follow the class prompt.
    """
    size = (pixels.height, pixels.width)
    objects = [
        Object(class_prompt_id(class_id, corrected), part, torch.from_numpy(decode_runs(runs, *size)))
        for class_id, runs in targets.items()
    ]
    return VideoDatapoint([Frame(pixels, objects)], image, size)


def draw_pixel(runs: np.ndarray) -> int:
    """The column-major number of a pixel of a non-empty mask, drawn uniformly with `random`."""
    ends = np.cumsum(runs[:, 1])
    place = random.randrange(int(ends[-1]))
    run = int(np.searchsorted(ends, place, side="right"))
    return int(runs[run, 0] + runs[run, 1] - (ends[run] - place))


def column_span(runs: np.ndarray, height: int) -> tuple[int, int]:
    """The first and last column of a non-empty mask."""
    return int(runs[0, 0]) // height, int(runs[-1].sum() - 1) // height
