"""Stores the masks that a user kept, and writes them as a data set in any supported format.

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
    """A kept mask.

    Args:
        number: its annotation id, which formats with ids store.
        class_id: of the class table.
        runs: int32 [R, 2], see `rle`.
        model: the name of the model that predicted it.
    """

    number: int
    class_id: int
    runs: np.ndarray
    model: str


class Labels:
    """Kept masks by image; images marked as clean have none.

    Args:
        images: the images of the page.
        class_names: class number -> name.
        out: the folder for data sets.
        inputs: files and folders that are read, which no data set may contain or lie in.
    """

    def __init__(self, images: Images, class_names: dict[int, str], out: Path, inputs: Sequence[str | Path] = ()):
        self.images, self.class_names, self.out, self.inputs = images, class_names, Path(out), list(inputs)
        self.unsaved = False
        self._kept: dict[int, list[Kept]] = {}
        self._numbers, self._lock = itertools.count(1), threading.RLock()
        self._written: dict[str, Any] = {}  # data set -> `state_of` its folder when this process wrote it

    def keep(self, image: int, class_id: int, runs: np.ndarray, model: str) -> Kept:
        """Adds a mask; if the image already has an equal mask of the same class, that one is returned instead.

        Raises:
            UserError: the mask is empty, the class is unknown, or the image has too many.
        """
        self.images.path(image)
        if class_id not in self.class_names:
            raise UserError(f"there is no class {class_id}: choose from {', '.join(map(str, self.class_names))}")
        if not len(runs):
            raise UserError("the mask is empty, so there is nothing to keep")
        with self._lock:
            kept = self._kept.get(image, [])
            for one in kept:
                if one.class_id == class_id and np.array_equal(one.runs, runs):
                    return one
            if len(kept) >= MOST_MASKS:
                raise UserError(f"an image can have at most {MOST_MASKS} masks: remove some first")
            self._kept[image] = [*kept, Kept(next(self._numbers), class_id, runs, model)]
            self.unsaved = True
            return self._kept[image][-1]

    def drop(self, image: int, number: int) -> None:
        """Removes a mask; without any left the image is not labelled."""
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
        """Marks an image as clean, or removes that mark; raises `UserError` if it has masks."""
        self.images.path(image)
        with self._lock:
            if self._kept.get(image):
                raise UserError("the strip has masks: remove them before marking it as clean")
            self._kept.pop(image, None)
            if clean:
                self._kept[image] = []
            self.unsaved = True

    def of(self, image: int) -> tuple[list[Kept], bool]:
        """The masks of an image, and whether it is marked as clean."""
        with self._lock:
            return list(self._kept.get(image, [])), self._kept.get(image) == []

    def count(self) -> tuple[int, int]:
        """The numbers of labelled images and of masks."""
        with self._lock:
            return len(self._kept), sum(map(len, self._kept.values()))

    def save(self, kind: str, name: str) -> tuple[Path, str | None]:
        """Writes all labelled images as a data set `out/name`, replacing this page's earlier one of the same name.

        Args:
            kind: a key of `WRITERS`.
            name: of the folder: letters, digits, `-` and `_`.

        Returns:
            The folder, and a sentence about what the format could not represent, or None.

        Raises:
            UserError: nothing was kept, the format cannot represent it, or the folder exists and was not written by
                this page or was changed since.
        """
        if kind not in WRITERS:
            raise UserError(f"there is no format {kind[:100]!r}: choose from {', '.join(WRITERS)}")
        if not NAME.fullmatch(name):
            raise UserError(f"a data set's name must be 1 to 64 letters, digits, - and _, got {name[:100]!r}")
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
        """Links all labelled images in one folder; returns the index of their masks, each an instance."""
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
    """Size and modification time of each file in a folder, by its relative path."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}
