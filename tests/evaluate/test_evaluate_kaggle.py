"""Kaggle's mean Dice and submission.csv: by hand, and read back by this package's own reader."""

import itertools

import numpy as np
import pytest
import torch

from sam2_lora_ext.data.ids import object_id
from sam2_lora_ext.data.index import pack
from sam2_lora_ext.data.kaggle import KaggleReader
from sam2_lora_ext.data.records import ImageRecord
from sam2_lora_ext.data.rle import encode_mask
from sam2_lora_ext.evaluate.kaggle_score import KaggleTally
from sam2_lora_ext.evaluate.predictor import Sample
from sam2_lora_ext.utils.errors import UserError


def square(y: int, x: int, side: int = 12, size: int = 40) -> np.ndarray:
    mask = np.zeros((size, size), dtype=bool)
    mask[y : y + side, x : x + side] = True
    return mask


def kaggle_case() -> tuple[KaggleTally, Sample, np.ndarray]:
    """Three images of 40 x 40, two classes: a with class 1 and a speck of class 2, b with only a speck, c clean."""
    speck = np.zeros((40, 40), bool)
    speck[0, 0] = True
    records = [
        ImageRecord("a.png", 40, 40, [(1, encode_mask(square(5, 5) | square(25, 25, 4))), (2, encode_mask(speck))]),
        ImageRecord("b.png", 40, 40, [(2, encode_mask(speck))]),
        ImageRecord("c.png", 40, 40),
    ]
    index = pack(records, "images", {1: "one", 2: "two"})
    masks = torch.from_numpy(np.stack([square(5, 5), square(25, 25, 4)]))[:, None]
    sample = Sample("a.png", np.zeros((40, 40, 3), np.uint8), [object_id(1, 0), object_id(1, 1)], masks)
    return KaggleTally(index, range(3), "1click"), sample, np.stack([square(5, 5), square(20, 20, 5)])


def test_kaggle_dice_by_hand():
    tally, sample, predicted = kaggle_case()
    tally(sample, "1click", torch.from_numpy(predicted)[:, None])
    value = 2 * 144 / ((144 + 25) + (144 + 16))  # one pixel-disjoint object is missed: 20..24 and 25..28 do not meet
    scores = tally.summary()["1click"]
    # (a,1), (a,2), (b,2) have defects, three pairs are empty
    assert scores["dice"] == pytest.approx((value + 0 + 0 + 3) / 6)
    assert scores["dice_present"] == pytest.approx(value / 3)
    assert scores["empty_submission"] == pytest.approx(0.5) and scores["pairs"] == 6


def test_kaggle_intervals_and_differences_are_by_image():
    """Three images have 27 equally likely resamples; each extreme is 3.7 % of them, so both bounds are extremes."""
    tally, sample, predicted = kaggle_case()
    tally(sample, "1click", torch.from_numpy(predicted)[:, None])
    value = 2 * 144 / ((144 + 25) + (144 + 16))
    images = {"a": (value + 0) / 2, "b": (1 + 0) / 2, "c": 1.0}
    every = [np.mean(drawn) for drawn in itertools.product(images.values(), repeat=3)]
    assert tally.summary()["1click"]["dice_ci95"] == pytest.approx([min(every), max(every)])
    better, *_ = kaggle_case()
    better(sample, "1click", sample.masks)
    gain = tally.difference(better)["kaggle_1click"]
    assert gain["mean"] == pytest.approx((1 - value) / 6) and gain["low"] == 0.0  # only image a can gain
    assert gain["images"] == 3 and gain["objects"] == 6
    assert tally.difference(tally)["kaggle_1click"]["high"] == 0.0


def test_kaggle_dice_agrees_with_torchmetrics():
    from torchmetrics.functional.classification import binary_f1_score

    tally, sample, predicted = kaggle_case()
    tally(sample, "1click", torch.from_numpy(predicted)[:, None])
    images, values, present = tally.pairs("1click")
    for (name, number), value, there in zip(((i, c) for i in "abc" for c in (1, 2)), values, present, strict=True):
        union = torch.from_numpy(predicted.any(0) & ((name, number) == ("a", 1)))
        truth = tally.truth(f"{name}.png", number)
        theirs = float(binary_f1_score(union.int(), truth.int(), zero_division=1.0))
        assert value == pytest.approx(theirs, abs=1e-6) and there == bool(truth.any())  # theirs is float32
    assert images == ["a.png", "a.png", "b.png", "b.png", "c.png", "c.png"]


def test_submission_is_read_back_as_it_was_predicted(tmp_path):
    from PIL import Image

    tally, sample, predicted = kaggle_case()
    tally(sample, "1click", torch.from_numpy(predicted)[:, None])
    tally(sample, "box", torch.from_numpy(~predicted)[:, None])  # another prompt's masks stay out
    for name in "abc":
        Image.new("RGB", (40, 40)).save(tmp_path / f"{name}.png")
    tally.write(tmp_path / "submission.csv", force=False)
    assert len((tmp_path / "submission.csv").read_text().splitlines()) == 1 + 3 * 2
    reader = KaggleReader(tmp_path, tmp_path / "submission.csv", 2, (40, 40))
    records = {record.name: record for record in reader.records()}
    assert [number for number, _ in records["a.png"].masks] == [1]
    assert not records["b.png"].masks and not records["c.png"].masks
    assert np.array_equal(records["a.png"].masks[0][1], encode_mask(predicted.any(0)))
    with pytest.raises(UserError, match="exists already"):
        tally.write(tmp_path / "submission.csv", force=False)


def test_images_without_an_object_to_ask_about_count_too(strips):
    from sam2_lora_ext.data.dataset import SeverstalRawDataset

    reader = KaggleReader(strips / "train_images", strips / "train.csv")
    choice = {"split_file": strips / "split.csv", "split": "val"}
    dataset = SeverstalRawDataset(reader, training=False, include_clean=False, min_area=4000, **choice)
    rows = (strips / "split.csv").read_text().splitlines()
    validating = {row.removesuffix(",val") for row in rows if row.endswith(",val")}
    tally = KaggleTally(dataset.index, dataset.images, "1click")
    assert set(tally.places) == validating and len(dataset) < len(validating)


def test_an_image_that_may_lack_masks_has_no_empty_pairs():
    tally, sample, predicted = kaggle_case()
    tally(sample, "1click", torch.from_numpy(predicted)[:, None])
    tally.index.complete[1] = False
    images, _, present = tally.pairs("1click")
    assert images == ["a.png", "a.png", "c.png", "c.png"] and present.tolist() == [True, True, False, False]
