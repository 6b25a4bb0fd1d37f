"""Supervisely's bitmaps: base64 of a PNG (zlib-compressed or not) whose top left pixel is at `origin` = [x, y]."""

import base64
import binascii
import io
import zlib
from typing import Any

import numpy as np
from PIL import Image

from sam2_lora_ext.data.decode import ImageError, decode
from sam2_lora_ext.data.records import InvalidData

LARGEST = 1 << 26  # bytes of a bitmap's PNG: a few base64 letters can decompress to gigabytes


class BitmapError(InvalidData):
    """A bitmap that cannot be used."""


def place_bitmap(entry: dict[str, Any], height: int, width: int) -> np.ndarray:
    """The mask bool [height, width] of one object, clipped to the image.

    Raises:
        BitmapError: it has another geometry, is invalid base64 or no PNG, or has no pixel inside the image.
    """
    if "bitmap" not in entry:
        raise BitmapError(
            "geometry",
            f"its geometry is {entry.get('geometryType')!r}, but a bitmap is expected; convert it to "
            "a bitmap in Supervisely",
        )
    bitmap = decode_bitmap(entry["bitmap"]["data"])
    x, y = (int(value) for value in entry["bitmap"]["origin"])
    mask = np.zeros((height, width), dtype=bool)
    top, left = max(y, 0), max(x, 0)
    part = bitmap[top - y : height - y if height > y else 0, left - x : width - x if width > x else 0]
    mask[top : top + part.shape[0], left : left + part.shape[1]] = part
    if not mask.any():
        raise BitmapError(
            "bitmap outside",
            f"the {bitmap.shape[1]}x{bitmap.shape[0]} bitmap at ({x}, {y}) has no pixel inside the "
            f"{width}x{height} image; correct its origin",
        )
    return mask


def decode_bitmap(data: str) -> np.ndarray:
    """bool [h, w] of base64 text, see `_shape`."""
    try:
        raw = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError, TypeError) as error:
        raise BitmapError("invalid base64", f"its bitmap is not base64 ({error}); export it again") from error
    try:
        if not raw.startswith(b"\x89PNG"):
            unpack = zlib.decompressobj()
            raw = unpack.decompress(raw, LARGEST)
            if not unpack.eof or unpack.unused_data:
                raise zlib.error("its compressed data is cut off or too long")
    except zlib.error as error:
        raise BitmapError("bitmap damaged", f"its bitmap is no PNG, neither plain nor compressed ({error})") from error
    try:
        return decode(io.BytesIO(raw), exif=False, take=_shape)
    except ImageError as error:
        cause = "bitmap too large" if error.cause == "image too large" else "bitmap damaged"
        raise BitmapError(cause, f"its bitmap cannot be used: {error}") from error


def _shape(image: Image.Image) -> np.ndarray:
    """bool [h, w]: the pixels that are not transparent, or if none is transparent, those that are not black."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        pixels = np.asarray(image.convert("RGBA"))
        opaque = pixels[..., 3] > 0
        return pixels[..., :3].any(axis=2) if opaque.all() and pixels[..., :3].any() else opaque
    pixels = np.asarray(image)
    return pixels.any(axis=2) if pixels.ndim == 3 else pixels != 0


def encode_bitmap(mask: np.ndarray) -> dict[str, Any]:
    """The `bitmap` of an object: base64(zlib(palette PNG with transparency)) of its box, and its top left pixel."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    part = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    image = Image.fromarray(part.astype(np.uint8)).convert("P")
    image.putpalette([0, 0, 0, 255, 255, 255])
    file = io.BytesIO()
    image.save(file, format="PNG", transparency=0, bits=1)
    data = base64.b64encode(zlib.compress(file.getvalue())).decode("ascii")
    return {"data": data, "origin": [int(columns[0]), int(rows[0])]}
