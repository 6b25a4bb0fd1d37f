"""Clicks and boxes: stock's own draws for defects, positive clicks for clean objects, and reproducible per object."""

import pytest
import torch
import training.model.sam2 as host
from sam2.modeling.sam2_utils import get_next_point, mask_to_box, sample_box_points

from sam2_lora_ext.prompts import PromptSampler, drawn_pixels, pixels_in_order
from sam2_lora_ext.run.seeding import mixed

SIZE = 32


def masks_of(*filled: bool) -> torch.Tensor:
    """bool [O, 1, H, W]: a rectangle for each True, nothing for each False."""
    masks = torch.zeros(len(filled), 1, SIZE, SIZE, dtype=torch.bool)
    for o, wanted in enumerate(filled):
        if wanted:
            masks[o, 0, 4 + o : 14 + o, 6 : 20 + o] = True
    return masks


def sampler_of(masks: torch.Tensor, *, seeds=None, fixed=None, exact=False, sound=None) -> PromptSampler:
    count = len(masks)
    sound = torch.ones(count, SIZE, SIZE, dtype=torch.bool) if sound is None else sound
    empty = ~masks.flatten(1).any(1)
    keys = torch.tensor(seeds or fixed or list(range(count)))
    return PromptSampler(empty, sound, mixed(keys), seeded=seeds is not None, exact_boxes=exact)


@pytest.mark.parametrize("method", ["uniform", "center"])
def test_without_clean_objects_clicks_are_stocks_own(method):
    """Exactly, and the global generator is left where stock leaves it."""
    masks = masks_of(True, True)
    pred = masks.roll(3, -1)
    sampler = sampler_of(masks)
    for pred_masks in (None, pred, masks):
        torch.manual_seed(1)
        expected, state = get_next_point(masks, pred_masks, method), torch.get_rng_state()
        torch.manual_seed(1)
        got = sampler.next_point(masks, pred_masks, method)
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
        assert torch.equal(torch.get_rng_state(), state)


def test_without_clean_objects_training_boxes_are_stocks_own():
    masks = masks_of(True, True)
    torch.manual_seed(1)
    expected = sample_box_points(masks)
    torch.manual_seed(1)
    got = sampler_of(masks).box(masks)
    assert torch.equal(got[0], expected[0].float()) and torch.equal(got[1], expected[1])


def test_evaluation_boxes_are_exact():
    masks = masks_of(True, True, True)
    points, labels = sampler_of(masks, exact=True).box(masks)
    assert torch.equal(points.reshape(-1, 4), mask_to_box(masks)[:, 0].float())
    assert points[0].tolist() == [[6, 4], [19, 13]] and labels.tolist() == [[2, 3]] * 3


@pytest.mark.parametrize("seeds", [None, [3, 4]])
def test_a_clean_object_is_clicked_positively_on_sound_steel(seeds):
    """Whatever the draw; defects beside it keep their own click."""
    masks = masks_of(False, True)
    sound = torch.zeros(2, SIZE, SIZE, dtype=torch.bool)
    sound[:, 20:24, 25:27] = True
    for fixed in range(20):
        sampler = sampler_of(masks, seeds=seeds, fixed=[fixed, 0], sound=sound)
        points, labels = sampler.next_point(masks, None, "uniform")
        x, y = points[0, 0].long().tolist()
        assert sound[0, y, x] and labels[0, 0] == 1
        x, y = points[1, 0].long().tolist()
        assert masks[1, 0, y, x] and labels[1, 0] == 1


def test_a_strip_without_sound_steel_is_clicked_anywhere():
    masks = masks_of(False)
    sound = torch.zeros(1, SIZE, SIZE, dtype=torch.bool)
    points, labels = sampler_of(masks, sound=sound).next_point(masks, None, "center")
    assert labels.tolist() == [[1]] and 0 <= points.min() and points.max() < SIZE


def test_a_clean_object_never_gets_a_box():
    masks = masks_of(False, True)
    for exact in (False, True):
        points, labels = sampler_of(masks, exact=exact).box(masks)
        assert labels.tolist() == [[1, -1], [2, 3]]  # -1 is SAM 2's padding
        assert points[0, 1].tolist() == [0, 0]


@pytest.mark.parametrize("method", ["uniform", "center"])
def test_later_clicks_on_a_clean_object_are_negative(method):
    """On false positives; without any, anywhere."""
    masks = masks_of(False, False)
    pred = torch.zeros_like(masks)
    pred[0, 0, 8:11, 8:11] = True
    sampler = sampler_of(masks)
    sampler.correcting = True
    points, labels = sampler.next_point(masks, pred, method)
    x, y = points[0, 0].long().tolist()
    assert pred[0, 0, y, x] and labels.tolist() == [[0], [0]]
    assert points[1, 0].tolist() != [0, 0]  # stock's validation would click there each time
    assert sampler.next_point(masks, None, method)[1].tolist() == [[0], [0]]  # drawn from the target alone


def test_a_defect_that_a_later_frame_lacks_is_no_clean_object():
    """`empty` is of the first frame: in a frame where it is out of view stock's rule holds."""
    sampler = sampler_of(masks_of(True))
    points, labels = sampler.next_point(masks_of(False), None, "center")
    assert labels.tolist() == [[0]] and points.tolist() == get_next_point(masks_of(False), None, "center")[0].tolist()


def test_seeded_prompts_do_not_depend_on_the_batch():
    """An object alone, or as the third of three: the same clicks and boxes, without touching the global generator."""
    many, seeds = masks_of(True, False, True), [11, 12, 13]
    alone = many[2:]
    state = torch.get_rng_state()
    together, single = sampler_of(many, seeds=seeds), sampler_of(alone, seeds=seeds[2:])
    for pred in (None, many.roll(2, -1), many):
        one = together.next_point(many, pred, "uniform")
        other = single.next_point(alone, None if pred is None else pred[2:], "uniform")
        assert torch.equal(one[0][2:], other[0]) and torch.equal(one[1][2:], other[1])
    assert torch.equal(together.box(many)[0][2:], single.box(alone)[0])
    assert torch.equal(torch.get_rng_state(), state)


def test_seeded_clicks_follow_stocks_rule():
    """Positive on what was missed, negative on what was wrongly found, and on the background when all is right."""
    masks = masks_of(True)
    pred = masks.roll(4, -1)
    seen = set()
    for seed in range(40):
        points, labels = sampler_of(masks, seeds=[seed]).next_point(masks, pred, "uniform")
        x, y = points[0, 0].long().tolist()
        assert masks[0, 0, y, x] != pred[0, 0, y, x] and bool(labels[0, 0]) == bool(masks[0, 0, y, x])
        seen.add((x, y))
        points, labels = sampler_of(masks, seeds=[seed]).next_point(masks, masks, "uniform")
        x, y = points[0, 0].long().tolist()
        assert not masks[0, 0, y, x] and labels[0, 0] == 0
    assert len(seen) > 20


def test_pixels_in_order_are_those_that_a_list_has():
    regions = torch.rand(4, 5, 7, generator=torch.Generator().manual_seed(1)) < 0.3
    regions[1], regions[2] = True, False
    regions[2, 4, 6] = True
    for number in (*range(2 * 5 * 7), 2**62 - 1):
        points = pixels_in_order(torch.full((4,), number), regions)
        for point, region in zip(points, regions):
            pixels = region.nonzero().flip(1)
            assert torch.equal(point, pixels[number % len(pixels)])


def test_the_first_pixel_inside_is_taken_before_any_is_counted():
    """In the first region that has any, else of the frame."""
    region, other = torch.zeros(2, 4, 5, 7, dtype=torch.bool)
    region[:2, 1, 2], region[:2, 3, 4], other[2, 0, 5] = True, True, True
    tried = [6, 35 + 3 * 7 + 4, 1 * 7 + 2], [6, 8, 33], [6, 7, 5], [2**62 - 1, 8, 33]
    numbers = torch.tensor([[1, *few] for few in tried])
    last = (2**62 - 1) % 35
    assert drawn_pixels(numbers, region, other).tolist() == [[4, 3], [4, 3], [5, 0], [last % 7, last // 7]]
    assert drawn_pixels(numbers[:, :2], region, other).tolist() == [[4, 3], [4, 3], [5, 0], [last % 7, last // 7]]
    numbers[:2, 0] = 2
    assert drawn_pixels(numbers, region, other).tolist()[:2] == [[4, 3], [2, 1]]


def test_seeded_clicks_stay_where_a_pixel_of_the_region_is_turned():
    """As in stock; so rounding, which flips pixels at an edge, rarely changes the run."""
    masks = masks_of(True)
    pred = masks.roll(8, -1)
    other = pred.clone()
    other[0, 0, 4, 14] ^= True
    moved = 0
    for seed in range(50):
        one, two = (sampler_of(masks, seeds=[seed]).next_point(masks, mask, "uniform")[0] for mask in (pred, other))
        moved += not torch.equal(one, two)
    assert moved <= 3


def test_a_mask_that_fills_the_frame_and_is_found_is_clicked_positively():
    masks = torch.ones(1, 1, SIZE, SIZE, dtype=torch.bool)
    drawn = [sampler_of(masks, seeds=[seed]).next_point(masks, masks, "uniform") for seed in range(5)]
    assert (
        all(labels.tolist() == [[1]] for _, labels in drawn)
        and len({tuple(points[0, 0].tolist()) for points, _ in drawn}) == 5
    )


def test_seeded_clicks_are_spread_as_stocks_are():
    """Over the pixels of an error region of two parts, one to be clicked positively: chi-squared of 4,000 draws
    each."""
    masks = masks_of(True)
    pred = masks.roll(8, -1)
    wrong = (masks ^ pred)[0, 0].flatten()
    counts = []
    torch.manual_seed(1)
    for draw in (
        lambda i: sampler_of(masks, seeds=[i]).next_point(masks, pred, "uniform"),
        lambda i: get_next_point(masks, pred, "uniform"),
    ):
        points = torch.stack([draw(i)[0][0, 0] for i in range(4000)]).long()
        counts.append(torch.bincount(points[:, 1] * SIZE + points[:, 0], minlength=SIZE * SIZE)[wrong])
    for found in counts:
        expected = 4000 / len(found)
        assert found.sum() == 4000
        assert ((found - expected) ** 2 / expected).sum() < len(found) + 5 * (2 * len(found)) ** 0.5


def test_installed_only_inside():
    sampler = sampler_of(masks_of(True))
    with pytest.raises(RuntimeError), sampler.installed():
        assert host.get_next_point == sampler.next_point and host.sample_box_points == sampler.box
        raise RuntimeError
    assert host.get_next_point is get_next_point and host.sample_box_points is sample_box_points
