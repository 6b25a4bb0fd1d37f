"""Run-length codes and components against pycocotools, OpenCV and scipy, and on real annotations."""

import csv

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as mask_utils
from scipy import ndimage

from sam2_lora_ext.data import rle
from sam2_lora_ext.data.components import find_components

MASKS = hnp.arrays(
    bool, st.tuples(st.integers(1, 14), st.integers(1, 14)), elements=st.booleans()
)  # noise: holes, single pixels and diagonal contacts are common


def components_of(masks: list[np.ndarray]):
    runs = [rle.encode_mask(mask) for mask in masks]
    return find_components(
        np.concatenate(runs),
        np.append(0, np.cumsum([len(r) for r in runs])),
        np.array([mask.shape[0] for mask in masks]),
        np.array([mask.shape[1] for mask in masks]),
    )


@settings(max_examples=150, deadline=None)
@given(MASKS)
def test_codes_agree_with_pycocotools(mask):
    height, width = mask.shape
    runs = rle.encode_mask(mask)
    assert runs.dtype == np.int32
    np.testing.assert_array_equal(rle.decode_runs(runs, height, width), mask)
    counts = rle.to_coco_counts(runs, height, width)
    compressed = mask_utils.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    np.testing.assert_array_equal(mask_utils.decode(compressed), mask)
    assert mask_utils.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"] == compressed["counts"]
    np.testing.assert_array_equal(rle.from_coco_counts(counts), runs)
    assert rle.parse_coco_text(compressed["counts"].decode()) == counts
    if len(runs):
        np.testing.assert_array_equal(rle.parse_rle(rle.format_rle(runs), height, width), runs)


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.text(max_size=12), st.text(st.characters(min_codepoint=48, max_codepoint=111), max_size=12)))
def test_any_text_is_coco_counts_or_an_error(text):
    """pycocotools decodes 200,000 of these and then crashes by a corrupted heap."""
    try:
        counts = rle.parse_coco_text(text)
    except rle.RLEError as error:
        assert error.cause == "RLE not COCO"
    else:
        assert all(abs(count) < 2**40 for count in counts) and len(counts) <= len(text)


@settings(max_examples=100, deadline=None)
@given(MASKS, st.data())
def test_cropped_columns_are_the_cropped_mask(mask, data):
    height, width = mask.shape
    start = data.draw(st.integers(0, width - 1))
    stop = data.draw(st.integers(start + 1, width))
    runs = rle.crop_columns(rle.encode_mask(mask), height, start, stop)
    np.testing.assert_array_equal(runs, rle.encode_mask(mask[:, start:stop]))


@settings(max_examples=100, deadline=None)
@given(st.lists(hnp.arrays(bool, (6, 9), elements=st.booleans()), min_size=1, max_size=4))
def test_union_of_runs_is_the_union_of_masks(masks):
    union = rle.union_runs([rle.encode_mask(mask) for mask in masks])
    np.testing.assert_array_equal(union, rle.encode_mask(np.logical_or.reduce(masks)))


@settings(max_examples=150, deadline=None)
@given(st.lists(MASKS, min_size=1, max_size=4))
def test_components_agree_with_scipy_and_opencv(masks):
    found = components_of(masks)
    for number, mask in enumerate(masks):
        labels, count = ndimage.label(mask, np.ones((3, 3)))
        cv_count, cv_labels, cv_stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
        places = np.flatnonzero(found.mask == number)
        assert len(places) == count == cv_count - 1
        for place in places:
            runs = found.runs[found.run_offsets[place] : found.run_offsets[place + 1]]
            np.testing.assert_array_equal(runs, rle.join_runs(runs))  # ascending, joined over column ends
            part = rle.decode_runs(runs, *mask.shape) > 0
            label = labels[part][0]
            np.testing.assert_array_equal(part, labels == label)
            x, y, w, h, area = cv_stats[cv_labels[part][0]]
            assert found.boxes[place].tolist() == [x, y, x + w, y + h]
            assert found.areas[place] == area
        firsts = found.runs[found.run_offsets[places], 0]
        assert (np.diff(firsts) > 0).all()  # numbered by first pixel


def test_components_of_closed_forms():
    ring = np.ones((3, 3), bool)
    ring[1, 1] = False
    diagonal = np.eye(3, dtype=bool)
    wrapped = np.zeros((4, 3), bool)
    wrapped[3, 0] = wrapped[0, 1] = True  # neighbours in the run-length code, far apart in the image
    found = components_of([ring, diagonal, wrapped, np.zeros((2, 2), bool)])
    assert np.bincount(found.mask, minlength=4).tolist() == [1, 1, 2, 0]
    assert found.areas.tolist() == [8, 3, 1, 1]


def test_many_masks_are_cut_into_chunks_alike():
    rng = np.random.default_rng(0)
    masks = [rng.random((5, 7)) < 0.4 for _ in range(600)]
    found = components_of(masks)
    single = [components_of([mask]) for mask in masks]
    np.testing.assert_array_equal(found.runs, np.concatenate([one.runs for one in single]))
    np.testing.assert_array_equal(
        np.diff(found.run_offsets), np.concatenate([np.diff(one.run_offsets) for one in single])
    )
    np.testing.assert_array_equal(found.mask, np.repeat(np.arange(600), [len(one.mask) for one in single]))


def test_real_annotations_round_trip(real_data):
    csv.field_size_limit(1 << 26)
    with open(real_data / "severstal/annotations_only_500.csv", newline="") as file:
        texts = [row["EncodedPixels"] for row in csv.DictReader(file)]
    assert len(texts) == 704
    runs = [rle.parse_rle(text, 256, 1600) for text in texts]
    assert [rle.format_rle(one) for one in runs] == texts
    masks = [rle.decode_runs(one, 256, 1600) for one in runs]
    assert [rle.format_rle(rle.encode_mask(mask)) for mask in masks] == texts
    found = find_components(
        np.concatenate(runs), np.append(0, np.cumsum([len(r) for r in runs])), np.full(704, 256), np.full(704, 1600)
    )
    counts = [cv2.connectedComponents(np.ascontiguousarray(mask), connectivity=8)[0] - 1 for mask in masks]
    assert np.bincount(found.mask).tolist() == counts


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("1 2 3", "RLE odd"),
        ("1", "RLE odd"),
        ("1 x", "RLE not integers"),
        ("1.0 2", "RLE not integers"),
        ("1_0 2", "RLE not integers"),
        ("1,2", "RLE not integers"),
        ("\u0661 2", "RLE not integers"),
        ("1 0", "RLE length"),
        ("5 -1", "RLE length"),
        ("0 1", "RLE out of range"),
        ("-4 3", "RLE out of range"),
        ("12 2", "RLE out of range"),
        ("13 1", "RLE out of range"),
        ("1 99999999999999999999", "RLE out of range"),
        ("99999999999999999999 1", "RLE out of range"),
        ("1 3 3 2", "RLE overlap"),
        ("1 3 1 3", "RLE overlap"),
        ("6 2 1 2", "RLE order"),
    ],
)
def test_bad_codes_are_refused(text, cause):
    with pytest.raises(rle.RLEError) as caught:
        rle.parse_rle(text, 3, 4)
    assert caught.value.cause == cause


def test_good_codes_and_touching_runs():
    assert rle.parse_rle("1 12", 3, 4).tolist() == [[0, 12]]
    assert rle.parse_rle(" 1 2  3 1\n9 1 ", 3, 4).tolist() == [[0, 3], [8, 1]]
    assert rle.format_rle(rle.NO_RUNS) == ""
    assert rle.encode_mask(np.zeros((2, 3))).shape == (0, 2)
    assert rle.decode_runs(rle.NO_RUNS, 2, 3).tolist() == [[0, 0, 0], [0, 0, 0]]
    assert rle.to_coco_counts(rle.NO_RUNS, 2, 3) == [6]


@pytest.mark.parametrize("text", ["", " ", "nan", "NaN", "-1", "0 0", "1 1", " 1  1 ", "None", "null"])
def test_absent_masks(text):
    assert rle.is_absent(text)


@pytest.mark.parametrize("text", ["1 2", "2 1", "11", "1 1 3 1"])
def test_present_masks(text):
    assert not rle.is_absent(text)
