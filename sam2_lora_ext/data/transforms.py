"""Crops and flips of strips, for SAM 2's `VideoDatapoint` and with the interface of its own transforms.

Each transform draws once (with `random`) for all frames. Frames are PIL images and masks uint8 [H, W]; x counts columns
and y rows from the top left. Legend: H W height and width in pixels.
"""

import random
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from training.utils.data_utils import Object, VideoDatapoint

from sam2_lora_ext.data.ids import CLEAN, class_of
from sam2_lora_ext.data.images import DARK
from sam2_lora_ext.utils.errors import UserError


class RandomStripCrop:
    """Cuts a random window around one of the objects, chosen at random.

    The window contains the object if it fits, else a uniformly drawn pixel of it. Other objects are dropped when they
    have no pixel in the first frame: an object outside the window must not become a negative example. A clean object
    keeps its empty mask; at least half of its window is exposed steel.

    Args:
        width: W of the window; a narrower strip is not cropped. None takes the full width.
        height: H of the window; None takes the full height.
        grid: the window begins at a multiple of this number of columns, or at the last position, so that a feature
            cache gets few different windows. An object that fits into no such window is cut. None allows every one.
    """

    def __init__(self, width: int | None, height: int | None = None, grid: int | None = None):
        self.width = None if width is None else _positive("width", width)
        self.height = None if height is None else _positive("height", height)
        self.grid = 1 if grid is None else _positive("grid", grid)
        if self.width is not None and self.grid > self.width:
            raise UserError(
                f"crops of {self.width} columns at multiples of {self.grid} would leave columns out: lower the grid"
            )

    def __call__(self, datapoint: VideoDatapoint, **kwargs) -> VideoDatapoint:
        height, width = datapoint.size
        window = min(self.height or height, height), min(self.width or width, width)
        target = random.choice(datapoint.frames[0].objects)
        if class_of(target.object_id) == CLEAN:
            return crop(datapoint, *self._sound_corner(datapoint, window), *window)
        rows, columns = torch.nonzero(target.segment, as_tuple=True)
        if not len(rows):
            raise ValueError(f"object {target.object_id} of video {datapoint.video_id} has no pixel in the first frame")
        pixel = random.randrange(len(rows))
        y = draw_start(int(rows.min()), int(rows.max()), int(rows[pixel]), window[0], height)
        x = draw_start(int(columns.min()), int(columns.max()), int(columns[pixel]), window[1], width, self.grid)
        return crop(datapoint, y, x, *window)

    def _sound_corner(self, datapoint: VideoDatapoint, window: tuple[int, int]) -> tuple[int, int]:
        """(y, x) of a random window that is at least half exposed, or if there is none, of any window."""
        height, width = datapoint.size
        y = random.randint(0, height - window[0])
        lit = np.asarray(datapoint.frames[0].data.convert("L"))[y : y + window[0]] > DARK
        sums = np.append(0, np.cumsum(lit.sum(axis=0)))
        lit_enough = sums[window[1] :] - sums[: -window[1]] >= window[0] * window[1] / 2
        starts = places(window[1], width, self.grid)
        return y, random.choice([x for x in starts if lit_enough[x]] or starts)


class FixedStripCrop:
    """Cuts a window around the objects, the same each time, for evaluation.

    The window is centred on the box around all objects; if they do not fit, it covers most of their pixels. On a clean
    strip it is centred on the exposed part.

    Args:
        width: W of the window; None does not crop.
    """

    def __init__(self, width: int | None):
        self.width = None if width is None else _positive("width", width)

    def __call__(self, datapoint: VideoDatapoint, **kwargs) -> VideoDatapoint:
        height, width = datapoint.size
        if self.width is None or self.width >= width:
            return datapoint
        weight = sum(obj.segment.sum(dim=0, dtype=torch.int64) for obj in datapoint.frames[0].objects).numpy()
        if not weight.any():
            weight = (np.asarray(datapoint.frames[0].data.convert("L")) > DARK).sum(axis=0)
        used = np.flatnonzero(weight)
        left, right = (used[0], used[-1] + 1) if len(used) else (0, width)
        x = int(np.clip((left + right - self.width) // 2, 0, width - self.width))
        if right - left > self.width:
            sums = np.cumsum(np.append(0, weight))
            inside = sums[self.width :] - sums[: -self.width]  # pixels in the window that starts at each column
            best = np.flatnonzero(inside == inside.max())
            x = int(best[np.argmin(np.abs(best - x))])
        before = len(datapoint.frames[0].objects)
        datapoint = crop(datapoint, 0, x, height, self.width)
        if len(datapoint.frames[0].objects) < before:
            raise UserError(
                f"a crop of {self.width} columns does not show all objects of video {datapoint.video_id}; set "
                f"the data set's group_width: {self.width}, so that evaluation counts all of them"
            )
        return datapoint


class RandomHorizontalFlip:
    """Mirrors left and right with probability `p`."""

    def __init__(self, p: float = 0.5):
        self.p = p

    def __call__(self, datapoint: VideoDatapoint, **kwargs) -> VideoDatapoint:
        return _flip(datapoint, Image.Transpose.FLIP_LEFT_RIGHT, 1) if random.random() < self.p else datapoint


class RandomVerticalFlip:
    """Mirrors top and bottom with probability `p`."""

    def __init__(self, p: float = 0.5):
        self.p = p

    def __call__(self, datapoint: VideoDatapoint, **kwargs) -> VideoDatapoint:
        return _flip(datapoint, Image.Transpose.FLIP_TOP_BOTTOM, 0) if random.random() < self.p else datapoint


def crop(datapoint: VideoDatapoint, y: int, x: int, height: int, width: int) -> VideoDatapoint:
    """Cuts all frames to one window and drops the objects without a pixel in the first frame (clean ones stay)."""
    for frame in datapoint.frames:
        frame.data = frame.data.crop((x, y, x + width, y + height))
        for obj in frame.objects:
            obj.segment = obj.segment[y : y + height, x : x + width]
    kept = {obj.object_id for obj in datapoint.frames[0].objects if _shown(obj)}
    for frame in datapoint.frames:
        frame.objects = [obj for obj in frame.objects if obj.object_id in kept]
    datapoint.size = (height, width)
    return datapoint


def _shown(obj: Object) -> bool:
    return class_of(obj.object_id) == CLEAN or bool(obj.segment.any())


def places(window: int, length: int, grid: int) -> list[int]:
    """Possible starts of a window within [0, length): the multiples of `grid`, and the last position."""
    return [*range(0, length - window, grid), length - window]


def draw_start(first: int, last: int, pixel: int, window: int, length: int, grid: int = 1) -> int:
    """A random start of a window within [0, length) that contains [first, last], or if none can, `pixel`."""
    starts = places(window, length, grid)
    whole = [start for start in starts if last - window < start <= first]
    return random.choice(whole or [start for start in starts if pixel - window < start <= pixel])


def _flip(datapoint: VideoDatapoint, how: Image.Transpose, axis: int) -> VideoDatapoint:
    for frame in datapoint.frames:
        frame.data = frame.data.transpose(how)
        for obj in frame.objects:
            obj.segment = obj.segment.flip(axis)
    return datapoint


def _positive(name: str, value: int) -> int:
    if isinstance(value, Sequence) or value < 1:
        raise UserError(f"{name} must be a number of pixels, at least 1, got {value!r}")
    return value
