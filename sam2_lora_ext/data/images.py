"""Image files: lists them, checks them, and reads their sizes and their pixels as 8-bit RGB.

Legend: H W height and width in pixels, after an image is turned upright.
"""

import os
import stat
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from sam2_lora_ext.data.decode import (
    DEEP_MODES,
    MOST_PIXELS,
    ImageError,
    decode,
    explain,
    is_wide,
    opened,
    stored_size,
)
from sam2_lora_ext.data.orientation import orientation
from sam2_lora_ext.data.records import Unread, is_text
from sam2_lora_ext.data.units import to_eight
from sam2_lora_ext.utils.errors import UserError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff"})
DARK = 16  # grey levels up to this one (of 255) are unexposed, not steel
LEFT_BY_SYSTEMS = frozenset({"thumbs.db", "desktop.ini"})
_TAILS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}  # the last bytes of an undamaged file of this format


def list_images(folder: str | Path) -> list[str]:
    """Sorted names of the image files (and links) directly in a folder, without hidden ones such as `._x.jpg`.

    Raises:
        UserError: the folder cannot be listed, or contains no image.
    """
    try:
        with os.scandir(folder) as entries:
            names = sorted(
                entry.name
                for entry in entries
                if os.path.splitext(entry.name)[1].lower() in SUFFIXES and not ignored(entry.name)
            )
    except OSError as error:
        raise UserError(f"cannot list the image folder {folder}: {error.strerror}; check the path") from error
    if not names:
        raise UserError(f"the image folder {folder} holds no image ({', '.join(sorted(SUFFIXES))}); check the path")
    return names


def ignored(name: str) -> bool:
    """Whether a file is not part of the data: hidden, or written by an operating system."""
    return name.startswith(".") or name.lower() in LEFT_BY_SYSTEMS


def unread(folder: str | Path, taken: Iterable[str]) -> list[str]:
    """Sorted names of files and folders (with `/`) directly in a folder that were not read, without ignored files.

    Args:
        folder: the folder; one that cannot be listed counts as empty.
        taken: names of files and folders in it that were read.
    """
    taken = set(taken)
    try:
        with os.scandir(folder) as entries:
            left = [entry for entry in entries if entry.name not in taken and not ignored(entry.name)]
            return sorted(entry.name + "/" * entry.is_dir() for entry in left)
    except OSError:
        return []


def not_taken(folder: str | Path, taken: Iterable[str], inputs: Iterable[str | Path] = ()) -> list[Unread]:
    """`unread` as readers yield it, with the folder's path; `inputs` in the folder count as read."""
    above = os.path.abspath(folder)
    inner = (os.path.relpath(os.path.abspath(path), above).split(os.sep)[0] for path in inputs)
    return [Unread(f"{folder}/{name}") for name in unread(folder, {*taken, *inner})]


def probe(path: str | Path, full: bool = False, exif: bool = True) -> tuple[int, int, bool]:
    """Reads an image's header and checks that the file is complete and its name valid in csv and JSON.

    Args:
        path: the image file.
        full: decode every pixel; otherwise a file is decoded only when its last bytes are unexpected, or when it has
            floats, 32 bits or 16 bit colours, which may be out of range or of an unknown kind.
        exif: turn the image upright by its orientation tag.

    Returns:
        H, W, and whether the image is special: only `read_rgb` reads it correctly, not PIL's `convert("RGB")`.

    Raises:
        ImageError: the file cannot be opened, is empty, is not an image, is damaged, too large or has several pages.
    """
    if not is_text(os.path.basename(path)):
        raise ImageError("file name", "the file's name is not UTF-8 text, which no annotation can contain; rename it")
    try:
        regular = stat.S_ISREG(os.stat(path).st_mode)
    except OSError as error:
        raise explain(error, path) from error
    except ValueError as error:  # a null byte
        raise ImageError("file name", f"no file can have this name ({error}); rename it") from error
    if not regular:  # opening a pipe would block
        raise ImageError("not a file", "it is a folder, pipe or device instead of an image; remove it")
    with opened(path) as image:
        (width, height), turned, wide = stored_size(image), orientation(image), is_wide(image)
        mode, tail = image.mode, _TAILS.get(image.format)
        if tail is not None and not full:
            image.fp.seek(-len(tail), os.SEEK_END)
            full = image.fp.read() != tail
    if full or tail is None or wide or mode in ("F", "I"):
        to_eight(decode(path, exif))
    if exif and turned > 4:
        width, height = height, width
    return height, width, mode in DEEP_MODES or wide or turned != 1 or width * height > MOST_PIXELS


def mode_and_tag(path: str | Path) -> tuple[str, int]:
    """PIL's mode of an image file (`RGB;16`: 16 bits a channel), and its orientation tag, 1 for none."""
    with opened(path) as image:
        return image.mode + ";16" * is_wide(image), orientation(image)


def turning(*paths: str | Path, exif: bool = True) -> str:
    """A clause for a message about a wrong size that explains the orientation tags of image files; may be empty.

    Args:
        paths: the files; the clause names the first one that has a tag.
        exif: whether they were turned by it.
    """
    for path in paths:
        try:
            with opened(path) as image:
                tag = orientation(image)
        except ImageError:
            continue
        if tag != 1:
            done = "which was ignored (dataset.exif: false)"
            if exif:
                done = "and was turned; if annotations were drawn on the stored pixels, set dataset.exif: false"
            return f" ({os.path.basename(path)} has the EXIF orientation tag {tag}, {done})"
    return ""


def read_rgb(path: str | Path, bits: int = 16, exif: bool = True) -> np.ndarray:
    """The pixels as uint8 [H, W, 3]: the only function that converts an image file to 8-bit RGB.

    Args:
        path: the image file.
        bits: the depth that images with more than 8 bits a channel use, see `units`.
        exif: turn it upright by its orientation tag.

    Raises:
        ImageError: the file is damaged or cannot be used, or a value does not fit into `bits`.
    """
    pixels = to_eight(decode(path, exif, whole=bits != 16), bits)
    return pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)
