"""The strip as a video: windows, clips for training and evaluation."""

import random

import numpy as np
import pytest
from PIL import Image

from helpers.data_sets import (
    HEIGHT,
    OBJECTS,
    STRIPS,
    WIDTH,
    batch_of,
    class_masks,
    identifiers,
    reader,
    video_dataset,
    write_kaggle,
)
from sam2_lora_ext.data.dataset import SeverstalRawDataset
from sam2_lora_ext.data.pixels import ModelInput
from sam2_lora_ext.data.rle import NO_RUNS, encode_mask
from sam2_lora_ext.data.windows import Windows, fits, walk
from sam2_lora_ext.utils.errors import UserError

CLIP = {"width": 60, "stride": 30, "num_frames": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_kaggle(tmp_path_factory.mktemp("kaggle") / "k")


def test_windows_closed_form():
    windows = Windows(60, 30, 3)
    assert windows.span == 120
    assert windows.fixed(200) == [(0, 60), (30, 90), (60, 120), (90, 150), (120, 180), (140, 200)]
    assert windows.fixed(180) == [(0, 60), (30, 90), (60, 120), (90, 150), (120, 180)]
    assert windows.clip(200, 1) == [(30, 90), (60, 120), (90, 150)]
    assert windows.clip(200, 4) == [(120, 180), (90, 150), (60, 120)]  # too near to the right end: to the left
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[3, 50:80] = True
    assert windows.best_window(encode_mask(mask), HEIGHT, 200) == 1


@pytest.mark.parametrize(
    ("first", "count", "length", "step", "places"),
    [
        (0, 1, 1, 1, [0]),
        (2, 3, 6, 1, [2, 3, 4]),
        (2, 3, 6, -1, [2, 1, 0]),
        (4, 3, 6, 1, [4, 3, 2]),
        (1, 3, 6, -1, [1, 2, 3]),
        (1, 4, 4, 1, [1, 2, 3, 2]),
        (2, 4, 4, -1, [2, 1, 0, 1]),
        (1, 5, 2, 1, [1, 0, 1, 0, 1]),
    ],
)
def test_walk(first, count, length, step, places):
    assert walk(first, count, length, step) == places
    assert fits(first, count, length) == (len(set(places)) == count)


def test_drawn_windows_move_evenly_and_reach_both_ends():
    random.seed(0)
    windows = Windows(60, 30, 3)
    drawn = [windows.drawn(200, HEIGHT, [NO_RUNS]) for _ in range(300)]
    for clip in drawn:
        assert {stop - start for start, stop in clip} == {60}
        assert {b[0] - a[0] for a, b in zip(clip, clip[1:])} == {30}
        assert clip[0][0] >= 0 and clip[-1][1] <= 200
    assert {clip[0][0] for clip in drawn} == set(range(21)) and max(clip[-1][1] for clip in drawn) == 200


def test_drawn_windows_never_miss_all_objects():
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[5, WIDTH - 1] = True
    random.seed(0)
    drawn = [Windows(60, 30, 3).drawn(WIDTH, HEIGHT, [encode_mask(mask)]) for _ in range(100)]
    assert all(clip[-1][1] == WIDTH for clip in drawn)


def test_frames_and_masks_are_cut_from_the_strip_and_objects_keep_their_id(folder):
    random.seed(0)
    raw = SeverstalRawDataset(reader(folder), windows=CLIP, objects="classes", include_clean=False)
    dataset = video_dataset(raw, num_frames=3, max_num_objects=2, reverse_time_prob=0.5)
    directions = set()
    for _ in range(30):
        for item in range(len(dataset)):
            sample = dataset[item]
            name = raw.get_video(item)[0].video_name
            strip = np.asarray(Image.open(folder / "images" / name).convert("RGB"))
            pixels = [np.asarray(frame.data) for frame in sample.frames]
            starts = [next(x for x in range(WIDTH - 59) if np.array_equal(strip[:, x : x + 60], one)) for one in pixels]
            steps = set(np.diff(starts).tolist())
            assert steps in ({30}, {-30})
            directions |= steps
            ids = [[obj.object_id for obj in frame.objects] for frame in sample.frames]
            assert ids[0] == ids[1] == ids[2] and 1 <= len(ids[0]) <= 2
            for frame, start in zip(sample.frames, starts):
                for obj in frame.objects:
                    truth = class_masks(STRIPS[name])[obj.object_id // 1_000_000][:, start : start + 60]
                    np.testing.assert_array_equal(obj.segment, truth)
            assert all(obj.segment.any() for obj in sample.frames[0].objects)  # a prompt needs something to point at
    assert directions == {30, -30}


def test_evaluation_clips_show_every_object_once_and_begin_where_it_shows_most(folder):
    raw = SeverstalRawDataset(reader(folder), training=False, windows=CLIP, max_objects=2)
    dataset = video_dataset(raw, [ModelInput(32)], num_frames=3)
    found = identifiers(dataset)
    assert len(found) == len(set(found)) == OBJECTS + 2
    assert identifiers(dataset) == found
    for item in range(len(raw)):
        video, loader = raw.get_video(item)
        assert len(video.frames) == 3 == len(set(loader.windows))
        for number in loader.objects:
            first = int(loader.load(0)[number].sum())
            assert first == max(
                int(loader.load(frame)[number].sum()) for frame in range(3) if number in loader.load(frame)
            )
    batch = batch_of([dataset[0], dataset[1]])
    assert batch.img_batch.shape == (3, 2, 3, 32, 32) and batch.masks.shape[0] == 3


def test_clean_clip_has_its_object_in_every_frame(folder):
    raw = SeverstalRawDataset(reader(folder), training=False, windows=CLIP)
    clean = [item for item in range(len(raw)) if not raw.classes_of(item)]
    assert len(clean) == 2
    sample = video_dataset(raw, num_frames=3)[clean[0]]
    assert [[obj.object_id for obj in frame.objects] for frame in sample.frames] == [[0], [0], [0]]
    assert not any(obj.segment.any() for frame in sample.frames for obj in frame.objects)


@pytest.mark.parametrize(
    ("windows", "more", "words"),
    [
        ({"width": 60, "stride": 60, "num_frames": 3}, {}, "must overlap"),
        ({"width": 60, "stride": 0, "num_frames": 3}, {}, "must overlap"),
        ({"width": 60, "stride": 30, "num_frames": 1}, {}, "at least 2 frames"),
        ({"width": 100, "stride": 80, "num_frames": 3}, {}, "need 260"),
        (CLIP, {"clean_share": 0.2, "clean_part_width": 90}, "clean_part_width"),
        (CLIP, {"training": False, "group_width": 9}, "group_width"),
    ],
)
def test_bad_windows(folder, windows, more, words):
    with pytest.raises(UserError, match=words):
        SeverstalRawDataset(reader(folder), windows=windows, **more)


def test_sampler_says_when_there_are_too_few_frames(folder):
    raw = SeverstalRawDataset(reader(folder), training=False)
    with pytest.raises(UserError, match="has 1 frames"):
        video_dataset(raw, num_frames=2)[0]
