"""Converts pixel values of 16 bits, 12 bits in 16, or floats to 8 bits a channel, or refuses them.

Integers of at most 8 bits are grey levels already. Deeper ones must fit into `bits` and are shifted right by
`bits - 8`. Floats must lie in 0..1 and are scaled by 255.
Legend: H W height and width in pixels.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from sam2_lora_ext.data.decode import ImageError, decode
from sam2_lora_ext.settings.data import BITS
from sam2_lora_ext.utils.errors import UserError

DEPTHS = (8, 10, 12, 14, 16)  # of sensors
LOOKED_AT = 64  # images to check when training starts


def check_bits(bits: Any) -> int:
    """The depth, after a check.

    Raises:
        UserError: it is not an integer in 8..16.
    """
    BITS.check(BITS.name, bits)
    return bits


def to_eight(values: np.ndarray, bits: int = 16) -> np.ndarray:
    """Grey levels uint8 of pixels of any type, of the same shape.

    Args:
        values: [H, W] or [H, W, 3].
        bits: the depth that integers of more than 8 bits use.

    Raises:
        ImageError: a value does not fit; nothing is clipped.
    """
    if values.dtype == np.uint8:
        return values
    low, high = values.min(), values.max()
    if np.issubdtype(values.dtype, np.floating):
        if not (low >= 0 and high <= 1):  # False for NaN
            shown = f"{low:g}..{high:g}" if np.isfinite(values).all() else "not all finite"
            raise ImageError(
                "float values",
                f"its floats must lie in 0..1, but they are {shown}; divide them by the largest value that the camera "
                "can give, or save the image with 8 or 16 bits",
            )
        return np.rint(values * 255).astype(np.uint8)
    if low < 0 or high >= 1 << bits:
        depth = next((depth for depth in range(bits + 1, 17) if high < 1 << depth), None)
        todo = "save it with 16 bits" if low < 0 or depth is None else f"set dataset.bits (--bits) to at least {depth}"
        raise ImageError(
            "value out of range",
            f"its value {low if low < 0 else high:,} does not fit into {bits} bits (0..{(1 << bits) - 1:,}); {todo}",
        )
    return (values >> (bits - 8)).astype(np.uint8)


def unit_warning(largest: int, count: int, bits: int) -> str | None:
    """A warning if images use so little of their depth that a smaller one is likely.

    Args:
        largest: the largest value of all.
        count: number of checked images of more than 8 bits a channel.
        bits: the configured depth.
    """
    depth = next(depth for depth in DEPTHS if largest < 1 << depth)
    if not count or depth >= bits:
        return None
    images = "1 image" if count == 1 else f"{count} images"
    used = f"the largest value of {images} is {largest:,} of {(1 << bits) - 1:,}"
    return f"{used}: set dataset.bits={depth} (--bits {depth})"


def look_at_units(paths: Sequence[str], bits: int, exif: bool = True, most: int = LOOKED_AT) -> list[str]:
    """Decodes some images and checks their values with `unit_warning`.

    Args:
        paths: images of an index that are special.
        bits: the configured depth.
        exif: whether to turn images upright.
        most: number of images to decode, evenly spaced.

    Raises:
        UserError: an image cannot be decoded, or a value does not fit.
    """
    largest, deep = 0, 0
    for path in spread(paths, most):
        try:
            values = decode(path, exif)
            to_eight(values, bits)
        except ImageError as error:
            raise UserError(f"{path}: {error}") from error
        if is_deep(values):
            largest, deep = max(largest, int(values.max())), deep + 1
    warning = unit_warning(largest, deep, bits)
    return [] if warning is None else [warning]


def spread(items: Sequence[Any], most: int) -> list[Any]:
    """All items, or `most` of them at equal distances."""
    count = min(most, len(items))
    return [items[position * len(items) // count] for position in range(count)]


def is_deep(values: np.ndarray) -> bool:
    """Whether these are integers of more than 8 bits."""
    return values.dtype != np.uint8 and np.issubdtype(values.dtype, np.integer)
