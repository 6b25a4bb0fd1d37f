"""Sampling in training: clean strips, rare classes, small objects, and the images of a split."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from training.dataset.utils import RepeatFactorWrapper

from helpers.data_sets import (
    HEIGHT,
    STRIPS,
    WIDTH,
    reader,
    video_dataset,
    write_kaggle,
)
from sam2_lora_ext.data.balance import BalancedVOSDataset, repeat_factors
from sam2_lora_ext.data.dataset import SeverstalRawDataset
from sam2_lora_ext.data.items import clean_part, read_split
from sam2_lora_ext.data.pixels import ModelInput
from sam2_lora_ext.data.sampler import ObjectSampler
from sam2_lora_ext.data.transforms import RandomStripCrop
from sam2_lora_ext.utils.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_kaggle(tmp_path_factory.mktemp("kaggle") / "k")


def test_sampler_is_fair_to_small_objects_and_bounded(folder):
    raw = SeverstalRawDataset(reader(folder))
    video, loader = raw.get_video(3)  # four objects of 400, 1, 1 and 300 pixels
    random.seed(0)
    sampler = ObjectSampler(max_num_objects=2)
    draws = [sampler.sample(video, loader).object_ids for _ in range(4000)]
    assert all(len(set(draw)) == 2 for draw in draws)
    counts = Counter(number for draw in draws for number in draw)
    assert all(abs(count / 4000 - 0.5) < 0.04 for count in counts.values())  # 5 standard deviations of the share
    assert len(counts) == 4
    random.seed(3)
    first = sampler.sample(video, loader).object_ids
    random.seed(3)
    assert sampler.sample(video, loader).object_ids == first


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.8])
def test_share_of_clean_samples(folder, share):
    raw = SeverstalRawDataset(reader(folder), clean_share=share)
    clean = sum(not raw.classes_of(item) for item in range(len(raw)))
    assert clean == round(4 * share / (1 - share)) and len(raw) == 4 + clean
    random.seed(1)
    names = {raw.get_video(item)[0].video_name for _ in range(20) for item in range(4, len(raw))}
    assert names == ({"c.jpg", "e.jpg"} if share else set())


def test_without_clean_images(folder):
    assert len(SeverstalRawDataset(reader(folder), include_clean=False)) == 4
    assert len(SeverstalRawDataset(reader(folder), training=False, include_clean=False)) == 4


def test_clean_parts_of_defective_strips(folder):
    raw = SeverstalRawDataset(reader(folder), include_clean=False, clean_share=0.5, clean_part_width=50)
    index = raw.index
    random.seed(0)
    widths = {}
    for _ in range(40):
        for item in range(4, len(raw)):
            video, loader = raw.get_video(item)
            ((number, mask),) = loader.load(0).items()
            assert number == 0 and not mask.any()
            (start, stop) = loader.windows[0]
            assert stop - start >= 50
            for _, runs in index.masks(video.video_id):
                columns = np.concatenate([np.arange(s, s + n) // HEIGHT for s, n in runs])
                assert ((columns < start - 15) | (columns >= stop + 15)).all()  # 16 columns off the nearest defect
            sample = video_dataset(raw)._get_datapoint(item)
            assert sample.frames[0].data.size == (sample.frames[0].objects[0].segment.shape[1], HEIGHT)
            widths[video.video_name] = stop - start
    assert widths == {"a.jpg": 54, "b.jpg": 84, "d.jpg": 103, "f.jpg": 144}
    assert clean_part(index, 2, 50) == (0, WIDTH)  # a clean image
    assert clean_part(index, 1, 85) is None


def test_pixels_of_a_part_are_the_pixels_of_the_file(folder):
    raw = SeverstalRawDataset(reader(folder), include_clean=False, clean_share=0.5, clean_part_width=50)
    random.seed(0)
    video, loader = raw.get_video(4)
    start, stop = loader.windows[0]
    from training.dataset.vos_dataset import load_images

    whole = np.asarray(Image.open(folder / "images" / video.video_name).convert("RGB"))
    np.testing.assert_array_equal(np.asarray(load_images(video.frames)[0]), whole[:, start:stop])


def test_image_that_lost_a_mask_is_never_clean(tmp_path):
    folder = write_kaggle(tmp_path / "k")
    text = (folder / "train.csv").read_text().replace("b.jpg,4,", "b.jpg,4,0 ").replace("a.jpg,1,", "a.jpg,1,0 ")
    (folder / "train.csv").write_text(text)
    raw = SeverstalRawDataset(reader(folder), on_invalid="skip", clean_share=0.5, clean_part_width=20)
    random.seed(0)
    names = {raw.get_video(item)[0].video_name for _ in range(60) for item in range(len(raw.items), len(raw))}
    assert names == {"c.jpg", "d.jpg", "e.jpg", "f.jpg"}
    assert "b.jpg" not in raw.index.names()


def test_splits(folder, tmp_path):
    table = tmp_path / "split.csv"
    table.write_text("split,image\n" + "\n".join(f"{split},{name}" for split, name in zip("xxyyzz", STRIPS)))

    def names(split):
        raw = SeverstalRawDataset(reader(folder), split_file=table, split=split)
        return [raw.get_video(item)[0].video_name for item in range(len(raw))]

    assert names("x") == ["a.jpg", "b.jpg"] and names("!x") == ["c.jpg", "d.jpg", "e.jpg", "f.jpg"]
    assert names(["x", "z"]) == ["a.jpg", "b.jpg", "e.jpg", "f.jpg"]
    raw = SeverstalRawDataset(reader(folder), split_file=table, split="y")
    assert raw.get_video(0)[0].video_id == 2  # the row in the index, whatever the split
    listed = tmp_path / "list.txt"
    listed.write_text("f.jpg\n\na.jpg\n")
    assert read_split(listed, None) == ["f.jpg", "a.jpg"]
    assert len(SeverstalRawDataset(reader(folder), split_file=listed)) == 2


@pytest.mark.parametrize(
    ("text", "split", "words"),
    [
        ("image,split\na.jpg,x\n", "y", "no split 'y'; it has x"),
        ("image,fold\na.jpg,x\n", "x", "columns image and split"),
        ("image,split\na.jpg,x\na.jpg,x\n", "x", "a.jpg twice"),
        ("image,split\nq.jpg,x\n", "x", "'q.jpg'"),
        ("", "x", "columns image and split"),
        ("\n\n", None, "names no image"),
        ("image,split\nc.jpg,x\n", "!x", "names no image"),
    ],
)
def test_bad_splits(folder, tmp_path, text, split, words):
    (tmp_path / "split.csv").write_text(text)
    with pytest.raises(UserError, match=words):
        SeverstalRawDataset(reader(folder), split_file=tmp_path / "split.csv", split=split)


def test_split_may_name_images_that_were_skipped(tmp_path):
    folder = write_kaggle(tmp_path / "k")
    (folder / "images/a.jpg").write_bytes(b"")
    (tmp_path / "list.txt").write_text("a.jpg\nb.jpg\n")
    assert len(SeverstalRawDataset(reader(folder), on_invalid="skip", split_file=tmp_path / "list.txt")) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_frames": 0},
        {"max_num_objects": 0},
        {"training": False, "max_num_objects": 2},
        {"training": False, "reverse_time_prob": 0.5},
    ],
)
def test_bad_sampler_arguments(arguments):
    with pytest.raises(UserError):
        ObjectSampler(**arguments)


def test_repeat_factors_closed_form():
    # f(1) = 1, f(2) = 1/4: with t = 1 class 2 repeats sqrt(4) times; the clean sample by the mean (1 + 1 + 1 + 2) / 4
    assert repeat_factors([{1}, {1}, set(), {1}, {1, 2}], 1.0).tolist() == [1, 1, 1.25, 1, 2]
    assert repeat_factors([set(), set()], 0.5).tolist() == [1, 1]


def test_balanced_sampling_with_stock_wrapper(folder):
    raw = SeverstalRawDataset(reader(folder), clean_share=0.5)
    dataset = BalancedVOSDataset(
        raw,
        1.0,
        transforms=[RandomStripCrop(50), ModelInput(32)],
        training=True,
        sampler=ObjectSampler(max_num_objects=2),
    )
    classes = [raw.classes_of(item) for item in range(len(raw))]
    assert classes[:4] == [{1, 3}, {4}, {2, 3}, {3}]
    torch.testing.assert_close(dataset.repeat_factors[:4], torch.tensor([2, 2, 2, (4 / 3) ** 0.5]))
    wrapper = RepeatFactorWrapper(dataset)
    counts = np.zeros(len(raw))
    for epoch in range(300):
        wrapper.set_epoch(epoch)
        counts += np.bincount(wrapper.epoch_ids, minlength=len(raw))
    np.testing.assert_allclose(
        counts / 300, dataset.repeat_factors, atol=0.12
    )  # 4 deviations of a mean of 300 coin tosses
    assert abs(counts[4:].sum() / counts.sum() - 0.5) < 0.02
    natural = BalancedVOSDataset(raw, None, transforms=[], training=True, sampler=ObjectSampler())
    assert natural.repeat_factors.tolist() == [1] * len(raw)
    assert wrapper[0].frames[0].data.shape == (3, 32, 32)
