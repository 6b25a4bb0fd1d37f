"""Kaggle's mean Dice and submission.csv: by hand, and read back by this package's own reader."""

import numpy as np
import pytest
import torch

from sam2_lora_ext.data.ids import object_id
from sam2_lora_ext.data.index import pack
from sam2_lora_ext.data.kaggle import KaggleReader
from sam2_lora_ext.data.records import ImageRecord
from sam2_lora_ext.data.rle import encode_mask
from sam2_lora_ext.errors import UserError
from sam2_lora_ext.evaluate.kaggle import KaggleTally
from sam2_lora_ext.evaluation import Sample


def square(y: int, x: int, side: int = 12, size: int = 40) -> np.ndarray:
    mask = np.zeros((size, size), dtype=bool)
    mask[y : y + side, x : x + side] = True
    return mask


def kaggle_case() -> tuple[KaggleTally, Sample, np.ndarray]:
    """Three images of 40 x 40, two classes: a with class 1 and a speck of class 2, b with a speck alone, c clean."""
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
    assert scores["dice"] == pytest.approx(
        (value + 0 + 0 + 3) / 6
    )  # (a,1), (a,2), (b,2) have defects, three pairs are empty
    assert scores["dice_present"] == pytest.approx(value / 3)
    assert scores["empty_submission"] == pytest.approx(0.5) and scores["pairs"] == 6


def test_submission_is_read_back_as_it_was_predicted(tmp_path):
    from PIL import Image

    tally, sample, predicted = kaggle_case()
    tally(sample, "1click", torch.from_numpy(predicted)[:, None])
    tally(sample, "box", torch.from_numpy(~predicted)[:, None])  # another prompt's masks stay out
    for name in "abc":
        Image.new("RGB", (40, 40)).save(tmp_path / f"{name}.png")
    tally.write(tmp_path / "submission.csv", force=False)
    assert len((tmp_path / "submission.csv").read_text().splitlines()) == 1 + 3 * 2
    records = {
        record.name: record for record in KaggleReader(tmp_path, tmp_path / "submission.csv", 2, (40, 40)).records()
    }
    assert (
        [number for number, _ in records["a.png"].masks] == [1]
        and not records["b.png"].masks
        and not records["c.png"].masks
    )
    assert np.array_equal(records["a.png"].masks[0][1], encode_mask(predicted.any(0)))
    with pytest.raises(UserError, match="exists already"):
        tally.write(tmp_path / "submission.csv", force=False)
