"""What a TIFF's tags say must fit together and with its pixels: decoders do not look, and leave black what is missing.

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
CHUNK = 1 << 20  # bytes that are unpacked at once


def is_preview(image: Tiff) -> bool:
    """Whether the current page is a smaller copy or a mask of another."""
    return bool(image.tag_v2.get(SUBFILE, 0) & PREVIEW)


def stored_size(image: Tiff) -> tuple[int, int]:
    """(W, H); PIL gives the size after turning."""
    return image.tag_v2[WIDTH], image.tag_v2[LENGTH]


def check_tags(image: Tiff) -> None:
    """Looks at an opened TIFF.

    Raises:
        ValueError: the tags contradict each other, or those that say what the numbers mean are missing.
    """
    tags = image.tag_v2
    for tag, name in ((BITS, "BitsPerSample"), (PHOTOMETRIC, "PhotometricInterpretation")):
        if tag not in tags:
            raise ValueError(f"its tag {name} is missing")
    width, height = stored_size(image)
    offsets, counts = _places(image)
    if TILE_WIDTH in tags:
        across, rows = math.ceil(width / max(tags[TILE_WIDTH], 1)), tags.get(TILE_LENGTH, height)
    else:
        across, rows = 1, min(tags.get(ROWS, height), height)
    layers = tags.get(SAMPLES, 1) if tags.get(PLANAR, 1) == 2 else 1
    pieces = across * math.ceil(height / max(rows, 1)) * layers
    if len(offsets) != pieces or len(counts) not in (0, pieces):
        raise ValueError(f"it has {len(offsets)} strips or tiles where its size takes {pieces}")
    if tags.get(COMPRESSION, RAW) == RAW and TILE_WIDTH not in tags and counts:
        bits = tags[BITS]
        row = math.ceil(width * (bits[0] * tags.get(SAMPLES, 1) // layers) / 8)  # bytes
        if not row * height * layers <= sum(counts) <= row * rows * pieces:
            raise ValueError(f"its pixels are {sum(counts):,} bytes where its size takes {row * height * layers:,}")


def check_sums(image: Tiff) -> None:
    """Unpacks a TIFF that is compressed with deflate to its end, where the checksum stands.

    Raises:
        zlib.error: a checksum or the stream is wrong.
    """
    if image.tag_v2.get(COMPRESSION, RAW) not in DEFLATE:
        return
    for offset, count in zip(*_places(image), strict=True):
        image.fp.seek(offset)
        stream, packed = zlib.decompressobj(), image.fp.read(count)
        while packed and not stream.eof:
            stream.decompress(packed, CHUNK)
            packed = stream.unconsumed_tail
        if not stream.eof:
            raise zlib.error("a strip is cut off")


def _places(image: Tiff) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Offsets and byte counts of all strips or tiles."""
    for places, lengths in PLACES:
        if places in image.tag_v2:
            return image.tag_v2[places], image.tag_v2.get(lengths, ())
    return (), ()
