"""Decodes an image file as viewers show it: one page of limited size, turned by its orientation tag.

PIL decodes; the checksums of PNG and TIFF, which PIL ignores, are verified first. PIL keeps only the high bytes of
colour images with 16 bits a channel, so OpenCV decodes these too.
Legend: H W height and width in pixels.
"""

import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from sam2_lora_ext.data import tiff
from sam2_lora_ext.data.orientation import BACK, ORIENTATION, orientation, turned
from sam2_lora_ext.data.records import InvalidData
from sam2_lora_ext.utils.errors import UserError
from sam2_lora_ext.utils.files import open_regular

IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "GIF", "WEBP")  # by content; suffixes are ignored
DEEP_MODES = frozenset({"I", "I;16", "I;16B", "I;16L", "I;16N", "F"})
FLAT_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"})
LIMIT = "SAM2_LORA_MAX_PIXELS"  # the environment variable
MOST_PIXELS = 178_956_970  # default: PIL's own limit
Source = str | Path | io.BytesIO


class ImageError(InvalidData):
    """An image file that cannot be used."""


@contextmanager
def opened(source: Source) -> Iterator[Image.Image]:
    """Opens an image and reads its header only; inside the `with`, our size limit replaces PIL's.

    Raises:
        ImageError: it cannot be opened, is too large, has several pages or an unsupported mode; any other error inside
            the `with` becomes an `ImageError` too.
        UserError: the limit is not a number.
    """
    limit = most_pixels()
    kept, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with _file(source) as file, Image.open(file, formats=IMAGE_FORMATS) as image:
            _check_header(image, limit)
            yield image
    except (UserError, InvalidData):
        raise
    except Exception as error:  # decoders raise many kinds of errors for a damaged file
        raise explain(error, source) from error
    finally:
        Image.MAX_IMAGE_PIXELS = kept


def _file(source: Source) -> BinaryIO:
    """Opens the file here, since PIL memory-maps some TIFFs when it gets a path, and then turns them wrongly."""
    if isinstance(source, io.BytesIO):
        return io.BytesIO(source.getvalue())
    try:
        return open_regular(source)
    except UserError as error:
        if isinstance(error.__cause__, (OSError, ValueError)):
            raise error.__cause__ from None
        sentence = "it is a folder, pipe or device instead of an image; remove it"
        raise ImageError("not a file", sentence) from error


def most_pixels() -> int:
    """The largest allowed number of pixels of an image, from the environment."""
    text = os.environ.get(LIMIT) or str(MOST_PIXELS)
    if not (text.isascii() and text.isdigit() and int(text)):
        raise UserError(f"the environment variable {LIMIT} is a number of pixels, got {text!r}")
    return int(text)


def _check_header(image: Image.Image, limit: int) -> None:
    width, height = image.size
    if width * height > limit:
        raise ImageError(
            "image too large",
            f"the image has {width}x{height} = {width * height:,} pixels, more than the limit of {limit:,}; cut it and "
            f"its annotations into tiles, or raise the environment variable {LIMIT} if there is enough memory",
        )
    if (count := pages(image)) > 1:
        raise ImageError(
            "several pages", f"the file has {count} pages, but only one would be read; save each page as a file"
        )
    if image.mode not in DEEP_MODES | FLAT_MODES:
        raise ImageError("image mode", f"the image has the unsupported mode {image.mode}; save it as RGB")
    if image.format == "TIFF":
        tiff.check_tags(image)
        if image.mode in DEEP_MODES and image.tag_v2[tiff.PHOTOMETRIC] == 0:  # PIL inverts only fewer bits
            raise ImageError("image mode", "this TIFF of more than 8 bits stores white as 0; save it with black as 0")


def pages(image: Image.Image) -> int:
    """The number of images in a file; 1 when all others are previews or masks of the first.

    A TIFF marks such pages. In the JPEGs of cameras (MPO) the others are always previews, depth or gain maps, and every
    program reads the first.
    """
    count = getattr(image, "n_frames", 1)
    if count == 1 or image.format == "MPO":
        return 1
    if image.format != "TIFF":
        return count
    previews = []
    for page in range(count):
        image.seek(page)
        previews.append(tiff.is_preview(image))
    image.seek(0)
    return 1 if previews == [False] + [True] * (count - 1) else count


def stored_size(image: Image.Image) -> tuple[int, int]:
    """(W, H) as stored."""
    return tiff.stored_size(image) if image.format == "TIFF" else image.size


def is_wide(image: Image.Image) -> bool:
    """Whether an opened image that is not decoded yet has colours with 16 bits a channel."""
    rawmode = image.tile[0].args if image.tile else ""
    rawmode = rawmode if isinstance(rawmode, str) else (rawmode or [""])[0]
    return image.mode not in DEEP_MODES and ";16" in str(rawmode)


def values(image: Image.Image) -> np.ndarray:
    """The pixels of a decoded image, [H, W] or [H, W, 3]: uint8, or unchanged for deeper modes; without alpha."""
    if image.mode in DEEP_MODES or image.mode == "L":
        return np.array(image)
    return np.array(image.convert("L" if image.mode in ("1", "LA") else "RGB"))


def decode(
    source: Source, exif: bool = True, take: Callable[[Image.Image], np.ndarray] = values, whole: bool = True
) -> np.ndarray:
    """The pixels of an image file, without any scaling.

    Args:
        source: the file, or its content.
        exif: turn it upright by its orientation tag; False leaves it as stored.
        take: converts the decoded image to the array [H, W] or [H, W, 3].
        whole: returns all 16 bits of 16-bit colours (uint16); False returns the high bytes.

    Raises:
        ImageError: it is damaged or cannot be used, see `opened`.
    """
    with opened(source) as image:
        tag, wide = orientation(image), whole and is_wide(image)
        if image.format == "PNG":
            image.verify()  # the checksums, which decoding alone ignores
        elif image.format == "TIFF":
            tiff.check_sums(image)
    with opened(source) as image:
        image.info.pop("xmp", None)  # PIL would turn a TIFF by its XMP data too, which `cv2.imread` ignores
        image.load()
        pixels = take(image)
        done = image.format == "TIFF" and ORIENTATION not in image.tag_v2  # PIL turns TIFFs while it decodes them
        if wide:
            pixels = _wide(source, pixels)
    if exif != done:
        pixels = turned(pixels, tag if exif else BACK.get(tag, tag))
    return np.ascontiguousarray(pixels)


def _wide(source: Source, high: np.ndarray) -> np.ndarray:
    """uint16 [H, W] or [H, W, 3] by OpenCV, if its high bytes agree with PIL's result."""
    import cv2

    with _file(source) as file:
        content = file.read()
    found = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    if found is not None and found.ndim == 3:
        found = found[..., 0] if high.ndim == 2 else found[..., 2::-1]
    if found is None or found.dtype != np.uint16 or not np.array_equal(found >> 8, high):
        raise ImageError(
            "image mode",
            "this kind of 16 bit colours cannot be read; save it as a PNG without an orientation tag",
        )
    return found


def explain(error: Exception, source: Source) -> ImageError:
    """The `ImageError` for an error of opening or decoding an image."""
    if isinstance(error, UnidentifiedImageError):
        return _unknown(source)
    if isinstance(error, MemoryError):
        return ImageError("image too large", "there is not enough memory for the image; cut it into tiles")
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    if isinstance(error, OSError):
        if error.errno == errno.ENOENT:
            return ImageError("image missing", "the image does not exist (or is a broken link); add it")
        if error.errno == errno.ELOOP:
            return ImageError("link loop", "the image is a symbolic link that leads to itself; remove it")
        if error.errno in (errno.EACCES, errno.EPERM):
            return ImageError("no permission", "there is no permission to read the image; change its permissions")
        if error.errno is not None:  # PIL's own errors have none
            return ImageError("image unreadable", f"the image cannot be opened ({text}); check its path and the disk")
    return ImageError("image damaged", f"the image cannot be decoded ({text}); fetch it again")


def _unknown(source: Source) -> ImageError:
    """The `ImageError` for a file that PIL does not recognise as an image."""
    with _file(source) as file:
        content = file.read(4)
    if not content:
        return ImageError("image empty", "the image file has zero bytes; fetch it again")
    if content in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return ImageError(
            "image mode",
            "this TIFF cannot be read: its kind of pixels is unknown (floats in colour, 64 bits), or its header is "
            "damaged; save it again with 8 or 16 bits a channel",
        )
    return ImageError("not an image", f"the file is none of {', '.join(IMAGE_FORMATS)}; replace it")
