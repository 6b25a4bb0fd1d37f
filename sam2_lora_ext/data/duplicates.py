"""Exact and near duplicates of images, which must be kept in the same split.

Legend: N images. A thumbnail is grey, uint8 [16, 64]; a hash is bool [256].
"""

import numpy as np
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

BITS_APART = 40  # of 256: a re-saved JPEG differs in a few
GREY_APART = 3.0  # mean difference of two thumbnails, of 255
FLAT = 2.0  # standard deviation of a thumbnail below which an image has no features to compare
CHUNK = 256


def thumbnail(image: Image.Image) -> np.ndarray:
    """A small grey copy of the image."""
    return np.asarray(image.convert("L").resize((64, 16), Image.Resampling.BILINEAR))


def difference_hash(image: Image.Image) -> np.ndarray:
    """Whether each cell of a 16 x 16 grid is brighter than its left neighbour (Krawetz' dHash)."""
    grid = np.asarray(image.convert("L").resize((17, 16), Image.Resampling.BILINEAR)).astype(int)
    return (grid[:, 1:] > grid[:, :-1]).ravel()


def near_pairs(hashes: np.ndarray, thumbnails: np.ndarray) -> np.ndarray:
    """int64 [K, 2]: pairs whose hashes differ in few bits and whose thumbnails differ little.

    Images joined by chains of such pairs contribute only a spanning tree of pairs, so K < N, and N copies of one image
    cost N comparisons instead of N^2.

    Args:
        hashes: bool [N, 256].
        thumbnails: uint8 [N, 16, 64].
    """
    thumbs = thumbnails.reshape(-1, 16 * 64).astype(np.float32)
    signs = np.where(hashes, np.float32(1), np.float32(-1))
    lively = thumbs.std(axis=1) >= FLAT
    pairs, joined = [np.zeros((0, 2), np.int64)], np.arange(len(hashes))
    for low in range(0, len(hashes), CHUNK):
        apart = (hashes.shape[1] - signs[low : low + CHUNK] @ signs.T) / 2  # bits that differ
        for row, bits in enumerate(apart, low):
            if lively[row]:
                others = np.flatnonzero((bits <= BITS_APART) & lively & (joined != joined[row]))
                others = others[np.abs(thumbs[others] - thumbs[row]).mean(axis=1) <= GREY_APART]
                _, first = np.unique(joined[others], return_index=True)  # one image per chain
                pairs.append(np.stack([np.minimum(row, others[first]), np.maximum(row, others[first])], axis=1))
                joined[np.isin(joined, joined[others])] = joined[row]
    return np.concatenate(pairs)


def equal_pairs(digests: list[bytes]) -> np.ndarray:
    """int64 [K, 2]: each image with the first one of the same digest."""
    first: dict[bytes, int] = {}
    pairs = [(first.setdefault(digest, position), position) for position, digest in enumerate(digests)]
    return np.array([pair for pair in pairs if pair[0] != pair[1]], dtype=np.int64).reshape(-1, 2)


def groups(count: int, *pairs: np.ndarray) -> np.ndarray:
    """int32 [N]: a group number for each image; images joined by a chain of pairs share it."""
    links = np.concatenate([np.zeros((0, 2), np.int64), *pairs])
    graph = coo_array((np.ones(len(links), bool), (links[:, 0], links[:, 1])), shape=(count, count))
    return connected_components(graph, directed=False)[1]
