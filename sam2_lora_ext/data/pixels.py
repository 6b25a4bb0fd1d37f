"""Brightness, and the conversion to the model's input: the same numbers as SAM 2's own transforms, faster.

Legend: H W height and width of a frame in pixels, S side of the model's square input.
"""

import math
import random
from collections.abc import Sequence

import cv2
import numpy as np
import torch
from PIL import Image
from torchvision.transforms import functional as F
from torchvision.transforms.v2 import functional as F2
from training.utils.data_utils import VideoDatapoint

from sam2_lora_ext.utils.errors import UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of SAM 2's input, R G B in 0..1


class RandomBrightnessContrast:
    """v -> clip(mean + c * (v - mean)) * b on all frames, with b and c drawn once.

    `mean` is the mean of the first frame, so that contrast does not change the brightness.

    Args:
        brightness: b is drawn from [1 - brightness, 1 + brightness].
        contrast: c is drawn from [1 - contrast, 1 + contrast].
    """

    def __init__(self, brightness: float = 0.1, contrast: float = 0.1):
        if not (0 <= brightness <= 1 and 0 <= contrast <= 1):
            raise UserError(f"brightness and contrast are in 0..1, got {brightness} and {contrast}")
        self.brightness = brightness
        self.contrast = contrast

    def __call__(self, datapoint: VideoDatapoint, **kwargs) -> VideoDatapoint:
        b = random.uniform(1 - self.brightness, 1 + self.brightness)
        c = random.uniform(1 - self.contrast, 1 + self.contrast)
        mean = float(np.asarray(datapoint.frames[0].data).mean())
        table = np.clip(np.rint((mean + c * (np.arange(256) - mean)) * b), 0, 255).astype(np.uint8).tolist()
        for frame in datapoint.frames:
            frame.data = frame.data.point(table * len(frame.data.getbands()))
        return datapoint


class ModelInput:
    """The last transform: squashes, converts to tensors and normalises, for `RandomResizeAPI`, `ToTensorAPI` and
    `NormalizeAPI` in one.

    A mask that would be empty after resizing gets every pixel that it touches, so no object becomes a negative example.

    Args:
        size: S.
        mean: of R, G, B in 0..1; SAM 2's by default.
        std: of R, G, B in 0..1.
        normalise: False leaves the image uint8 [S, S, 3], for `sam2_lora_ext.data.collate.collate_fn`, which normalises
            it directly into the batch.
    """

    def __init__(self, size: int, mean: Sequence[float] = MEAN, std: Sequence[float] = STD, normalise: bool = True):
        if size < 1:
            raise UserError(f"size is the side of the model's input in pixels, got {size}")
        self.size = size
        self.table = level_table(mean, std) if normalise else None

    def __call__(self, datapoint: VideoDatapoint, **kwargs) -> VideoDatapoint:
        for frame in datapoint.frames:
            image = resize_image(frame.data, self.size)
            if self.table is None:
                frame.data = torch.from_numpy(image)
            else:
                frame.data = torch.empty(3, self.size, self.size)
                write_normalised(image, self.table, frame.data.numpy())
            for obj in frame.objects:
                obj.segment = resize_mask(obj.segment, self.size)
        return datapoint


def level_table(mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> np.ndarray:
    """float32 [3, 256]: the normalised value of each grey level of R, G, B."""
    levels = np.arange(256, dtype=np.float32)[None] / np.float32(255)
    mean, std = (np.array(values, dtype=np.float32)[:, None] for values in (mean, std))
    return (levels - mean) / std


def write_normalised(image: np.ndarray, table: np.ndarray, out: np.ndarray) -> None:
    """Writes uint8 [S, S, 3] into `out` float32 [3, S, S] by table: bitwise equal to (v / 255 - mean) / std."""
    for channel, plane in enumerate(cv2.split(image)):
        cv2.LUT(plane, table[channel], dst=out[channel])


def resize_image(image: Image.Image, size: int) -> np.ndarray:
    """RGB image -> uint8 [S, S, 3], bilinear with antialiasing (at most one grey level off PIL's own, and faster)."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return F2.resize(pixels, [size, size], antialias=True).permute(1, 2, 0).numpy()


def resize_mask(mask: torch.Tensor, size: int) -> torch.Tensor:
    """uint8 [H, W] of 0 and 1 -> [S, S]: bitwise equal to SAM 2's `resize`, but empty only if `mask` is.

    Only the part around the object is resized.
    """
    pixels = mask.numpy()
    small = torch.zeros(size, size, dtype=torch.uint8)
    rows, columns = np.flatnonzero(pixels.any(axis=1)), np.flatnonzero(pixels.any(axis=0))
    if not len(rows):
        return small
    top, bottom, out_top, out_bottom = _aligned(rows[0], rows[-1] + 1, pixels.shape[0], size)
    left, right, out_left, out_right = _aligned(columns[0], columns[-1] + 1, pixels.shape[1], size)
    part = mask[
        None, None, top:bottom, left:right
    ]  # same shape as in SAM 2: other shapes use a kernel that rounds differently
    shrunk = F.resize(part, [out_bottom - out_top, out_right - out_left])[0, 0]
    small[out_top:out_bottom, out_left:out_right] = shrunk
    if not shrunk.any():
        y, x = np.nonzero(pixels)
        small[y * size // pixels.shape[0], x * size // pixels.shape[1]] = 1
    return small


def _aligned(first: int, last: int, length: int, size: int) -> tuple[int, int, int, int]:
    """A part of [0, length) around [first, last) with room for the filter, aligned with output pixels: (start, stop)
    before and (start, stop) after `length` is resized to `size`."""
    blocks = math.gcd(length, size)
    before, after = length // blocks, size // blocks
    room = 2 * math.ceil(max(1.0, length / size)) + 1
    start = max(0, (int(first) - room) // before)
    stop = min(blocks, -((-int(last) - room) // before))
    return start * before, stop * before, start * after, stop * after
