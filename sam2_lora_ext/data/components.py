"""8-connected components of many masks at once, computed on their runs without decoding pixels.

Two column segments touch when they are in neighbouring columns and their rows overlap or differ by one; scipy finds the
connected components of the graph of these contacts. Legend: M masks, R runs, S segments (runs cut at column ends),
C components, K runs of all components.
"""

from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

CHUNK = 256  # masks at a time: bounds the memory of the graph


@dataclass
class Components:
    """Component c is in mask `mask[c]`, has the runs `runs[run_offsets[c]:run_offsets[c + 1]]` and the half-open box
    `boxes[c]` = (x0, y0, x1, y1). Order: by mask, then by first pixel down the columns."""

    mask: np.ndarray  # int32 [C]
    areas: np.ndarray  # int64 [C]
    boxes: np.ndarray  # int32 [C, 4]
    run_offsets: np.ndarray  # int64 [C + 1]
    runs: np.ndarray  # int32 [K, 2] of (start, length)

    @classmethod
    def none(cls) -> "Components":
        """No component, C = K = 0."""
        shapes = (0, np.int32), (0, np.int64), ((0, 4), np.int32), (1, np.int64), ((0, 2), np.int32)
        return cls(*(np.zeros(shape, dtype) for shape, dtype in shapes))


def find_components(
    runs: np.ndarray, run_offsets: np.ndarray, heights: np.ndarray, widths: np.ndarray, split: bool = True
) -> Components:
    """Components of M masks.

    Args:
        runs: [R, 2] of (start, length) of all masks, column-major, ascending and not adjacent within each mask.
        run_offsets: [M + 1]; mask m has the runs `runs[run_offsets[m]:run_offsets[m + 1]]`.
        heights: [M] rows of each mask's image.
        widths: [M] columns of each mask's image.
        split: False makes each mask that is not empty one component.
    """
    parts = [Components.none()]
    for low in range(0, len(heights), CHUNK):
        high = min(low + CHUNK, len(heights))
        first, last = run_offsets[low], run_offsets[high]
        owner = np.repeat(np.arange(high - low), np.diff(run_offsets[low : high + 1]))
        part = _chunk(runs[first:last].astype(np.int64), owner, heights[low:high], widths[low:high], split)
        part.mask += low
        parts.append(part)
    lengths = np.concatenate([np.diff(part.run_offsets) for part in parts])
    return Components(
        *(np.concatenate([getattr(part, name) for part in parts]) for name in ("mask", "areas", "boxes")),
        np.append(0, np.cumsum(lengths)),
        np.concatenate([part.runs for part in parts]),
    )


def _chunk(runs: np.ndarray, owner: np.ndarray, heights: np.ndarray, widths: np.ndarray, split: bool) -> Components:
    owner, column, top, bottom = _split_columns(runs, owner, heights)
    labels = _label(owner, column, top, bottom, heights, widths) if split else owner
    # number the labels by their first segment, so that the order depends on the mask alone
    _, first, labels = np.unique(labels, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    labels = rank[labels]
    order = np.argsort(labels, kind="stable")
    labels, owner, column, top, bottom = (array[order] for array in (labels, owner, column, top, bottom))
    begins = np.flatnonzero(np.diff(labels, prepend=-1))
    if not len(begins):
        return Components.none()
    boxes = np.stack(
        [
            np.minimum.reduceat(column, begins),
            np.minimum.reduceat(top, begins),
            np.maximum.reduceat(column, begins) + 1,
            np.maximum.reduceat(bottom, begins) + 1,
        ],
        axis=1,
    )
    areas = np.add.reduceat(bottom - top + 1, begins)
    # join segments of one component that continue over a column's end
    starts = column * heights[owner] + top
    stops = column * heights[owner] + bottom + 1
    new = np.ones(len(starts), dtype=bool)
    new[1:] = (starts[1:] != stops[:-1]) | (labels[1:] != labels[:-1])
    ends = stops[np.append(new[1:], True)]
    joined = np.stack([starts[new], ends - starts[new]], axis=1).astype(np.int32)
    run_offsets = np.append(0, np.cumsum(np.bincount(labels[new], minlength=len(begins))))
    return Components(owner[begins].astype(np.int32), areas, boxes.astype(np.int32), run_offsets, joined)


def _split_columns(runs: np.ndarray, owner: np.ndarray, heights: np.ndarray) -> tuple[np.ndarray, ...]:
    """Cuts runs at column ends: owner, column, top row and bottom row (inclusive) of each of S segments."""
    height = heights[owner].astype(np.int64)
    ends = runs[:, 0] + runs[:, 1] - 1
    first, last = runs[:, 0] // height, ends // height
    pieces = last - first + 1
    run = np.repeat(np.arange(len(runs)), pieces)
    piece = np.arange(len(run)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    column = first[run] + piece
    top = np.where(piece == 0, runs[run, 0] % height[run], 0)
    bottom = np.where(column == last[run], ends[run] % height[run], height[run] - 1)
    return owner[run], column, top, bottom


def _label(
    owner: np.ndarray, column: np.ndarray, top: np.ndarray, bottom: np.ndarray, heights: np.ndarray, widths: np.ndarray
) -> np.ndarray:
    """A label for each segment; two segments have the same label exactly if they are in one component."""
    # one number line for all masks: a spare column between masks and spare rows between columns separate them
    spare = int(heights.max(initial=0)) + 3
    key = (column + (np.cumsum(widths + 2) - widths)[owner]) * spare
    begins, ends = key + top + 1, key + bottom + 1
    low = np.searchsorted(ends, begins - spare - 1, side="left")
    high = np.searchsorted(begins, ends - spare + 1, side="right")
    contacts = np.maximum(high - low, 0)
    right = np.repeat(np.arange(len(owner)), contacts)
    left = np.arange(len(right)) - np.repeat(np.cumsum(contacts) - contacts, contacts) + np.repeat(low, contacts)
    graph = coo_array((np.ones(len(left), dtype=bool), (left, right)), shape=(len(owner), len(owner)))
    return connected_components(graph, directed=False)[1]
