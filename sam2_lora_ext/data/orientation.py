"""The orientation tag of an image file and the rotation for it, as in `cv2.imread` and labelling tools.

The tag is in EXIF (JPEG, PNG, WebP) or among a TIFF's own tags. Legend: H W height and width in pixels.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image

ORIENTATION = 274  # the tag, of EXIF and of TIFF
TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {  # operation that turns an image with this orientation upright
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: np.rot90,
}
BACK = {6: 8, 8: 6}  # orientation -> the one with the inverse operation; the others are their own inverse


def turned(pixels: np.ndarray, tag: int) -> np.ndarray:
    """Pixels [H, W] or [H, W, 3] turned upright by an orientation tag; 1 changes nothing."""
    return pixels if tag == 1 else TURNS[tag](pixels)


def orientation(image: Image.Image) -> int:
    """The orientation tag of an opened image that is not decoded yet, 1..8; 1 where there is none or it is damaged."""
    try:
        if image.format == "TIFF":
            tag = image.tag_v2.get(ORIENTATION, 1)
        else:
            exif = Image.Exif()
            exif.load(_late_exif(image) if image.format == "PNG" else image.info.get("exif", b""))
            tag = exif.get(ORIENTATION, 1)
    except Exception:  # `cv2.imread` and viewers ignore a damaged tag too
        return 1
    return tag if tag in TURNS else 1


def _late_exif(image: Image.Image) -> bytes:
    """EXIF of a PNG, even if it follows the pixels, which PIL would have to decode first."""
    file = image.fp
    place, where = file.tell(), 8
    try:
        while True:
            file.seek(where)
            if len(head := file.read(8)) < 8:
                return b""
            length, kind = int.from_bytes(head[:4], "big"), head[4:]
            if kind == b"eXIf":
                return b"Exif\0\0" + file.read(length)
            where += length + 12
    finally:
        file.seek(place)
