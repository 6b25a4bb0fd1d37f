"""The masks that a user kept, and their way into a data set of any format that the writers know.

Legend: R runs of a mask.
"""

import itertools
import re
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sam2_lora_ext.data.index import AnnotationIndex, pack
from sam2_lora_ext.data.records import ImageRecord
from sam2_lora_ext.data.writers import BY_CLASS, WRITERS, convert, joined
from sam2_lora_ext.serve.images import Images
from sam2_lora_ext.utils.errors import UserError

MOST_MASKS = 1000  # of one image
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True)
class Kept:
    """One mask.

    Args:
        number: its annotation id, which the formats that have ids keep.
        class_id: of the class table.
        runs: int32 [R, 2], see `rle`.
        model: whose mask it is.
    """

    number: int
    class_id: int
    runs: np.ndarray
    model: str


class Labels:
    """Kept masks by image; images that were marked as clean have none.

    Args:
        images: what they are of.
        class_names: class number -> name.
        out: the folder in which data sets are made.
        inputs: files and folders that are read: no data set is written into or around them.
    """

    def __init__(self, images: Images, class_names: dict[int, str], out: Path, inputs: Sequence[str | Path] = ()):
        self.images, self.class_names, self.out, self.inputs = images, class_names, Path(out), list(inputs)
        self.unsaved = False
        self._kept: dict[int, list[Kept]] = {}
        self._numbers, self._lock = itertools.count(1), threading.RLock()
        self._written: dict[str, Any] = {}  # data set -> `state_of` it as this process left it

    def keep(self, image: int, class_id: int, runs: np.ndarray, model: str) -> Kept:
        """Adds a mask; one that the image has already, of the same class, is returned and not added again.

        Raises:
            UserError: the mask is empty, the class is unknown, or the image has too many.
        """
        self.images.path(image)
        if class_id not in self.class_names:
            raise UserError(f"there is no class {class_id}: the classes are {', '.join(map(str, self.class_names))}")
        if not len(runs):
            raise UserError("the mask is empty, so there is nothing to keep")
        with self._lock:
            kept = self._kept.get(image, [])
            for one in kept:
                if one.class_id == class_id and np.array_equal(one.runs, runs):
                    return one
            if len(kept) >= MOST_MASKS:
                raise UserError(f"an image takes at most {MOST_MASKS} masks")
            self._kept[image] = [*kept, Kept(next(self._numbers), class_id, runs, model)]
            self.unsaved = True
            return self._kept[image][-1]

    def drop(self, image: int, number: int) -> None:
        """Forgets a mask; the image is then not labelled, if it was the last one."""
        with self._lock:
            before = self._kept.get(image, [])
            after = [kept for kept in before if kept.number != number]
            if len(after) == len(before):
                raise UserError(f"image {image} has no mask {number}")
            self._kept[image] = after
            if not after:
                del self._kept[image]
            self.unsaved = True

    def mark_clean(self, image: int, clean: bool) -> None:
        """Says that an image has no defect, or that this is not known; raises `UserError` when it has masks."""
        self.images.path(image)
        with self._lock:
            if self._kept.get(image):
                raise UserError("the strip has masks: remove them before it is called clean")
            self._kept.pop(image, None)
            if clean:
                self._kept[image] = []
            self.unsaved = True

    def of(self, image: int) -> tuple[list[Kept], bool]:
        """The masks of an image, and whether it was marked as clean."""
        with self._lock:
            return list(self._kept.get(image, [])), self._kept.get(image) == []

    def count(self) -> tuple[int, int]:
        """Labelled images, and masks."""
        with self._lock:
            return len(self._kept), sum(map(len, self._kept.values()))

    def save(self, kind: str, name: str) -> tuple[Path, str | None]:
        """Writes all labelled images as a data set `out/name`; the page's own earlier one of this name is replaced.

        Args:
            kind: a key of `WRITERS`.
            name: of the folder: letters, digits, `-` and `_`.

        Returns:
            The folder, and what the format could not keep as a sentence, or None.

        Raises:
            UserError: nothing was kept, the format cannot hold it, or the folder is there and not as this page left it.
        """
        if kind not in WRITERS:
            raise UserError(f"there is no format {kind[:100]!r}: there are {', '.join(WRITERS)}")
        if not NAME.fullmatch(name):
            raise UserError(f"a data set's name is up to 64 letters, digits, - and _, got {name[:100]!r}")
        folder = self.out / name
        with self._lock, tempfile.TemporaryDirectory() as links:
            if not self._kept:
                raise UserError("no mask was kept and no strip marked as clean, so there is nothing to save")
            ours = name in self._written and self._written[name] == state_of(folder)
            if folder.exists() and not ours:
                raise UserError(f"{folder} exists already, or was changed since it was saved: choose another name")
            index = self._index(Path(links))
            convert(index, kind, folder, force=ours, progress=False, inputs=self.inputs)
            self._written[name], self.unsaved = state_of(folder), False
            return folder, joined(index, kind) if kind in BY_CLASS else None

    def _index(self, links: Path) -> AnnotationIndex:
        """The labelled images as one folder of links, and their masks, each an instance."""
        records = []
        for image, kept in sorted(self._kept.items()):
            path = self.images.path(image).absolute()
            (links / path.name).symlink_to(path)
            height, width = self.images.read(image).shape[:2]
            records.append(
                ImageRecord(
                    path.name,
                    height,
                    width,
                    [(one.class_id, one.runs) for one in kept],
                    ids=[one.number for one in kept],
                    crowd=[False] * len(kept),
                )
            )
        return replace(pack(records, links, self.class_names, exif=self.images.exif), instances=True)


def state_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of each file in a folder, by its relative path."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}
