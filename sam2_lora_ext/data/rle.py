"""Run-length codes of masks: Kaggle's text, an array of runs, a mask, COCO's counts; numpy only.

Pixels are numbered down the columns, then from left to right (column-major), from 0 inside this package and from 1 in
Kaggle's text. A run is (start, length). Legend: H W height and width in pixels, R number of runs.
"""

import re

import numpy as np

from sam2_lora_ext.data.records import InvalidData

ABSENT = frozenset({"", "nan", "none", "null", "na", "n/a", "-1", "-1.0", "0 0", "1 1"})
NO_RUNS = np.zeros((0, 2), dtype=np.int32)
CELL = 32767  # largest number of characters in a cell of a spreadsheet
_SCIENTIFIC = re.compile(r"[0-9][eE][+-]?[0-9]", re.ASCII)
_INTEGERS = re.compile(r"-?[0-9]+(?:\s+-?[0-9]+)*", re.ASCII)


class RLEError(InvalidData):
    """A run-length code that cannot be read."""


def is_absent(text: str) -> bool:
    """Whether an `EncodedPixels` field means "no mask": empty, NaN, -1, `0 0` or `1 1` (Kaggle's dummies)."""
    return " ".join(text.split()).lower() in ABSENT


def parse_rle(text: str, height: int, width: int) -> np.ndarray:
    """Reads Kaggle's `start length start length ...`.

    Args:
        text: pairs, 1-based, with ascending starts.
        height: H of the image.
        width: W of the image.

    Returns:
        int32 [R, 2] of (start, length), starts from 0; adjacent runs are joined.

    Raises:
        RLEError: not integers, an odd count, a length below 1, a run outside the image, or runs that overlap or are
            not in ascending order.
    """
    if len(text) == CELL:
        raise RLEError(
            "RLE cut by a spreadsheet",
            f"the RLE has exactly {CELL:,} characters, the most that a spreadsheet's cell holds, so its end is lost; "
            "take the table from before the spreadsheet",
        )
    if _SCIENTIFIC.search(text):
        raise RLEError(
            "RLE changed by a spreadsheet",
            f"the RLE has a number in scientific notation, got {_shorten(text)!r}: a spreadsheet rounded it; take the "
            "table from before the spreadsheet",
        )
    if not _INTEGERS.fullmatch(text.strip()):
        raise RLEError("RLE not integers", f"the RLE must be integers with spaces between them, got {_shorten(text)!r}")
    numbers = np.fromstring(text, dtype=np.int64, sep=" ")  # text mode is not deprecated; huge numbers saturate
    if len(numbers) % 2:
        raise RLEError(
            "RLE odd",
            f"the RLE must be pairs of start and length, got {len(numbers)} numbers, which is odd "
            "(is the line cut off?)",
        )
    runs = numbers.reshape(-1, 2)
    wrong = (runs < 1).any(axis=1) | (runs > height * width).any(axis=1) | (runs.sum(axis=1) - 1 > height * width)
    if wrong.any():
        position = int(np.argmax(wrong))
        start, length = runs[position].tolist()
        if length < 1:
            raise RLEError(
                "RLE length", f"pair {position + 1} of the RLE is {start} {length}, but a length is at least 1"
            )
        raise RLEError(
            "RLE out of range",
            f"pair {position + 1} of the RLE is {start} {length}, outside the pixels "
            f"1..{height * width} of a {width}x{height} image",
        )
    runs[:, 0] -= 1
    steps = np.diff(runs[:, 0])
    if (steps < 0).any():
        position = int(np.argmax(steps < 0)) + 2
        raise RLEError(
            "RLE order",
            f"pair {position} of the RLE starts at {runs[position - 1, 0] + 1}, before the previous pair at "
            f"{runs[position - 2, 0] + 1}; starts must ascend",
        )
    if (steps < runs[:-1, 1]).any():
        position = int(np.argmax(steps < runs[:-1, 1])) + 2
        raise RLEError(
            "RLE overlap",
            f"pair {position} of the RLE starts at {runs[position - 1, 0] + 1}, inside the previous run "
            f"({runs[position - 2, 0] + 1} {runs[position - 2, 1]})",
        )
    return join_runs(runs)


def join_runs(runs: np.ndarray) -> np.ndarray:
    """Joins ascending runs that touch or overlap: [R, 2] -> int32 [R', 2] with at least one pixel between runs."""
    runs = np.asarray(runs).reshape(-1, 2)
    ends = np.maximum.accumulate(runs[:, 0] + runs[:, 1])
    first = np.ones(len(runs), dtype=bool)
    first[1:] = runs[1:, 0] > ends[:-1]
    last = np.append(first[1:], True)[: len(runs)]
    return np.stack([runs[first, 0], ends[last] - runs[first, 0]], axis=1).astype(np.int32)


def union_runs(masks: list[np.ndarray]) -> np.ndarray:
    """Runs of the union of masks of one image."""
    runs = np.concatenate([NO_RUNS, *masks])
    return join_runs(runs[np.argsort(runs[:, 0], kind="stable")])


def format_rle(runs: np.ndarray) -> str:
    """Writes runs as Kaggle's text; no runs give an empty string.

    A mask of the first pixel only is `01 1`: the same numbers for every reader, but not the dummy `1 1` for "no mask".
    """
    shifted = np.asarray(runs, dtype=np.int64).reshape(-1, 2) + (1, 0)
    text = " ".join(map(str, shifted.ravel().tolist()))
    return "01 1" if text == "1 1" else text


def encode_mask(mask: np.ndarray) -> np.ndarray:
    """Runs of the pixels of `mask` [H, W] that are not zero: int32 [R, 2]."""
    columns = np.flatnonzero(mask.any(axis=0))
    if not len(columns):
        return NO_RUNS
    part = mask[:, columns[0] : columns[-1] + 1] != 0  # most masks cover few columns
    flat = np.zeros(part.size + 2, dtype=bool)
    flat[1:-1] = part.ravel(order="F")
    edges = np.flatnonzero(flat[1:] != flat[:-1]).reshape(-1, 2)
    edges[:, 1] -= edges[:, 0]
    edges[:, 0] += columns[0] * len(mask)
    return edges.astype(np.int32)


def decode_runs(runs: np.ndarray, height: int, width: int) -> np.ndarray:
    """The mask of some runs: uint8 [H, W] of 0 and 1 (in Fortran order, a view of the column-major pixels)."""
    pixels = np.zeros(height * width, dtype=np.uint8)
    view = pixels.data  # assigning bytes to it takes a third of the time of numpy slices
    for start, length in runs.tolist():
        view[start : start + length] = b"\1" * length
    return pixels.reshape(width, height).T


def crop_columns(runs: np.ndarray, height: int, start: int, stop: int) -> np.ndarray:
    """Runs of the columns [start, stop) only, counted from the new left edge; decodes no pixel."""
    low, high = start * height, stop * height
    begins = np.maximum(runs[:, 0], low)
    ends = np.minimum(runs[:, 0] + runs[:, 1], high)
    keep = ends > begins
    return np.stack([begins[keep] - low, (ends - begins)[keep]], axis=1).astype(np.int32)


def to_coco_counts(runs: np.ndarray, height: int, width: int) -> list[int]:
    """COCO's uncompressed counts (zeros, ones, zeros, ...) in the same pixel order; their sum is H * W."""
    edges = np.zeros(2 * len(runs) + 2, dtype=np.int64)
    edges[1:-1:2] = runs[:, 0]
    edges[2:-1:2] = runs[:, 0] + runs[:, 1]
    edges[-1] = height * width
    counts = (edges[1:] - edges[:-1]).tolist()
    return counts if counts[-1] else counts[:-1]


def from_coco_counts(counts: list[int]) -> np.ndarray:
    """Runs int32 [R, 2] of COCO's uncompressed counts."""
    edges = np.cumsum(np.asarray(counts, dtype=np.int64))
    starts, ends = edges[0::2], edges[1::2]
    runs = np.stack([starts[: len(ends)], ends - starts[: len(ends)]], axis=1)
    return join_runs(runs[runs[:, 1] > 0])


def parse_coco_text(text: str) -> list[int]:
    """COCO's compressed counts as plain ones (what pycocotools' `rleFrString` reads, but checked).

    Six bits per character, from `0`: five bits of the number, low ones first, and a bit that marks a continuation; the
    last group has the sign. From the fourth number on, each is the difference to the second number before it.

    Raises:
        RLEError: an invalid character, an unfinished number, or one beyond 32 bits.
    """
    codes = np.frombuffer(text.encode("utf-8", "surrogatepass"), dtype=np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero((codes & 32) == 0)
    lengths = np.diff(ends, prepend=-1)
    if (codes < 0).any() or (codes > 63).any() or len(codes) != lengths.sum() or lengths.max(initial=0) > 7:
        raise RLEError("RLE not COCO", f"its RLE is not compressed COCO text, got {_shorten(text)!r}")
    place = np.arange(len(codes)) - np.repeat(ends - lengths + 1, lengths)
    numbers = np.add.reduceat((codes & 31) << (5 * place), ends - lengths + 1) if len(ends) else ends
    numbers -= ((codes[ends] & 16) > 0).astype(np.int64) << (5 * lengths)
    for parity in (1, 2):
        numbers[parity::2] = np.cumsum(numbers[parity::2])
    return numbers.tolist()


def _shorten(text: str) -> str:
    return text if len(text) <= 40 else text[:37] + "..."
