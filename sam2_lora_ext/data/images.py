"""Image files: which there are, whether they can be read, how large they are, and their pixels as 8-bit RGB.

Legend: H W height and width in pixels.
"""

import errno
import os
import stat
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from sam2_lora_ext.data.records import InvalidData, is_text
from sam2_lora_ext.errors import UserError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff"})
DARK = 16  # a grey level at most so high (of 255) is unexposed, not steel
DEEP_MODES = frozenset({"I", "I;16", "I;16B", "I;16L", "I;16N", "F"})
LITTER = frozenset({"thumbs.db", "desktop.ini"})
_TAILS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}  # what an undamaged file of the kind ends with


class ImageError(InvalidData):
    """An image file that cannot be used."""


def list_images(folder: str | Path) -> list[str]:
    """Sorted names of the image files (and links) right in a folder.

    Raises:
        UserError: no such folder, no permission, or no image in it.
    """
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if os.path.splitext(entry.name)[1].lower() in SUFFIXES)
    except OSError as error:
        raise UserError(f"cannot list the image folder {folder}: {error.strerror}; check the path") from error
    if not names:
        raise UserError(f"the image folder {folder} holds no image ({', '.join(sorted(SUFFIXES))}); check the path")
    return names


def unread(folder: str | Path, taken: Iterable[str]) -> list[str]:
    """Paths of what lies right in a folder beside the names `taken`, sorted; a sub-folder ends with a slash.

    Hidden files and what file managers leave behind (`Thumbs.db`, `desktop.ini`) are passed over; so is a folder that
    cannot be listed, which is said elsewhere.
    """
    taken = set(taken)
    try:
        with os.scandir(folder) as entries:
            return sorted(
                entry.path + ("/" if entry.is_dir() else "")
                for entry in entries
                if entry.name not in taken and not entry.name.startswith(".") and entry.name.lower() not in LITTER
            )
    except OSError:
        return []


def probe(path: str | Path, full: bool = False) -> tuple[int, int, bool]:
    """Reads an image's header and looks whether the file is whole (its name too: it goes into csv and JSON).

    Args:
        path: the image file.
        full: decode every pixel; otherwise a file is decoded only when its end does not look as it should.

    Returns:
        H, W, and whether it has more than 8 bits a channel.

    Raises:
        ImageError: the file cannot be opened, is empty, is no image, or is damaged.
    """
    if not is_text(os.path.basename(path)):
        raise ImageError("file name", "the file's name is not UTF-8 text, which no annotation can say; rename it")
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for ever
            raise ImageError("not a file", "a folder, pipe or device stands where an image should be; remove it")
        with open(path, "rb") as file, Image.open(file) as image:
            width, height, kind, deep = *image.size, image.format, image.mode in DEEP_MODES
            tail = _TAILS.get(kind)
            if tail is not None and not full:
                file.seek(-len(tail), os.SEEK_END)
                full = file.read() != tail
        if full or tail is None:
            load(path)
    except ImageError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise explain(error, path) from error
    return height, width, deep


def load(path: str | Path) -> Image.Image:
    """The decoded image; raises what PIL raises when anything in the file is damaged."""
    with Image.open(path) as image:
        if image.format == "PNG":
            image.verify()  # the checksums, which decoding alone does not look at
    with Image.open(path) as image:
        image.load()
    return image


def explain(error: Exception, path: str | Path) -> ImageError:
    """What an error of opening or decoding an image means."""
    if isinstance(error, UnidentifiedImageError):
        if os.path.getsize(path) == 0:
            return ImageError("image empty", "the image file has zero bytes; fetch it again")
        return ImageError("not an image", "the file is no image in a known format; replace it")
    return (
        _refused(error)
        if isinstance(error, OSError)
        else ImageError("image damaged", f"the image cannot be decoded ({error}); fetch it again")
    )


def _refused(error: OSError) -> ImageError:
    if error.errno == errno.ENOENT:
        return ImageError("image missing", "the image does not exist (or is a link to nothing); add it")
    if error.errno == errno.ELOOP:
        return ImageError("link loop", "the image is a symbolic link that leads to itself; remove it")
    if error.errno in (errno.EACCES, errno.EPERM):
        return ImageError("no permission", "the image may not be read; change its permissions")
    return ImageError("image damaged", f"the image cannot be decoded ({error.strerror or error}); fetch it again")


def read_rgb(path: str | Path, bits: int = 16) -> np.ndarray:
    """The pixels as uint8 [H, W, 3].

    Args:
        path: the image file.
        bits: the depth that images with more than 8 bits a channel use: the value is shifted right by `bits - 8`.
    """
    with Image.open(path) as image:
        return np.asarray(shallow(image, bits).convert("RGB"))


def shallow(image: Image.Image, bits: int = 16) -> Image.Image:
    """An image of 8 bits a channel; see `read_rgb` (PIL's own conversion makes all above 255 white)."""
    if image.mode not in DEEP_MODES:
        return image
    grey = np.clip(np.nan_to_num(np.asarray(image)), 0, 2**31).astype(np.int64) >> (bits - 8)
    return Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8))
