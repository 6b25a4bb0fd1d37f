"""Training samples of class steps: a window of a strip with every class of the table as an object, present or not.

By default half of the windows are around a defect, the others anywhere. `class_schedule` selects the class steps. The
order of strips, the share of clean strips and the repeats of rare classes are the same as in click steps.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from training.dataset.vos_dataset import VOSDataset, load_images
from training.utils.data_utils import VideoDatapoint

from sam2_lora_ext.data.class_schedule import StepKind, kind_of_step
from sam2_lora_ext.data.class_targets import bounded, column_span, datapoint, draw_pixel, window_targets
from sam2_lora_ext.data.dataset import SeverstalRawDataset
from sam2_lora_ext.data.ids import CLEAN, class_of
from sam2_lora_ext.data.transforms import draw_start, places
from sam2_lora_ext.utils.errors import UserError

TRIES = 100  # consecutive windows without a usable class before an error


class ClassSteps:
    """The class steps of a training and their samples; an argument of `PhasedDataset`.

    Args:
        width: columns of a window, which has all rows; narrower strips are not cropped. None crops no strip.
        transforms: applied after the crop, as in `VOSDataset`.
        share: of class steps among all steps, 0 to 1; with 0 training is the same as without class steps.
        corrections: the share of class steps in which correction clicks follow the class prompt.
        around: the share of windows around an object of at least `min_area` pixels; its class is drawn first.
        max_classes: maximum number of classes per sample, present ones first, to bound memory; None for no limit.
        grid: as in `RandomStripCrop`.

    Raises:
        UserError: a number is out of its range.
    """

    def __init__(
        self,
        width: int | None,
        transforms: Sequence[Callable],
        share: float = 0.5,
        corrections: float = 0.25,
        around: float = 0.5,
        max_classes: int | None = None,
        grid: int | None = None,
    ):
        for name, value in (("share", share), ("corrections", corrections), ("around", around)):
            if not 0 <= value <= 1:
                raise UserError(f"{name} of class steps must be a share from 0 to 1, got {value}")
        for name, count in (("width", width), ("max_classes", max_classes), ("grid", grid)):
            if count is not None and count < 1:
                raise UserError(f"{name} of class steps must be at least 1 or null, got {count}")
        if width is not None and grid is not None and grid > width:
            raise UserError(f"windows of {width} columns on a grid of {grid} would skip columns: lower the grid")
        self.width, self.transforms, self.max_classes, self.grid = width, list(transforms), max_classes, grid or 1
        self.share, self.corrections, self.around = share, corrections, around

    def kinds(self, seed: int, steps: Sequence[int]) -> list[StepKind]:
        """The kind of each of some steps."""
        return [kind_of_step(seed, step, self.share, self.corrections) for step in steps]

    def check(self, dataset: Any) -> None:
        """Raises a `UserError` if a data set cannot be used for class steps."""
        raw = getattr(dataset, "video_dataset", None)
        if not isinstance(raw, SeverstalRawDataset):
            raise UserError(
                f"class steps need a VOSDataset over SeverstalRawDataset, got {type(raw or dataset).__name__}"
            )
        if raw.windows is not None or (dataset.sampler.num_frames or 1) > 1:
            raise UserError(
                "class prompts need single frames: set dataset.windows to null and scratch.num_frames to 1, or "
                "dataset.class_prompts.share to 0"
            )
        if not raw.index.complete[raw.images].any():
            raise UserError(
                f"every image of {raw.index.image_dir} has a dropped mask, so its absent classes are unknown: correct "
                "the annotations, or set dataset.class_prompts.share to 0"
            )

    def sample(self, dataset: VOSDataset, item: int, corrected: bool) -> VideoDatapoint:
        """A window of an item of a `VOSDataset`, drawn with `random`.

        Another item is drawn if the image has a dropped mask, or if all classes have only specks in the window.
        """
        raw = dataset.video_dataset
        for _ in range(TRIES):
            video, segments = raw.get_video(item)
            if raw.index.complete[video.video_id]:
                height, (first, end) = segments.height, segments.windows[0]
                start, stop = self._window(segments.objects, height, end - first)
                found = window_targets(raw.objects, video.video_id, height, (first + start, first + stop), raw.min_area)
                if found:
                    break
            item = random.randrange(len(raw))
        else:
            raise UserError(f"{TRIES} windows of {raw.index.image_dir} had no usable class: lower dataset.min_area")
        pixels = load_images(video.frames)[0].crop((start, 0, stop, height))
        sample = datapoint(pixels, bounded(found, self.max_classes), video.video_id, corrected=corrected)
        for transform in self.transforms:
            sample = transform(sample, epoch=dataset.curr_epoch)
        return sample

    def _window(self, objects: Mapping[int, np.ndarray], height: int, columns: int) -> tuple[int, int]:
        """[start, stop) of a window within [0, columns); `objects` maps ids to runs, empty for a clean part."""
        width = min(self.width or columns, columns)
        by_class: dict[int, list[np.ndarray]] = {}
        for object_id, runs in objects.items():
            if class_of(object_id) != CLEAN:
                by_class.setdefault(class_of(object_id), []).append(runs)
        if not by_class or random.random() >= self.around:
            start = random.choice(places(width, columns, self.grid))
        else:
            runs = random.choice(by_class[random.choice(sorted(by_class))])
            start = draw_start(*column_span(runs, height), draw_pixel(runs) // height, width, columns, self.grid)
        return start, start + width


class StepSamples(Dataset):
    """The samples of some steps: items of a data set, each as a click or a class sample.

    Args:
        dataset: a `VOSDataset`.
        items: indices into it.
        kinds: the kind of each item's step.
        steps: reads the samples of class steps.
    """

    def __init__(self, dataset: VOSDataset, items: Sequence[int], kinds: Sequence[StepKind], steps: ClassSteps):
        self.dataset, self.items, self.kinds, self.steps = dataset, items, kinds, steps

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, position: int) -> VideoDatapoint:
        item, kind = self.items[position], self.kinds[position]
        return self.dataset[item] if kind == "clicks" else self.steps.sample(self.dataset, item, kind == "corrected")
