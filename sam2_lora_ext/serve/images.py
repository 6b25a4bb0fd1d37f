"""The images of the page: those in a folder, and those dropped onto the page. Requests name them by number.

Paths are never built from requests of the page: the folder is listed once, at the start. Legend: H W pixels.
"""

import threading
from pathlib import Path

import numpy as np
from cachetools import LRUCache

from sam2_lora_ext.data.decode import opened, stored_size
from sam2_lora_ext.data.images import SUFFIXES, ImageError, ignored, list_images, read_rgb
from sam2_lora_ext.data.records import is_text
from sam2_lora_ext.utils.errors import UserError

LARGEST_UPLOAD = 64 << 20  # bytes of one image
MOST_UPLOADS = 200
UPLOAD_PIXELS = 50_000_000
LONGEST_NAME = 200  # bytes of UTF-8; file systems allow 255
DECODED = 512 << 20  # bytes of cached pixels


class Images:
    """Numbered images with cached pixels.

    Args:
        folder: its images come first, by name; None for only dropped images.
        uploads: an empty temporary folder for dropped images.
        bits: the depth of images with more than 8 bits per channel.
        exif: turn images upright by their orientation tag.

    Raises:
        UserError: the folder cannot be listed or has no image.
    """

    def __init__(self, folder: str | Path | None, uploads: str | Path, bits: int = 16, exif: bool = True):
        self.folder, self.uploads, self.bits, self.exif = folder, Path(uploads), bits, exif
        self.paths = [] if folder is None else [Path(folder, name) for name in list_images(folder)]
        self._from_folder = len(self.paths)
        self._pixels: LRUCache = LRUCache(DECODED, getsizeof=lambda pixels: pixels.nbytes)
        self._lock = threading.RLock()

    def names(self) -> list[str]:
        """File names, in the order of the images' numbers; bytes that are not UTF-8 are escaped."""
        return [path.name.encode("utf-8", "backslashreplace").decode() for path in self.paths]

    def path(self, number: int) -> Path:
        """The file of an image; raises `UserError` if there is no such number or its name is not UTF-8."""
        if not 0 <= number < len(self.paths):
            raise UserError(f"there is no image {number}: there are {len(self.paths)}, counted from 0")
        if not is_text(self.paths[number].name):
            raise UserError(f"the name of {self.names()[number]} is not UTF-8 text: rename the file")
        return self.paths[number]

    def read(self, number: int) -> np.ndarray:
        """The pixels uint8 [H, W, 3]; raises `UserError` if the image cannot be read."""
        path = self.path(number)
        with self._lock:
            if number not in self._pixels:
                try:
                    pixels = read_rgb(path, self.bits, self.exif)
                except ImageError as error:
                    raise UserError(f"{path.name}: {error}") from error
                if pixels.nbytes > DECODED:
                    return pixels
                self._pixels[number] = pixels
            return self._pixels[number]

    def add(self, name: str, content: bytes) -> int:
        """Adds a dropped image and returns its number.

        Raises:
            UserError: its name is not a plain image file name or is taken, it is too large, it cannot be decoded, or
                there are too many.
        """
        check_name(name)
        if len(content) > LARGEST_UPLOAD:
            raise UserError(f"{name} has {len(content):,} bytes, but the limit is {LARGEST_UPLOAD:,}: use --images")
        with self._lock:
            if len(self.paths) - self._from_folder >= MOST_UPLOADS:
                raise UserError(f"there are already {MOST_UPLOADS} dropped images: use a folder and --images for more")
            if name.casefold() in {other.casefold() for other in self.names()}:
                raise UserError(f"there is already an image {name}: rename the file")
            path = self.uploads / name
            path.write_bytes(content)
            try:
                with opened(path) as image:
                    width, height = stored_size(image)
                if width * height > UPLOAD_PIXELS:
                    raise UserError(
                        f"{name} has {width}x{height} pixels, but the limit is {UPLOAD_PIXELS:,}: use --images"
                    )
                read_rgb(path, self.bits, self.exif)
            except ImageError as error:
                path.unlink()
                raise UserError(f"{name}: {error}") from error
            except UserError:
                path.unlink()
                raise
            self.paths.append(path)
            return len(self.paths) - 1


def check_name(name: str) -> None:
    """Raises a `UserError` unless a text is a plain image file name that is valid on every operating system."""
    plain = is_text(name) and name.isprintable() and not set(name) & set('/\\:*?"<>|') and not ignored(name)
    if not plain or len(name.encode()) > LONGEST_NAME or name != name.strip(" ."):
        raise UserError(f"{name[:LONGEST_NAME]!r} is not a plain file name: rename the file")
    if Path(name).suffix.lower() not in SUFFIXES:
        raise UserError(f"{name} does not end like an image ({', '.join(sorted(SUFFIXES))}): rename or convert it")
