"""Draws masks over strips and grids of pictures with captions. Images are uint8 [H, W, 3], masks bool [H, W]."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sam2_lora_ext.utils.files import write_atomic

Colour = tuple[int, int, int]
TRUTH, BEFORE, AFTER, CLICK = (60, 200, 90), (240, 150, 40), (70, 150, 255), (255, 40, 40)
GAP, CAPTION = 6, 22  # pixels


def overlay(
    image: np.ndarray, mask: np.ndarray, colour: Colour, click: tuple[float, float] | None = None, scale: float = 1.0
) -> np.ndarray:
    """The image with the mask tinted and outlined, and a dot at a click (x, y).

    Args:
        image: uint8 [H, W, 3].
        mask: bool [H, W].
        colour: colour of the mask.
        click: position of the dot.
        scale: factor by which the picture will be reduced; lines and dots are enlarged by it.
    """
    picture = image.astype(np.float32)
    picture[mask] = 0.65 * picture[mask] + 0.35 * np.float32(colour)
    picture = np.ascontiguousarray(picture.round().astype(np.uint8))
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(picture, contours, -1, colour, max(1, round(scale)))
    if click is not None:
        centre = int(round(click[0])), int(round(click[1]))
        cv2.circle(picture, centre, round(4 * scale) + (scale > 1), (255, 255, 255), -1)
        cv2.circle(picture, centre, round(3 * scale), CLICK, -1)
    return picture


def save_grid(
    path: str | Path, rows: Sequence[Sequence[np.ndarray]], captions: Sequence[Sequence[str]], titles: Sequence[str]
) -> None:
    """Writes a PNG with a grid of cells of equal size, a title above each column and a caption below each cell."""
    height, width = rows[0][0].shape[:2]
    sheet = Image.new(
        "RGB", (GAP + len(titles) * (width + GAP), CAPTION + GAP + len(rows) * (height + CAPTION + GAP)), "white"
    )
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=14)
    for column, title in enumerate(titles):
        draw.text((GAP + column * (width + GAP), GAP - 2), title, fill="black", font=font)
    for r, (cells, texts) in enumerate(zip(rows, captions, strict=True)):
        top = CAPTION + GAP + r * (height + CAPTION + GAP)
        for column, (cell, text) in enumerate(zip(cells, texts, strict=True)):
            left = GAP + column * (width + GAP)
            sheet.paste(Image.fromarray(cell), (left, top))
            draw.text((left, top + height + 2), text, fill="black", font=font)
    write_atomic(path, lambda temporary: sheet.save(temporary, format="PNG", optimize=True))
