"""The items of a data set: each is an image, a part of its columns, and some of its objects.

Legend: N images, L items, P objects.
"""

import csv
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sam2_lora_ext.data.index import AnnotationIndex
from sam2_lora_ext.data.objects import ObjectTable
from sam2_lora_ext.data.splits import take
from sam2_lora_ext.data.windows import Windows
from sam2_lora_ext.utils.errors import UserError
from sam2_lora_ext.utils.files import open_regular

NO_OBJECTS = np.zeros(0, dtype=np.int64)
MARGIN = 16  # columns between a clean part and the nearest defect, since borders of masks are imprecise


class Row(NamedTuple):
    """One item: columns [start, stop) of an image, positions in the object table, the first window of its clip."""

    image: int
    start: int
    stop: int
    objects: np.ndarray
    first: int = 0


@dataclass
class Items:
    """The rows as arrays; item l has the objects `objects[offsets[l]:offsets[l + 1]]`, none if it is clean."""

    images: np.ndarray  # int32 [L]
    starts: np.ndarray  # int32 [L]
    stops: np.ndarray  # int32 [L]
    firsts: np.ndarray  # int32 [L]
    offsets: np.ndarray  # int64 [L + 1]
    objects: np.ndarray  # int64

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: int) -> Row:
        return Row(
            int(self.images[item]),
            int(self.starts[item]),
            int(self.stops[item]),
            self.objects[slice(*self.offsets[item : item + 2])],
            int(self.firsts[item]),
        )

    @classmethod
    def of(cls, rows: list[Row]) -> "Items":
        table = np.array([(row.image, row.start, row.stop, row.first) for row in rows], dtype=np.int32).reshape(-1, 4)
        offsets = np.append(0, np.cumsum([len(row.objects) for row in rows], dtype=np.int64))
        objects = np.concatenate([np.zeros(0, np.int64), *(row.objects for row in rows)]).astype(np.int64)
        return cls(*table.T.copy(), offsets, objects)


def read_split(path: str | Path, split: str | Sequence[str] | None) -> list[str]:
    """Image names of one split.

    Args:
        path: a csv with the columns `image` and `split`, or (`split` None) a text file with a name in each line.
        split: the value or values of the column `split` to take; `!fold0` takes all others.
    """
    try:
        with io.TextIOWrapper(open_regular(path), "utf-8-sig", newline="") as file:
            if split is None:
                names = [line.strip() for line in file if line.strip()]
            else:
                names = take(_split_rows(csv.reader(file, strict=True), path), split, f"the split file {path}")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read the split file {path}: {error}") from error
    if not names:
        raise UserError(f"{path} names no image{'' if split is None else f' in split {split}'}")
    if len(set(names)) < len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise UserError(f"{path} names the image {twice} twice; keep one of the lines")
    return names


def _split_rows(lines: Iterator[list[str]], path: str | Path) -> list[tuple[str, str]]:
    """(image, split) of each row of a split file, stripped of blanks.

    Raises:
        UserError: the columns are missing, or a row has too few or too many fields.
    """
    header = [field.strip() for field in next(lines, [])]
    if header.count("image") != 1 or header.count("split") != 1:
        raise UserError(
            f"the split file {path} must have the columns image and split, but has {', '.join(header) or 'none'}"
        )
    rows = []
    for fields in lines:
        if not any(field.strip() for field in fields):
            continue
        if len(fields) != len(header) or not all(fields[header.index(name)].strip() for name in ("image", "split")):
            raise UserError(
                f"the split file {path}, row {lines.line_num}: the row has {len(fields)} fields, {len(header)} with an "
                "image and a split are expected; correct it (a name with a comma needs quotes)"
            )
        rows.append((fields[header.index("image")].strip(), fields[header.index("split")].strip()))
    return rows


def select_images(index: AnnotationIndex, names: list[str] | None, where: str | Path | None = None) -> np.ndarray:
    """int64: the images with these names, in the order of the index; all for None.

    Names of images that were left out as invalid are skipped.

    Raises:
        UserError: the data has no image of one of these names.
    """
    if names is None:
        return np.arange(len(index))
    position = {name: image for image, name in enumerate(index.names())}
    dropped = {problem.image for problem in index.problems} | set(index.unknown)
    unknown = [name for name in names if name not in position and name not in dropped]
    if unknown:
        raise UserError(
            f"{where} names {len(unknown)} images that {index.image_dir} does not have, the first is "
            f"{unknown[0]!r}; create the split again or correct the folder"
        )
    chosen = np.array(sorted(position[name] for name in names if name in position), dtype=np.int64)
    if not len(chosen):
        raise UserError(f"no image of {where} is usable; see the problems above")
    return chosen


def clean_part(index: AnnotationIndex, image: int, width: int) -> tuple[int, int] | None:
    """The widest [start, stop) of columns at least `MARGIN` away from any mask; None if narrower than `width`."""
    height, columns = index.sizes[image]
    runs = [runs for _, runs in index.masks(image)]
    if not runs:
        return (0, int(columns))
    runs = np.concatenate(runs)
    used = np.zeros(columns + 1, dtype=np.int32)
    np.add.at(used, np.maximum(runs[:, 0] // height - MARGIN, 0), 1)
    np.add.at(used, np.minimum((runs[:, 0] + runs[:, 1] - 1) // height + 1 + MARGIN, columns), -1)
    edges = np.flatnonzero(np.diff(np.cumsum(used[:-1]) == 0, prepend=False, append=False)).reshape(-1, 2)
    if not len(edges):
        return None
    start, stop = edges[np.argmax(edges[:, 1] - edges[:, 0])].tolist()
    return (start, stop) if stop - start >= width else None


def group_objects(boxes: np.ndarray, max_objects: int | None, width: int | None) -> list[np.ndarray]:
    """Divides the objects of an image into groups for evaluation, each object in exactly one.

    Args:
        boxes: [P, 4] of (x0, y0, x1, y1).
        max_objects: largest number of objects of a group; None for no bound.
        width: columns that a group may span (a wider object is a separate group); None for no bound.

    Returns:
        positions in `boxes`, from left to right when `width` is given, else in their order.
    """
    order = range(len(boxes)) if width is None else np.lexsort((np.arange(len(boxes)), boxes[:, 0]))
    groups = []
    left = right = 0
    for position in order:
        x0, x1 = boxes[position, 0], boxes[position, 2]
        if (
            groups
            and (max_objects is None or len(groups[-1]) < max_objects)
            and (width is None or max(right, x1) - left <= width)
        ):
            groups[-1].append(position)
            right = max(right, x1)
        else:
            groups.append([position])
            left, right = x0, x1
    return [np.array(group) for group in groups]


def object_rows(
    index: AnnotationIndex,
    objects: ObjectTable,
    images: np.ndarray,
    keep: np.ndarray,
    max_objects: int | None,
    width: int | None,
    windows: Windows | None,
) -> list[Row]:
    """Rows of the defective images with the objects selected by `keep` (bool [P]).

    Args:
        index: the annotations.
        objects: its P objects.
        images: positions of the images.
        keep: whether to use each object.
        max_objects: see `group_objects`.
        width: see `group_objects`.
        windows: group by the first window of an object's clip; None for one frame.
    """
    rows = []
    for image in images:
        places = np.arange(*objects.offsets[image : image + 2])
        places = places[keep[places]]
        height, columns = index.sizes[image].tolist()
        firsts = np.array(
            [windows.best_window(objects.runs_of(position), height, columns) if windows else 0 for position in places]
        )
        for first in np.unique(firsts):
            chosen = places[firsts == first]
            rows += [
                Row(image, 0, columns, chosen[group], first)
                for group in group_objects(objects.boxes[chosen], max_objects, width)
            ]
    return rows


def clean_rows(index: AnnotationIndex, images: np.ndarray) -> list[Row]:
    """Rows of the clean images among `images`."""
    return [Row(image, 0, int(index.sizes[image, 1]), NO_OBJECTS) for image in images[index.clean()[images]]]


def clean_part_rows(index: AnnotationIndex, images: np.ndarray, width: int) -> list[Row]:
    """Rows of the clean parts, at least `width` columns wide, of the defective images that kept all their masks."""
    defective = images[index.complete[images] & ~index.clean()[images]]
    parts = [(image, clean_part(index, image, width)) for image in defective]
    return [Row(image, *part, NO_OBJECTS) for image, part in parts if part is not None]
