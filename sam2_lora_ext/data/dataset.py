"""Steel strips for SAM 2's `VOSDataset`: an item is a strip (one frame, or windows along it) and its defects.

All checks run when the data set is built, since `VOSDataset` hides errors in training: it draws another video.
"""

import logging
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from training.dataset.vos_raw_dataset import VOSFrame, VOSRawDataset, VOSVideo

from sam2_lora_ext.data.cache import cached_index
from sam2_lora_ext.data.ids import CLEAN, class_of, object_id
from sam2_lora_ext.data.items import Items, clean_part_rows, clean_rows, object_rows, read_split, select_images
from sam2_lora_ext.data.objects import ObjectMode, components_note, make_objects
from sam2_lora_ext.data.records import OnInvalid, Reader
from sam2_lora_ext.data.rle import NO_RUNS
from sam2_lora_ext.data.segments import StripPixels, StripSegmentLoader, WindowFrame
from sam2_lora_ext.data.splits import given_splits, take
from sam2_lora_ext.data.units import check_bits, look_at_units
from sam2_lora_ext.data.windows import Windows
from sam2_lora_ext.utils.errors import UserError

log = logging.getLogger(__name__)


class SeverstalRawDataset(VOSRawDataset):
    """Strips with their annotated objects.

    In training an item is an image with all its objects (the sampler picks some); a share `clean_share` of the samples
    is clean, and each of them draws a clean image or part. In evaluation every object and every clean image is in
    exactly one item, always in the same order; `video_id` is the image's row in the index, so (video_id, object_id)
    identifies an object.

    Args:
        reader: the annotation format, e.g. `sam2_lora_ext.data.kaggle.KaggleReader`.
        training: selects one of the two behaviours above.
        objects: "instances", "components", "classes", "all", or None for the format's default; see `make_objects`.
        min_area: smallest area of an object in pixels; smaller ones are left out, but their image is not clean.
        include_clean: whether clean images are used.
        clean_share: training only: the share of clean samples, 0 <= share < 1; None takes each clean image once.
        clean_part_width: training only: defect-free parts of defective strips count as clean too if they have at least
            this width in columns; None takes only entire clean images.
        split_file: a csv with the columns image and split, or without `split` a text file with one name per line;
            None takes all images, or with `split` those in the folders of that split (Supervisely's `train_split/img`).
        split: the split or splits to take; `!fold0` takes all others.
        max_objects: evaluation only: an image with more objects becomes several items; None for no bound.
        group_width: evaluation only: objects of one item span at most this number of columns, for `FixedStripCrop`.
        windows: `{width, stride, num_frames}`: the strip as a video, see `Windows`; None makes it one frame.
        on_invalid: "error" or "skip".
        bits: depth of images with more than 8 bits a channel, 8..16, see `units`; a few are checked at the start.
        cache_dir: folder for the index, so that the next start does not read the data again; None: no cache.

    Raises:
        UserError: the data or the arguments are wrong; with "error" it lists all problems of the data.
    """

    def __init__(
        self,
        reader: Reader,
        training: bool = True,
        objects: ObjectMode | None = None,
        min_area: int = 1,
        include_clean: bool = True,
        clean_share: float | None = None,
        clean_part_width: int | None = None,
        split_file: str | Path | None = None,
        split: str | Sequence[str] | None = None,
        max_objects: int | None = None,
        group_width: int | None = None,
        windows: Mapping[str, int] | None = None,
        on_invalid: OnInvalid = "error",
        bits: int = 16,
        cache_dir: str | Path | None = None,
    ):
        self.training, self.min_area, self.include_clean = training, min_area, include_clean
        self.bits = check_bits(bits)
        self.windows = None if windows is None else Windows(**windows)
        _check_clean(training, include_clean, clean_share, clean_part_width, self.windows)
        _check_evaluation(training, max_objects, group_width, self.windows)
        if min_area < 1:
            raise UserError(f"min_area is at least 1, got {min_area}")
        self.index = cached_index(reader, on_invalid, cache_dir)
        self.objects = make_objects(self.index, objects)
        if self.objects.mode == "components" and (sentence := components_note(self.index)):
            log.warning("%s: %s", self.index.image_dir, sentence)
        self.class_names = self.objects.class_names
        source = self.index.image_dir if split_file is None else split_file
        if split_file is not None:
            names = read_split(split_file, split)
        elif split is not None:
            names = self.index.names()
            names = take(list(zip(names, given_splits(names))), split, source)
        else:
            names = None
        self.images = images = select_images(self.index, names, source)  # also images without objects
        if self.windows is not None:
            self._check_widths(images)
        special = [self.index.path(image) for image in images if self.index.special[image]]
        for sentence in look_at_units(special, self.bits, self.index.exif):
            log.warning("%s: %s", source, sentence)

        keep = self.objects.areas >= min_area
        rows = object_rows(
            self.index, self.objects, images, keep, max_objects, group_width, None if training else self.windows
        )
        sound = clean_rows(self.index, images) if include_clean else []
        self._clean_pool, self._clean_slots = Items.of([]), 0
        if clean_share is None:
            rows = sorted(rows + sound, key=lambda row: row.image)
        elif clean_share > 0:
            parts = [] if clean_part_width is None else clean_part_rows(self.index, images, clean_part_width)
            self._clean_pool = Items.of(sound + parts)
            self._clean_slots = round(len(rows) * clean_share / (1 - clean_share))
            if not len(self._clean_pool):
                raise UserError(
                    f"clean_share is {clean_share}, but {source} has no clean image; set clean_share: 0, or "
                    "clean_part_width to take parts of defective strips"
                )
        self.items = Items.of(rows)
        if not len(self):
            raise UserError(
                f"{source} has no sample: {len(images)} images, in all {int(keep.sum())} objects of at least "
                f"{min_area} px, include_clean: {include_clean}"
            )
        clean = self._clean_slots + sum(not len(row.objects) for row in rows)
        log.info(
            "%s: %d images give %d samples, %d of them clean; objects of at least %d px: %d of %d",
            source,
            len(images),
            len(self),
            clean,
            min_area,
            keep.sum(),
            len(keep),
        )

    def __len__(self) -> int:
        return len(self.items) + self._clean_slots

    def classes_of(self, idx: int) -> set[int]:
        """The classes of an item's objects; empty for a clean one."""
        return set() if idx >= len(self.items) else set(class_of(self.objects.ids[self.items[idx].objects]).tolist())

    def get_video(self, idx: int) -> tuple[VOSVideo, StripSegmentLoader]:
        """The frames of an item and the loader of its masks; a clean slot draws its strip with `random`."""
        if not 0 <= idx < len(self):
            raise IndexError(f"item {idx} of {len(self)}")
        if idx < len(self.items):
            row = self.items[idx]
        else:
            row = self._clean_pool[random.randrange(len(self._clean_pool))]
        objects = {int(self.objects.ids[position]): self.objects.runs_of(position) for position in row.objects}
        objects = objects or {object_id(CLEAN, 0): NO_RUNS}
        height, width = self.index.sizes[row.image].tolist()
        path = self.index.path(row.image)
        if self.windows is None:
            windows = [(row.start, row.stop)]
        elif self.training:
            windows = self.windows.drawn(width, height, list(objects.values()))
        else:
            windows = self.windows.clip(width, row.first)
        if windows == [(0, width)] and not self.index.special[row.image]:
            frames = [VOSFrame(0, path)]
        else:
            pixels = StripPixels(self.index, row.image, self.bits)
            frames = [WindowFrame(frame, pixels, *window) for frame, window in enumerate(windows)]
        return VOSVideo(self.index.name(row.image), row.image, frames), StripSegmentLoader(
            objects, height, width, windows
        )

    def _check_widths(self, images) -> None:
        widths = self.index.sizes[images, 1]
        if widths.min() < self.windows.span:
            image = images[widths.argmin()]
            raise UserError(
                f"{self.index.name(image)} is {widths.min()} columns wide, but {self.windows.num_frames} windows of "
                f"{self.windows.width} with stride {self.windows.stride} need {self.windows.span}; lower one of them"
            )


def _check_clean(
    training: bool, include_clean: bool, share: float | None, part_width: int | None, windows: Windows | None
) -> None:
    """Refuses arguments about clean samples that contradict each other or have no effect."""
    if share is not None and not (training and 0 <= share < 1):
        raise UserError(
            f"clean_share must be at least 0, below 1, and for training (evaluation uses every clean image once, or "
            f"none with include_clean: false), got {share}"
        )
    if share and not include_clean and part_width is None:
        raise UserError(f"clean_share is {share} but include_clean is false and there is no clean_part_width")
    if part_width is not None and (not share or part_width < 1):
        raise UserError(f"clean_part_width is at least 1 and needs a clean_share above 0, got {part_width} and {share}")
    if part_width is not None and windows is not None:
        raise UserError("clean_part_width cannot be combined with windows: a part may be too narrow for a clip")


def _check_evaluation(
    training: bool, max_objects: int | None, group_width: int | None, windows: Windows | None
) -> None:
    """Refuses arguments for evaluation in training."""
    for name, value in (("max_objects", max_objects), ("group_width", group_width)):
        if value is not None and training:
            raise UserError(f"{name} is for evaluation (training: false); in training the sampler has max_num_objects")
        if value is not None and value < 1:
            raise UserError(f"{name} is at least 1, got {value}")
    if group_width is not None and windows is not None:
        raise UserError("group_width is for crops; with windows the objects are grouped by the window they begin in")
