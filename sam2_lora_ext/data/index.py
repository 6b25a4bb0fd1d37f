"""All annotations of a data set in a few numpy arrays: small, quick to pickle, the same for every reader.

Legend: N images, M masks, R runs of all masks.
"""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from sam2_lora_ext.data.images import ImageError, read_rgb
from sam2_lora_ext.data.records import ImageRecord, Note, OnInvalid, Problem, Reader, Unread, listed, settle, shorten
from sam2_lora_ext.utils.errors import UserError

log = logging.getLogger(__name__)
DIGESTED = {  # array -> its dtype in the digest
    "name_bytes": "u1",
    "name_offsets": "<i8",
    "sizes": "<i8",
    "complete": "u1",
    "mask_offsets": "<i8",
    "mask_class": "<i8",
    "mask_id": "<i8",
    "run_offsets": "<i8",
    "runs": "<i8",
}


@dataclass
class AnnotationIndex:
    """The annotations of a data set. Images are sorted by name; image i has the masks
    `mask_offsets[i]..mask_offsets[i + 1]`, and mask m has the runs `runs[run_offsets[m]:run_offsets[m + 1]]`."""

    image_dir: str
    class_names: dict[int, str]
    name_bytes: np.ndarray  # uint8: UTF-8 names without separators
    name_offsets: np.ndarray  # int64 [N + 1]
    sizes: np.ndarray  # int32 [N, 2] of (H, W)
    special: np.ndarray  # bool [N]: only `images.read_rgb` reads it correctly
    complete: np.ndarray  # bool [N]: no mask of the image was dropped
    mask_offsets: np.ndarray  # int64 [N + 1]
    mask_class: np.ndarray  # int16 [M]
    mask_id: np.ndarray  # int64 [M]: the file's annotation id; -1 where it has none
    mask_crowd: np.ndarray  # bool [M]: COCO's iscrowd
    image_id: np.ndarray  # int64 [N]: the file's image id; -1 where it has none
    run_offsets: np.ndarray  # int64 [M + 1]
    runs: np.ndarray  # int32 [R, 2] of (start, length)
    problems: tuple[Problem, ...] = ()  # entries that cannot be used
    exif: bool = True  # images are turned upright by their orientation tag; sizes are those after turning
    instances: bool = False  # a mask is one annotation of the file, not the union of a class
    class_source: dict[int, int] = field(default_factory=dict)  # class number -> category id of the file
    unknown: tuple[str, ...] = ()  # images that lost all their masks: not in the arrays
    unread: tuple[str, ...] = ()  # files and folders of the data set that the reader did not use
    notes: tuple[str, ...] = ()  # warnings about valid data, as sentences

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, np.ndarray))

    def name(self, image: int) -> str:
        """The file name of an image, below `image_dir`."""
        low, high = self.name_offsets[image : image + 2]
        return self.name_bytes[low:high].tobytes().decode("utf-8", "surrogateescape")

    def names(self) -> list[str]:
        """All names, in order."""
        return [self.name(image) for image in range(len(self))]

    def path(self, image: int) -> str:
        """The path of an image."""
        return f"{self.image_dir}/{self.name(image)}"

    def read(self, image: int, bits: int = 16) -> np.ndarray:
        """The pixels of an image, uint8 [H, W, 3], see `images.read_rgb`; a `UserError` names the file."""
        try:
            return read_rgb(self.path(image), bits, self.exif)
        except ImageError as error:
            raise UserError(f"{self.path(image)}: {error}") from error

    def masks(self, image: int) -> list[tuple[int, np.ndarray]]:
        """(class, runs) of each mask of an image."""
        return [
            (int(self.mask_class[mask]), self.runs[self.run_offsets[mask] : self.run_offsets[mask + 1]])
            for mask in range(*self.mask_offsets[image : image + 2])
        ]

    def mask_image(self) -> np.ndarray:
        """int32 [M]: the image of each mask."""
        return np.repeat(np.arange(len(self), dtype=np.int32), np.diff(self.mask_offsets))

    def clean(self) -> np.ndarray:
        """bool [N]: no mask, and none dropped."""
        return (np.diff(self.mask_offsets) == 0) & self.complete

    def digest(self) -> str:
        """SHA-256 of the content: names, sizes, class table, masks and their ids, incomplete and unknown images,
        orientation; neither paths nor pixels."""
        digest = hashlib.sha256()
        facts = [sorted(self.class_names.items()), getattr(self, "exif", None), list(getattr(self, "unknown", ()))]
        digest.update(json.dumps(facts).encode())
        for name, kind in DIGESTED.items():
            values = np.ascontiguousarray(getattr(self, name, ()), dtype=kind)
            digest.update(f"{name} {values.shape}\n".encode())
            digest.update(values)
        return digest.hexdigest()

    def subset(self, images: np.ndarray) -> "AnnotationIndex":
        """The index of only these images, without problems."""
        records = []
        for image in images:
            low, high = self.mask_offsets[image : image + 2]
            records.append(
                ImageRecord(
                    self.name(image),
                    *self.sizes[image].tolist(),
                    self.masks(image),
                    bool(self.special[image]),
                    bool(self.complete[image]),
                    self.mask_id[low:high].tolist(),
                    self.mask_crowd[low:high].tolist(),
                    int(self.image_id[image]),
                )
            )
        part = pack(records, self.image_dir, self.class_names, exif=self.exif)
        return replace(part, instances=self.instances, class_source=dict(self.class_source))


def pack(
    records: Sequence[ImageRecord],
    image_dir: str | Path,
    class_names: dict[int, str],
    problems: Sequence[Problem] = (),
    exif: bool = True,
) -> AnnotationIndex:
    """Packs records into arrays: images sorted by name, the masks of an image by class in a stable order."""
    records = sorted(records, key=lambda record: record.name)
    masks = [mask for record in records for mask in _by_class(record)]
    names = [record.name.encode("utf-8", "surrogateescape") for record in records]
    return AnnotationIndex(
        image_dir=str(image_dir),
        class_names=dict(class_names),
        name_bytes=np.frombuffer(b"".join(names), dtype=np.uint8),
        name_offsets=_offsets(map(len, names)),
        sizes=np.array([(record.height, record.width) for record in records], dtype=np.int32).reshape(-1, 2),
        special=np.array([record.special for record in records], dtype=bool),
        complete=np.array([record.complete for record in records], dtype=bool),
        mask_offsets=_offsets(len(record.masks) for record in records),
        mask_class=np.array([class_id for class_id, _, _, _ in masks], dtype=np.int16),
        mask_id=np.array([annotation for _, _, annotation, _ in masks], dtype=np.int64),
        mask_crowd=np.array([crowd for _, _, _, crowd in masks], dtype=bool),
        image_id=np.array([record.source_id for record in records], dtype=np.int64),
        run_offsets=_offsets(len(runs) for _, runs, _, _ in masks),
        runs=np.concatenate([np.zeros((0, 2), np.int32), *(runs for _, runs, _, _ in masks)]).astype(
            np.int32, copy=False
        ),
        problems=tuple(problems),
        exif=exif,
    )


def collect(reader: Reader, progress: bool = False) -> AnnotationIndex:
    """Reads and checks everything in one pass; entries that cannot be used are in `problems`.

    An image that lost a mask keeps its others (but is never clean); one that lost all is left out and `unknown`.
    """
    found = {kind: [] for kind in (ImageRecord, Problem, Note, Unread)}
    for item in tqdm(reader.records(), desc="annotations", unit="image", disable=not progress):
        found[type(item)].append(item)
    kept = [record for record in found[ImageRecord] if record.masks or record.complete]
    lost = {record.name for record in found[ImageRecord]} | {problem.image for problem in found[Problem]}
    lost -= {record.name for record in kept} | {None}
    return replace(
        pack(kept, reader.image_dir, reader.class_names, found[Problem], reader.exif),
        instances=getattr(reader, "instances", False),
        class_source=dict(getattr(reader, "class_source", {})),
        unknown=tuple(sorted(name for name in lost if os.path.lexists(os.path.join(reader.image_dir, name)))),
        unread=tuple(item.path for item in found[Unread]),
        notes=tuple(item.sentence for item in found[Note]),
    )


def build_index(reader: Reader, on_invalid: OnInvalid = "error", progress: bool = False) -> AnnotationIndex:
    """Calls `collect` and refuses problems, or with `on_invalid` "skip" an index without a usable image.

    Raises:
        UserError: there are problems and `on_invalid` is "error" (one message lists them), or no image is usable.
    """
    index = collect(reader, progress)
    if index.problems and on_invalid == "skip" and not len(index):
        raise UserError(f"no usable image of {reader.image_dir} is left: {listed(index.problems)}")
    settle(index.problems, on_invalid, reader.image_dir)
    if not len(index):
        raise UserError(f"{reader.image_dir} has no image; check the path")
    announce(index)
    return index


def announce(index: AnnotationIndex) -> None:
    """Logs the warnings about an index beyond its problems, one line per kind."""
    for sentence in remarks(index):
        log.warning("%s: %s", index.image_dir, sentence)


def remarks(index: AnnotationIndex) -> list[str]:
    """Unknown images, images that lost masks, unread files, and the notes, as sentences."""
    said = []
    if index.unknown:
        said.append(
            f"{_count(index.unknown, 'image is', 'images are')} unknown, neither defective nor clean, and left out: "
            f"{shorten(index.unknown)}"
        )
    if partial := [index.name(image) for image in np.flatnonzero(~index.complete)]:
        said.append(f"{_count(partial, 'image', 'images')} may lack masks: {shorten(partial)}")
    if index.unread:
        what = _count(index.unread, "file or folder was", "files and folders were")
        said.append(f"{what} not read: {shorten(index.unread)}")
    return said + list(index.notes)


def _count(names: Sequence[str], one: str, several: str) -> str:
    return f"{len(names)} {one if len(names) == 1 else several}"


def _by_class(record: ImageRecord) -> list[tuple[int, np.ndarray, int, bool]]:
    """(class, runs, annotation id, crowd) of each mask of a record, by class."""
    count = len(record.masks)
    columns = zip(record.masks, record.ids or [-1] * count, record.crowd or [False] * count, strict=True)
    return sorted(((*mask, annotation, crowd) for mask, annotation, crowd in columns), key=lambda mask: mask[0])


def _offsets(lengths) -> np.ndarray:
    return np.append(0, np.cumsum(np.fromiter(lengths, dtype=np.int64)))
