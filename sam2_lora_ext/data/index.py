"""All annotations of a data set in a few numpy arrays: small, quick to pickle, the same for every reader.

Legend: N images, M masks, R runs of all masks.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from sam2_lora_ext.data.records import ImageRecord, OnInvalid, Problem, Reader, settle
from sam2_lora_ext.errors import UserError

DIGESTED = {  # array -> its type in the digest
    "name_bytes": "u1", "name_offsets": "<i8", "sizes": "<i8", "complete": "u1", "mask_offsets": "<i8",
    "mask_class": "<i8", "mask_id": "<i8", "run_offsets": "<i8", "runs": "<i8",
}  # fmt: skip


@dataclass
class AnnotationIndex:
    """Images sorted by name; image i has the masks `mask_offsets[i]..mask_offsets[i + 1]`, mask m the runs
    `runs[run_offsets[m]:run_offsets[m + 1]]`."""

    image_dir: str
    class_names: dict[int, str]
    name_bytes: np.ndarray  # uint8: UTF-8 names without separators
    name_offsets: np.ndarray  # int64 [N + 1]
    sizes: np.ndarray  # int32 [N, 2] of (H, W)
    deep: np.ndarray  # bool [N]: more than 8 bits a channel
    complete: np.ndarray  # bool [N]: no mask of the image was dropped
    mask_offsets: np.ndarray  # int64 [N + 1]
    mask_class: np.ndarray  # int16 [M]
    run_offsets: np.ndarray  # int64 [M + 1]
    runs: np.ndarray  # int32 [R, 2] of (start, length)
    problems: tuple[Problem, ...] = ()  # what was left out

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
        """SHA-256 of the content: names, sizes, class table, masks and their ids, what is incomplete or unknown, how
        images are turned; neither paths nor pixels."""
        digest = hashlib.sha256()
        facts = [sorted(self.class_names.items()), getattr(self, "exif", None), list(getattr(self, "unknown", ()))]
        digest.update(json.dumps(facts).encode())
        for name, kind in DIGESTED.items():
            values = np.ascontiguousarray(getattr(self, name, ()), dtype=kind)
            digest.update(f"{name} {values.shape}\n".encode())
            digest.update(values)
        return digest.hexdigest()

    def subset(self, images: np.ndarray) -> "AnnotationIndex":
        """The index of these images alone; problems are not carried over."""
        records = [
            ImageRecord(
                self.name(image),
                *self.sizes[image].tolist(),
                self.masks(image),
                bool(self.deep[image]),
                bool(self.complete[image]),
            )
            for image in images
        ]
        return pack(records, self.image_dir, self.class_names)


def pack(
    records: Sequence[ImageRecord], image_dir: str | Path, class_names: dict[int, str], problems: Sequence[Problem] = ()
) -> AnnotationIndex:
    """Packs records into arrays: images by name, the masks of an image by class (those of one class as they came)."""
    records = sorted(records, key=lambda record: record.name)
    masks = [mask for record in records for mask in sorted(record.masks, key=lambda mask: mask[0])]
    names = [record.name.encode("utf-8", "surrogateescape") for record in records]
    return AnnotationIndex(
        image_dir=str(image_dir),
        class_names=dict(class_names),
        name_bytes=np.frombuffer(b"".join(names), dtype=np.uint8),
        name_offsets=_offsets(map(len, names)),
        sizes=np.array([(record.height, record.width) for record in records], dtype=np.int32).reshape(-1, 2),
        deep=np.array([record.deep for record in records], dtype=bool),
        complete=np.array([record.complete for record in records], dtype=bool),
        mask_offsets=_offsets(len(record.masks) for record in records),
        mask_class=np.array([class_id for class_id, _ in masks], dtype=np.int16),
        run_offsets=_offsets(len(runs) for _, runs in masks),
        runs=np.concatenate([np.zeros((0, 2), np.int32), *(runs for _, runs in masks)]).astype(np.int32, copy=False),
        problems=tuple(problems),
    )


def collect(reader: Reader, progress: bool = False) -> AnnotationIndex:
    """Reads and checks everything in one pass; what cannot be used is in `problems`.

    An image that lost a mask keeps its others (but is never clean); one that lost all its masks is left out.
    """
    records, problems = [], []
    for item in tqdm(reader.records(), desc="annotations", unit="image", disable=not progress):
        (problems if isinstance(item, Problem) else records).append(item)
    records = [record for record in records if record.masks or record.complete]
    return pack(records, reader.image_dir, reader.class_names, problems)


def build_index(reader: Reader, on_invalid: OnInvalid = "error", progress: bool = False) -> AnnotationIndex:
    """`collect`, for use: no problems, or with `on_invalid` "skip" at least one usable image.

    Raises:
        UserError: problems with "error" (all of them in one message), or nothing usable.
    """
    index = collect(reader, progress)
    settle(index.problems, on_invalid if len(index) else "error", reader.image_dir)
    if not len(index):
        raise UserError(f"{reader.image_dir} has no image; check the path")
    return index


def _offsets(lengths) -> np.ndarray:
    return np.append(0, np.cumsum(np.fromiter(lengths, dtype=np.int64)))
