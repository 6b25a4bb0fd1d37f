"""Tiles of a strip, stitched: with a model that copies its input, the strip comes back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sam2_lora_ext.data.tiles import cut, predict_strip, stitch, tile_starts
from sam2_lora_ext.utils.errors import UserError


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 400), st.integers(1, 150), st.data())
def test_tiles_cover_the_strip_and_overlap(length, tile, data):
    overlap = data.draw(st.integers(0, tile - 1))
    starts = tile_starts(length, tile, overlap)
    if tile >= length:
        assert starts == [0]
        return
    assert starts[0] == 0 and starts[-1] == length - tile
    steps = [b - a for a, b in zip(starts, starts[1:])]
    assert all(1 <= step <= tile - overlap for step in steps)
    assert max(steps) - min(steps) <= 1
    assert len(starts) == 1 + -(-(length - tile) // (tile - overlap))  # no tile more than needed


@pytest.mark.parametrize(
    ("tile", "overlap", "batch_size"), [(512, 128, 1), (512, 0, 3), (300, 299, 8), (1600, 0, 1), (4000, 7, 1)]
)
def test_a_copying_model_gives_the_strip_back(tile, overlap, batch_size):
    strip = torch.randn(2, 8, 1600, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sizes = []

    def copy(images):
        sizes.append(images.shape)
        return images

    torch.testing.assert_close(predict_strip(copy, strip, tile, overlap, batch_size), strip)
    assert all(shape[0] <= batch_size and shape[1:] == (2, 8, min(tile, 1600)) for shape in sizes)


def test_no_seam_between_tiles_that_disagree():
    """Tiles with constant logits of 0 and 1: the transition in the overlap is continuous."""
    starts = tile_starts(150, 100, 50)
    out = stitch(torch.stack([torch.zeros(1, 100), torch.ones(1, 100)]), starts, 150)[0]
    assert out[:50].abs().max() == 0 and (out[100:] - 1).abs().max() < 1e-6
    assert bool((out.diff() >= -1e-6).all()) and out.diff().max() < 0.03  # 1 / 51 per column
    torch.testing.assert_close(out[50:100], torch.arange(1, 51) / 51)


def test_half_precision_is_summed_in_float32():
    tiles = torch.full((2, 1, 4), 1000.0, dtype=torch.float16)
    out = stitch(tiles, [0, 2], 6)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, torch.full((1, 6), 1000.0))
    assert cut(torch.arange(6.0)[None], [0, 2], 4).tolist() == [[[0, 1, 2, 3]], [[2, 3, 4, 5]]]


def test_mistakes():
    with pytest.raises(UserError, match="overlap"):
        tile_starts(100, 10, 10)
    with pytest.raises(UserError, match="do not cover"):
        stitch(torch.zeros(2, 1, 4), [0, 5], 9)
