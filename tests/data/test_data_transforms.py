"""Crops, flips, brightness and resizing against SAM 2's own transforms."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from training.dataset.transforms import NormalizeAPI, RandomResizeAPI, ToTensorAPI

from helpers.data_sets import HEIGHT, WIDTH, datapoint
from sam2_lora_ext.data.pixels import ModelInput, RandomBrightnessContrast, resize_mask
from sam2_lora_ext.data.transforms import (
    FixedStripCrop,
    RandomHorizontalFlip,
    RandomStripCrop,
    RandomVerticalFlip,
)
from sam2_lora_ext.utils.errors import UserError


def box(x0, y0, x1, y1):
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[y0:y1, x0:x1] = True
    return mask


def corner(sample):
    """(x, y) that the top left pixel had, from the pixels themselves."""
    red, green, _ = np.asarray(sample.frames[0].data)[0, 0]
    return int(red), int(green)


SMALL, LONG = box(20, 5, 30, 15), box(10, 0, 190, 40)


@pytest.mark.parametrize("seed", range(30))
def test_random_crop_keeps_an_object_and_cuts_all_frames_alike(seed):
    random.seed(seed)
    masks = {1_000_000: SMALL, 2_000_000: box(150, 20, 160, 30), 3_000_000: LONG}
    sample = RandomStripCrop(48, 32)(datapoint(masks, frames=3), epoch=0)
    x, y = corner(sample)
    assert sample.size == (32, 48) and 1 <= len(sample.frames[0].objects) <= 3
    for frame in sample.frames:
        np.testing.assert_array_equal(np.asarray(frame.data), np.asarray(sample.frames[0].data))
        assert [obj.object_id for obj in frame.objects] == [obj.object_id for obj in sample.frames[0].objects]
        for obj in frame.objects:
            np.testing.assert_array_equal(obj.segment, masks[obj.object_id][y : y + 32, x : x + 48])
            assert obj.segment.any()
    kept = {obj.object_id for obj in sample.frames[0].objects}
    assert kept == {number for number, mask in masks.items() if mask[y : y + 32, x : x + 48].any()}


def test_a_grid_leaves_few_windows():
    random.seed(0)
    crop = RandomStripCrop(48, grid=32)
    shown = [crop(datapoint({1_000_000: SMALL, 2_000_000: LONG})) for _ in range(200)]
    starts = {corner(sample)[0] for sample in shown}
    assert starts == {*range(0, WIDTH - 48, 32), WIDTH - 48}
    assert all(sample.frames[0].objects for sample in shown)
    clean = {corner(crop(datapoint({0: np.zeros_like(SMALL)})))[0] for _ in range(100)}
    assert clean <= starts
    with pytest.raises(UserError, match="lower the grid"):
        RandomStripCrop(48, grid=49)


def test_an_object_that_fits_is_shown_whole_and_everywhere():
    random.seed(0)
    places = set()
    for _ in range(300):
        sample = RandomStripCrop(48)(datapoint({1_000_000: SMALL}))
        assert int(sample.frames[0].objects[0].segment.sum()) == SMALL.sum()
        places.add(corner(sample)[0])
    assert places == set(range(0, 21))  # 30 - 48 is left of the strip; 20 is the object's own left edge


def test_a_long_object_is_cut_at_any_place():
    random.seed(0)
    places = {corner(RandomStripCrop(48)(datapoint({1_000_000: LONG})))[0] for _ in range(2000)}
    assert min(places) == 0 and max(places) == WIDTH - 48


def test_clean_strip_stays_clean_and_avoids_unexposed_steel():
    random.seed(0)
    for _ in range(50):
        sample = datapoint({0: np.zeros((HEIGHT, WIDTH), bool)})
        pixels = np.full((HEIGHT, WIDTH, 3), 90, np.uint8)
        pixels[:, :120] = 0
        sample.frames[0].data = Image.fromarray(pixels)
        sample = RandomStripCrop(40)(sample)
        assert [obj.object_id for obj in sample.frames[0].objects] == [0] and not sample.frames[0].objects[
            0
        ].segment.any()
        assert (np.asarray(sample.frames[0].data) > 0).mean() > 0.5


def test_fixed_crop():
    sample = FixedStripCrop(60)(datapoint({1_000_000: SMALL, 2_000_000: box(60, 0, 70, 9)}))
    assert corner(sample)[0] == 15 and sample.size == (HEIGHT, 60)  # the middle of [20, 70) in the middle of 60
    far = np.zeros((HEIGHT, WIDTH), bool)
    far[:5, 0:3] = far[:5, 150:180] = True  # one object in two places: most of it is on the right
    sample = FixedStripCrop(60)(datapoint({1_000_000: far}))
    assert int(sample.frames[0].objects[0].segment.sum()) == 150
    whole = datapoint({1_000_000: far})
    assert FixedStripCrop(None)(whole) is whole and FixedStripCrop(WIDTH)(whole) is whole
    with pytest.raises(UserError, match="group_width: 60"):
        FixedStripCrop(60)(datapoint({1_000_000: SMALL, 2_000_000: box(150, 0, 170, 9)}))
    clean = FixedStripCrop(60)(datapoint({0: np.zeros((HEIGHT, WIDTH), bool)}))
    assert clean.size == (HEIGHT, 60) and len(clean.frames[0].objects) == 1


@pytest.mark.parametrize(("transform", "axis"), [(RandomHorizontalFlip, 1), (RandomVerticalFlip, 0)])
def test_flips(transform, axis):
    masks = {1_000_000: SMALL, 0: np.zeros((HEIGHT, WIDTH), bool)}
    plain = datapoint(masks, frames=2)
    flipped = transform(p=1.0)(datapoint(masks, frames=2), epoch=3)
    for before, after in zip(plain.frames, flipped.frames):
        np.testing.assert_array_equal(np.flip(np.asarray(before.data), axis), np.asarray(after.data))
        for one, other in zip(before.objects, after.objects):
            np.testing.assert_array_equal(np.flip(one.segment.numpy(), axis), other.segment)
    assert transform(p=0.0)(plain) is plain
    random.seed(0)
    results = [corner(transform()(datapoint(masks, frames=2))) == (0, 0) for _ in range(400)]
    assert 150 < sum(results) < 250
    random.seed(5)
    pair = transform()(datapoint(masks, frames=4)).frames
    assert len({np.asarray(frame.data).tobytes() for frame in pair}) == 1


def test_brightness_and_contrast():
    random.seed(0)
    seen = set()
    for _ in range(60):
        sample = datapoint({1_000_000: SMALL}, frames=2)
        before = np.asarray(sample.frames[0].data).astype(float)
        after = [np.asarray(frame.data).astype(float) for frame in RandomBrightnessContrast(0.2, 0.3)(sample).frames]
        np.testing.assert_array_equal(after[0], after[1])
        inner = (after[0] > 0) & (after[0] < 255)
        slope, offset = np.polyfit(before[inner], after[0][inner], 1)
        brightness = (offset + slope * before.mean()) / before.mean()
        assert 0.79 < brightness < 1.21 and 0.69 < slope / brightness < 1.31
        seen.add(round(slope, 3))
    assert len(seen) > 50
    sample = RandomBrightnessContrast(0, 0)(datapoint({1_000_000: SMALL}))
    np.testing.assert_array_equal(np.asarray(sample.frames[0].data), np.asarray(datapoint({}).frames[0].data))
    with pytest.raises(UserError):
        RandomBrightnessContrast(2.0)


@pytest.mark.parametrize("size", [16, 64, 200, 333])
def test_model_input_is_what_stock_transforms_give(size):
    rng = np.random.default_rng(size)
    for width in (WIDTH, 77, 150):
        masks = {number: rng.random((HEIGHT, width)) < 0.5 for number in (1_000_000, 2_000_000)}
        masks[1_000_000][:, 30:] = False
        ours = ModelInput(size)(datapoint(masks, size=(HEIGHT, width)))
        stock = datapoint(masks, size=(HEIGHT, width))
        for step in (
            RandomResizeAPI(size, True, square=True),
            ToTensorAPI(),
            NormalizeAPI([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ):
            stock = step(stock)
        for mine, theirs in zip(ours.frames[0].objects, stock.frames[0].objects):
            assert mine.segment.dtype == theirs.segment.dtype
            assert torch.equal(mine.segment, theirs.segment)
        # torchvision's uint8 resize and PIL's round differently by at most one grey level
        assert (ours.frames[0].data - stock.frames[0].data).abs().max() <= 1 / 255 / 0.224 + 1e-6
        assert ours.frames[0].data.dtype == torch.float32 and ours.frames[0].data.is_contiguous()


def test_small_objects_survive_the_resizing():
    speck = box(100, 20, 101, 21)
    assert not RandomResizeAPI(8, True, square=True)(datapoint({1_000_000: speck})).frames[0].objects[0].segment.any()
    segment = ModelInput(8)(datapoint({1_000_000: speck})).frames[0].objects[0].segment
    assert torch.nonzero(segment).tolist() == [[4, 4]]
    assert not resize_mask(torch.zeros(HEIGHT, WIDTH, dtype=torch.uint8), 8).any()
    full = resize_mask(torch.ones(HEIGHT, WIDTH, dtype=torch.uint8), 8)
    assert bool(full.all())


@pytest.mark.parametrize(
    "make",
    [
        lambda: RandomStripCrop(0),
        lambda: FixedStripCrop(-1),
        lambda: ModelInput(0),
        lambda: RandomStripCrop([10, 20]),
    ],
)
def test_bad_sizes(make):
    with pytest.raises(UserError):
        make()
