"""Tracks a clicked object through the windows of a strip with SAM 2's own video predictor, and draws the result."""

import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

TINT = (0, 180, 255)
SURE = 10.0  # bound of the logits; SAM 2 returns -1024 for a window without the object, which would dominate averages
GAP = 5  # white columns between the windows in the picture


def track(
    predictor: Any, strip: np.ndarray, windows: Sequence[tuple[int, int]], click: tuple[int, int]
) -> torch.Tensor:
    """Logits float32 [N, H, w] of the clicked object in each of N windows, clamped to -`SURE`..`SURE`.

    Args:
        predictor: a `SAM2VideoPredictor`.
        strip: uint8 [H, W, 3].
        windows: [start, stop) columns, from left to right, all of the same width.
        click: (x, y) on the strip.
    """
    holding = [position for position, (start, stop) in enumerate(windows) if start <= click[0] < stop]
    first = min(holding, key=lambda position: abs(sum(windows[position]) / 2 - click[0]))
    logits: dict[int, torch.Tensor] = {}
    for path in (range(first, len(windows)), range(first, -1, -1)):  # to the right, then to the left
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            for step, position in enumerate(path):
                start, stop = windows[position]
                Image.fromarray(strip[:, start:stop]).save(f"{folder}/{step:05d}.jpg", quality=100, subsampling=0)
            state = predictor.init_state(folder)
            points = np.array([[click[0] - windows[first][0], click[1]]], dtype=np.float32)
            predictor.add_new_points_or_box(state, frame_idx=0, obj_id=1, points=points, labels=np.array([1]))
            for position, _, found in predictor.propagate_in_video(state):
                logits[path[position]] = found[0, 0].float().cpu().clamp(-SURE, SURE)
    return torch.stack([logits[position] for position in range(len(windows))])


def draw(
    strip: np.ndarray,
    mask: np.ndarray,
    click: tuple[int, int],
    windows: Sequence[tuple[int, int]],
    tiles: np.ndarray,
) -> Image.Image:
    """Draws the strip, below it the strip with the tinted mask and the click as a cross, then the windows' masks.

    Args:
        strip: uint8 [H, W, 3].
        mask: bool [H, W].
        click: (x, y).
        windows: [start, stop) columns of N windows of the same width w.
        tiles: bool [N, H, w].
    """
    height, width = mask.shape
    shown = tint(strip, mask)
    x, y = click
    shown[y, max(x - 6, 0) : x + 7] = shown[max(y - 6, 0) : y + 7, x] = (255, 40, 40)
    step = width / len(windows)  # columns per window in the picture, including GAP white ones
    small = max(1, round(step) - GAP), max(1, round(height * (step - GAP) / (windows[0][1] - windows[0][0])))
    picture = Image.new("RGB", (width, 2 * height + GAP + small[1]), (255, 255, 255))
    picture.paste(Image.fromarray(np.concatenate([strip, shown])))
    for position, ((start, stop), tile) in enumerate(zip(windows, tiles, strict=True)):
        frame = Image.fromarray(tint(strip[:, start:stop], tile)).resize(small)
        picture.paste(frame, (round(position * step), 2 * height + GAP))
    return picture


def tint(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A copy of uint8 [H, W, 3] with the mask bool [H, W] tinted."""
    shown = pixels.copy()
    shown[mask] = (shown[mask] * 0.5 + np.array(TINT) * 0.5).astype(np.uint8)
    return shown
