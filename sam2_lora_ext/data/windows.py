"""A strip as a video: overlapping windows that move along it, as a line-scan camera sees it.

Legend: T frames of a clip, n windows of a strip; columns in pixels from the left, half open.
"""

import random

import numpy as np

from sam2_lora_ext.data.rle import crop_columns
from sam2_lora_ext.utils.errors import UserError


class Windows:
    """Cuts strips into clips.

    Args:
        width: columns of a window.
        stride: columns by which it moves from frame to frame; less than `width`, so that windows overlap.
        num_frames: T, the frames of a clip.
    """

    def __init__(self, width: int, stride: int, num_frames: int):
        if not 1 <= stride < width:
            raise UserError(f"windows must overlap: stride {stride} must be at least 1 and below the width {width}")
        if num_frames < 2:
            raise UserError(
                f"a clip has at least 2 frames, got num_frames: {num_frames}; without windows a strip is one frame"
            )
        self.width = width
        self.stride = stride
        self.num_frames = num_frames

    @property
    def span(self) -> int:
        """Columns that a clip needs."""
        return self.width + (self.num_frames - 1) * self.stride

    def drawn(self, columns: int, height: int, objects: list[np.ndarray]) -> list[tuple[int, int]]:
        """Windows for training: all steps equal, the offset of the first drawn with `random`.

        Some columns at an end may be in no window; if no object is in any window, the fixed windows are taken.

        Args:
            columns: W of the strip.
            height: H of the strip.
            objects: the runs of each; those of a clean object are empty.
        """
        offset = random.randint(0, (columns - self.width) % self.stride)
        windows = [(start, start + self.width) for start in range(offset, columns - self.width + 1, self.stride)]
        seen = any(len(crop_columns(runs, height, offset, windows[-1][1])) or not len(runs) for runs in objects)
        return windows if seen else self.fixed(columns)

    def fixed(self, columns: int) -> list[tuple[int, int]]:
        """Windows for evaluation: they cover every column, so the last step may be shorter."""
        starts = list(range(0, columns - self.width, self.stride)) + [columns - self.width]
        return [(start, start + self.width) for start in starts]

    def clip(self, columns: int, first: int) -> list[tuple[int, int]]:
        """T fixed windows from the `first` on: to the right if the strip is long enough, else see `walk`."""
        windows = self.fixed(columns)
        return [windows[position] for position in walk(first, self.num_frames, len(windows), 1)]

    def best_window(self, runs: np.ndarray, height: int, columns: int) -> int:
        """The fixed window with the most pixels of an object (the leftmost of equals), where its clip begins."""
        return int(np.argmax([crop_columns(runs, height, *window)[:, 1].sum() for window in self.fixed(columns)]))


def fits(first: int, count: int, length: int) -> bool:
    """Whether `count` positions from `first` on are within [0, length) in at least one direction."""
    return first + count <= length or first - count + 1 >= 0


def walk(first: int, count: int, length: int, step: int) -> list[int]:
    """`count` neighbouring positions of [0, length) from `first` on.

    They run in the direction `step` (1 or -1) if that fits, else in the other; if neither fits, they turn at the end.
    """
    for way in (step, -step):
        if 0 <= first + way * (count - 1) < length:
            return list(range(first, first + way * count, way))
    places = [first]
    while len(places) < count:
        step = step if 0 <= places[-1] + step < length else -step
        places.append(places[-1] + step)
    return places
