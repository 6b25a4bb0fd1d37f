"""Checks that a TIFF's tags are consistent with each other and with its pixels: decoders leave missing parts black.

Legend: H W height and width in pixels as stored.
"""

import math
import zlib

from PIL import TiffImagePlugin

Tiff = TiffImagePlugin.TiffImageFile
SUBFILE, WIDTH, LENGTH, BITS, COMPRESSION, PHOTOMETRIC = 254, 256, 257, 258, 259, 262
SAMPLES, ROWS, PLANAR, TILE_WIDTH, TILE_LENGTH = 277, 278, 284, 322, 323
PLACES = ((273, 279), (324, 325))  # offsets and byte counts, of strips and of tiles
PREVIEW = 0b101  # bits of SUBFILE: a smaller copy, a mask
RAW, DEFLATE = 1, (8, 32946)  # of COMPRESSION
CHUNK = 1 << 20  # bytes that are decompressed at once


def is_preview(image: Tiff) -> bool:
    """Whether the current page is a smaller copy or a mask of another."""
    return bool(image.tag_v2.get(SUBFILE, 0) & PREVIEW)


def stored_size(image: Tiff) -> tuple[int, int]:
    """(W, H); PIL gives the size after turning."""
    return image.tag_v2[WIDTH], image.tag_v2[LENGTH]


def check_tags(image: Tiff) -> None:
    """Checks an opened TIFF.

    Raises:
        ValueError: the tags contradict each other, or do not define whether 0 is black.
    """
    tags = image.tag_v2
    if PHOTOMETRIC not in tags:
        raise ValueError("its tag PhotometricInterpretation is missing")
    height = stored_size(image)[1]
    offsets, counts = _places(image)
    across, rows, layers, _ = _layout(image)
    pieces = across * math.ceil(height / max(rows, 1)) * layers
    if len(offsets) != pieces or len(counts) not in (0, pieces):
        raise ValueError(f"it has {len(offsets)} strips or tiles, but its size needs {pieces}")
    if tags.get(COMPRESSION, RAW) == RAW and counts:
        _check_bytes(image, sum(counts), pieces)


def check_sums(image: Tiff) -> None:
    """Decompresses a deflate TIFF to its end, where the checksum is.

    Raises:
        zlib.error: a checksum or the stream is wrong.
        ValueError: the data is longer or shorter than the image's size requires.
    """
    if image.tag_v2.get(COMPRESSION, RAW) not in DEFLATE:
        return
    total, places = 0, list(zip(*_places(image), strict=True))
    for offset, count in places:
        image.fp.seek(offset)
        stream, packed = zlib.decompressobj(), image.fp.read(count)
        while packed and not stream.eof:
            total += len(stream.decompress(packed, CHUNK))
            packed = stream.unconsumed_tail
        if not stream.eof:
            raise zlib.error("a strip is cut off")
    _check_bytes(image, total, len(places))


def _layout(image: Tiff) -> tuple[int, int, int, int]:
    """Strips or tiles across the image, rows of each, layers of all, and bytes of a row of one."""
    tags, (width, height) = image.tag_v2, stored_size(image)
    layers = tags.get(SAMPLES, 1) if tags.get(PLANAR, 1) == 2 else 1
    columns = tags.get(TILE_WIDTH, width)
    rows = tags.get(TILE_LENGTH, height) if TILE_WIDTH in tags else min(tags.get(ROWS, height), height)
    bits = tags.get(BITS, (1,))[0] * tags.get(SAMPLES, 1) // layers
    return math.ceil(width / max(columns, 1)), rows, layers, math.ceil(columns * bits / 8)


def _check_bytes(image: Tiff, found: int, pieces: int) -> None:
    """Refuses pixels of fewer bytes than an image's size needs, or more than its complete strips or tiles have."""
    across, rows, layers, row = _layout(image)
    needed = row * across * stored_size(image)[1] * layers
    if not needed <= found <= row * rows * pieces:
        raise ValueError(f"its pixels are {found:,} bytes, but its size needs {needed:,}")


def _places(image: Tiff) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Offsets and byte counts of all strips or tiles."""
    for places, lengths in PLACES:
        if places in image.tag_v2:
            return image.tag_v2[places], image.tag_v2.get(lengths, ())
    return (), ()
