"""Masks and pixels of one strip, as SAM 2's `VOSDataset` reads them: decoded only when used.

A frame shows the columns [start, stop) of the strip; column-major runs are cut without decoding the rest.
Legend: H W height and width of the frame in pixels.
"""

from collections.abc import Sequence
from functools import cached_property, partial

import numpy as np
import torch
from training.dataset.vos_segment_loader import LazySegments

from sam2_lora_ext.data.index import AnnotationIndex
from sam2_lora_ext.data.rle import crop_columns, decode_runs


class RunSegments(LazySegments):
    """object id -> mask uint8 [H, W]; `segments` holds runs, decoded on access."""

    def __init__(self, height: int, width: int):
        super().__init__()
        self.size = (height, width)

    def __getitem__(self, key: int) -> torch.Tensor:
        if key not in self.cache:
            self.cache[key] = torch.from_numpy(decode_runs(self.segments[key], *self.size))
        return self.cache[key]

    def items(self):
        """(id, mask) pairs, for samplers that read every mask."""
        return ((key, self[key]) for key in self.keys())


class StripSegmentLoader:
    """`load(frame_idx)` returns the objects in the frame; a clean object (no runs) is in every frame.

    Args:
        objects: object id -> runs on the whole strip.
        height: H of the strip.
        width: W of the strip.
        windows: [start, stop) columns of each frame.
    """

    def __init__(self, objects: dict[int, np.ndarray], height: int, width: int, windows: Sequence[tuple[int, int]]):
        self.objects = objects
        self.height = height
        self.width = width
        self.windows = windows
        self._loaded = {}

    def load(self, frame_idx: int) -> RunSegments:
        if frame_idx not in self._loaded:
            start, stop = self.windows[frame_idx]
            whole = (start, stop) == (0, self.width)
            segments = RunSegments(self.height, stop - start)
            for object_id, runs in self.objects.items():
                visible = runs if whole else crop_columns(runs, self.height, start, stop)
                if len(visible) or not len(runs):
                    segments[object_id] = visible
            self._loaded[frame_idx] = segments
        return self._loaded[frame_idx]


class StripPixels:
    """The pixels of one strip of an index, decoded once for all its frames."""

    def __init__(self, index: AnnotationIndex, image: int, bits: int):
        self.path = index.path(image)
        self._read = partial(index.read, image, bits)

    @cached_property
    def rgb(self) -> np.ndarray:
        """uint8 [H, W, 3]."""
        return self._read()


class WindowFrame:
    """A `VOSFrame` of the columns [start, stop) of a strip, cut out when `data` is read."""

    is_conditioning_only = False

    def __init__(self, frame_idx: int, pixels: StripPixels, start: int, stop: int):
        self.frame_idx = frame_idx
        self.image_path = pixels.path
        self._pixels = pixels
        self._columns = slice(start, stop)

    @cached_property
    def data(self) -> torch.Tensor:
        """float32 [3, H, W] in 0..1. SAM 2 converts it back by truncating x * 255, so 0.5 is added."""
        crop = self._pixels.rgb[:, self._columns]
        return torch.from_numpy((crop.astype(np.float32) + 0.5) / 255).permute(2, 0, 1)
