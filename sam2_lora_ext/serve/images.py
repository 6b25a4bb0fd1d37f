"""The images of the page: those of a folder, and those that were dropped onto it. A request names one by its number.

No path is ever made from what a request says: the folder is listed once, at the start. Legend: H W pixels.
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
LONGEST_NAME = 200  # bytes of UTF-8, of which file systems take 255
DECODED = 512 << 20  # bytes of pixels that are kept


class Images:
    """Numbered images, with their pixels at hand.

    Args:
        folder: its images come first, by name; None for dropped ones alone.
        uploads: an empty folder of ours, where dropped images are put.
        bits: the depth of images with more than 8 bits a channel.
        exif: turn images upright by their orientation tag.

    Raises:
        UserError: the folder cannot be listed or holds no image.
    """

    def __init__(self, folder: str | Path | None, uploads: str | Path, bits: int = 16, exif: bool = True):
        self.folder, self.uploads, self.bits, self.exif = folder, Path(uploads), bits, exif
        self.paths = [] if folder is None else [Path(folder, name) for name in list_images(folder)]
        self._from_folder = len(self.paths)
        self._pixels: LRUCache = LRUCache(DECODED, getsizeof=lambda pixels: pixels.nbytes)
        self._lock = threading.RLock()

    def names(self) -> list[str]:
        """File names, an image's number being its place; what is no UTF-8 in them is shown by its code."""
        return [path.name.encode("utf-8", "backslashreplace").decode() for path in self.paths]

    def path(self, number: int) -> Path:
        """The file of an image; raises `UserError` for a number that no image has, or a name that is no text."""
        if not 0 <= number < len(self.paths):
            raise UserError(f"there is no image {number}: there are {len(self.paths)}, counted from 0")
        if not is_text(self.paths[number].name):
            raise UserError(f"the name of {self.names()[number]} is not UTF-8 text: rename the file")
        return self.paths[number]

    def read(self, number: int) -> np.ndarray:
        """The pixels uint8 [H, W, 3]; raises `UserError` where the image cannot be used."""
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
        """Takes a dropped image; its number is returned.

        Raises:
            UserError: its name is no plain file name of an image or taken, it is too large, there are too many, or it
                cannot be decoded.
        """
        check_name(name)
        if len(content) > LARGEST_UPLOAD:
            raise UserError(f"{name} has {len(content):,} bytes, at most {LARGEST_UPLOAD:,} are taken: use --images")
        with self._lock:
            if len(self.paths) - self._from_folder >= MOST_UPLOADS:
                raise UserError(f"{MOST_UPLOADS} images were dropped already: put them into a folder and use --images")
            if name.casefold() in {other.casefold() for other in self.names()}:
                raise UserError(f"there is an image {name} already: rename the file")
            path = self.uploads / name
            path.write_bytes(content)
            try:
                with opened(path) as image:
                    width, height = stored_size(image)
                if width * height > UPLOAD_PIXELS:
                    raise UserError(
                        f"{name} has {width}x{height} pixels, at most {UPLOAD_PIXELS:,} are taken: use --images"
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
    """Raises a `UserError` unless a text is a plain file name of an image, which every system can write."""
    plain = is_text(name) and name.isprintable() and not set(name) & set('/\\:*?"<>|') and not ignored(name)
    if not plain or len(name.encode()) > LONGEST_NAME or name != name.strip(" ."):
        raise UserError(f"{name[:LONGEST_NAME]!r} is no plain file name: rename the file")
    if Path(name).suffix.lower() not in SUFFIXES:
        raise UserError(f"{name} is no image by its name ({', '.join(sorted(SUFFIXES))}): rename or convert it")
