"""Training samples of class steps: every class of the table, present or absent by its pixels in the window."""

import random
from collections import Counter

import numpy as np
import pytest

from helpers.data_sets import HEIGHT, STRIPS, WIDTH, class_masks, reader, video_dataset, write_kaggle
from sam2_lora_ext.data.class_samples import ClassSteps, StepSamples
from sam2_lora_ext.data.class_targets import bounded, draw_pixel, window_targets
from sam2_lora_ext.data.dataset import SeverstalRawDataset
from sam2_lora_ext.data.ids import by_class_prompt, class_of, is_corrected
from sam2_lora_ext.data.rle import decode_runs, encode_mask
from sam2_lora_ext.utils.errors import UserError

CLASSES = [1, 2, 3, 4]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_kaggle(tmp_path_factory.mktemp("kaggle") / "k")


def draws(dataset, item, count=200, seed=0, width=50, **settings):
    """Samples of one item, drawn with a given seed."""
    random.seed(seed)
    steps = ClassSteps(width, transforms=[], **settings)
    return [steps.sample(dataset, item, corrected=False) for _ in range(count)]


def where(sample, dataset):
    """The name of a sample's strip, and the first column of its window there, found by the pixels."""
    raw = dataset.video_dataset
    strip, part = raw.index.read(sample.video_id), np.asarray(sample.frames[0].data)
    for start in range(WIDTH - part.shape[1] + 1):
        if (strip[:, start : start + part.shape[1]] == part).all():
            return raw.index.name(sample.video_id), start
    raise AssertionError("the picture is no part of its strip")


def test_a_class_is_present_by_what_the_window_shows(folder):
    dataset = video_dataset(SeverstalRawDataset(reader(folder)))
    for item in range(4):
        for sample in draws(dataset, item, count=40):
            name, start = where(sample, dataset)
            masks = class_masks(STRIPS[name])
            ids = [obj.object_id for obj in sample.frames[0].objects]
            assert [class_of(number) for number in ids] == CLASSES
            assert all(by_class_prompt(number) and not is_corrected(number) for number in ids)
            for obj in sample.frames[0].objects:
                whole = masks.get(class_of(obj.object_id), np.zeros((HEIGHT, WIDTH), bool))
                np.testing.assert_array_equal(obj.segment.numpy() > 0, whole[:, start : start + 50])
            assert sample.size == (HEIGHT, 50)


def test_half_of_the_windows_lie_around_a_defect(folder):
    """b.jpg has one defect in columns 100 to 190: of 151 uniform windows those that start at 51 or later show it."""
    dataset = video_dataset(SeverstalRawDataset(reader(folder)))
    shown = {}
    for around in (0.0, 0.5, 1.0):
        samples = draws(dataset, 1, count=400, around=around)
        shown[around] = np.mean([bool(sample.frames[0].objects[3].segment.any()) for sample in samples])
    uniform = 100 / 151
    assert shown[1.0] == 1
    assert abs(shown[0.0] - uniform) < 0.1 and abs(shown[0.5] - (1 + uniform) / 2) < 0.1  # 4 deviations of 400 draws


def test_each_class_is_as_likely_to_be_looked_for(folder):
    """a.jpg has two objects of class 1 and one of class 3, far apart: half of the windows around them show class 3."""
    dataset = video_dataset(SeverstalRawDataset(reader(folder)))
    counts = Counter()
    for sample in draws(dataset, 0, count=400, around=1.0):
        counts.update(class_of(obj.object_id) for obj in sample.frames[0].objects if obj.segment.any())
    assert abs(counts[3] / 400 - 0.5) < 0.12


def test_specks_are_neither_present_nor_absent(folder):
    """d.jpg has specks of one pixel in columns 0 and 5 and a defect of class 3 in columns 30 to 45."""
    raw = SeverstalRawDataset(reader(folder), min_area=16)
    image = 3

    def targets(*window):
        return window_targets(raw.objects, image, HEIGHT, window, raw.min_area)

    assert list(targets(0, 20)) == [1, 2, 4]  # only specks: class 3 is not used
    assert list(targets(6, 20)) == CLASSES and not len(targets(6, 20)[3])  # no pixel of it: absent
    assert targets(0, 50)[3][:, 1].sum() == 2 + 15 * 20  # next to a defect, specks belong to the target
    assert list(targets(6, 30)) == CLASSES
    assert list(targets(44, 60)) == CLASSES and targets(44, 60)[3][:, 1].sum() == 20  # one column, 20 px
    rest = SeverstalRawDataset(reader(folder), min_area=21)
    assert 3 not in window_targets(rest.objects, image, HEIGHT, (44, 60), 21)  # an edge of fewer than min_area pixels


def test_windows_never_call_a_speck_absent(folder):
    dataset = video_dataset(SeverstalRawDataset(reader(folder), min_area=16))
    seen = set()
    for sample in draws(dataset, 3, count=150, around=0.2, width=20):
        name, start = where(sample, dataset)
        if name != "d.jpg":
            continue
        shown = class_masks(STRIPS[name])[3][:, start : start + 20]
        large = shown[:, max(0, 30 - start) :].sum()  # of the defect at 30..45
        found = {class_of(obj.object_id): bool(obj.segment.any()) for obj in sample.frames[0].objects}
        wanted = True if large >= 16 else None if shown.any() else False
        assert found.get(3) is wanted
        seen.add(wanted)
    assert seen == {True, False, None}


def test_images_that_lost_a_mask_take_no_part(tmp_path):
    folder = write_kaggle(tmp_path / "k")
    table = folder / "train.csv"
    table.write_text(table.read_text().replace("a.jpg,1,", "a.jpg,1,0 "))  # a.jpg keeps only class 3
    dataset = video_dataset(SeverstalRawDataset(reader(folder), on_invalid="skip"))
    raw = dataset.video_dataset
    place = [raw.get_video(item)[0].video_name for item in range(len(raw))].index("a.jpg")
    assert not raw.index.complete[0]
    names = {raw.index.name(sample.video_id) for sample in draws(dataset, place, count=60)}
    assert names == {"b.jpg", "c.jpg", "d.jpg", "e.jpg", "f.jpg"}


def test_all_images_lost_a_mask(tmp_path):
    strips = {name: STRIPS[name] for name in ("a.jpg", "d.jpg")}
    folder = write_kaggle(tmp_path / "k", strips)
    table = folder / "train.csv"
    table.write_text(table.read_text().replace("a.jpg,1,", "a.jpg,1,0 ").replace("d.jpg,2,", "d.jpg,2,0 "))
    dataset = video_dataset(SeverstalRawDataset(reader(folder), on_invalid="skip"))
    with pytest.raises(UserError, match="absent classes are unknown"):
        ClassSteps(50, []).check(dataset)


def test_clean_strips_have_every_class_absent(folder):
    dataset = video_dataset(SeverstalRawDataset(reader(folder), clean_share=0.5, clean_part_width=60))
    raw = dataset.video_dataset
    for item in range(len(raw.items), len(raw)):
        for sample in draws(dataset, item, count=10):
            assert [class_of(obj.object_id) for obj in sample.frames[0].objects] == CLASSES
            assert not any(obj.segment.any() for obj in sample.frames[0].objects)
            assert sample.frames[0].data.size == (50, HEIGHT)


def test_a_bound_of_classes_takes_present_ones_first():
    some = np.array([[0, 3]])
    targets = {1: some[:0], 2: some, 3: some[:0], 4: some, 5: some[:0]}
    random.seed(0)
    for most in (1, 2, 3, 5, None):
        for _ in range(20):
            taken = bounded(targets, most)
            assert list(taken) == sorted(taken) and len(taken) == min(most or 5, 5)
            assert set(taken) <= {2, 4} if most == 1 else set(taken) >= {2, 4}
    assert {tuple(bounded(targets, 3)) for _ in range(60)} == {(1, 2, 4), (2, 3, 4), (2, 4, 5)}


def test_narrow_strips_wide_windows_and_grids(folder):
    dataset = video_dataset(SeverstalRawDataset(reader(folder)))
    random.seed(0)
    for width in (None, WIDTH, 1000):
        assert ClassSteps(width, []).sample(dataset, 0, False).size == (HEIGHT, WIDTH)
    steps = ClassSteps(50, [], grid=40)
    starts = {where(steps.sample(dataset, 1, False), dataset)[1] for _ in range(60)}
    assert starts <= {0, 40, 80, 120, 150} and len(starts) > 2


def test_pixels_of_a_mask_are_as_likely():
    mask = np.zeros((5, 9), bool)
    mask[1:3, 2:4] = mask[4, 7] = True
    random.seed(0)
    counts = Counter(draw_pixel(encode_mask(mask)) for _ in range(5000))
    assert set(counts) == {x * 5 + y for y, x in np.argwhere(mask)}
    assert max(abs(count / 5000 - 0.2) for count in counts.values()) < 0.03


def test_clips_and_foreign_data_are_refused(folder):
    windows = {"width": 80, "stride": 40, "num_frames": 2}
    for dataset in (
        video_dataset(SeverstalRawDataset(reader(folder), windows=windows), num_frames=2),
        video_dataset(SeverstalRawDataset(reader(folder)), num_frames=2),
    ):
        with pytest.raises(UserError, match="single frames: set dataset.windows to null"):
            ClassSteps(50, []).check(dataset)
    with pytest.raises(UserError, match="SeverstalRawDataset"):
        ClassSteps(50, []).check(object())


@pytest.mark.parametrize(
    "settings", [{"share": 1.5}, {"corrections": -0.1}, {"around": 2}, {"width": 0}, {"max_classes": 0}, {"grid": 60}]
)
def test_bad_settings(settings):
    with pytest.raises(UserError):
        ClassSteps(**{"width": 50, "transforms": [], **settings})


def test_only_specks_and_one_class_is_a_sentence(tmp_path):
    folder = write_kaggle(tmp_path / "k", {"a.jpg": [(1, 0, 0, 2, 2), (1, 100, 0, 120, 20)]})
    raw = SeverstalRawDataset(reader(folder, classes=["pit"]), min_area=50)
    random.seed(0)
    dataset = video_dataset(raw)
    samples = [ClassSteps(50, [], around=0.0).sample(dataset, 0, False) for _ in range(40)]
    assert all(len(sample.frames[0].objects) == 1 for sample in samples)  # windows with only the speck are drawn again
    raw.min_area = 10**6
    with pytest.raises(UserError, match="lower dataset.min_area"):
        ClassSteps(None, []).sample(dataset, 0, False)


def test_decoded_targets_equal_the_annotation(folder):
    raw = SeverstalRawDataset(reader(folder))
    for image, (name, boxes) in enumerate(STRIPS.items()):
        for class_id, runs in window_targets(raw.objects, image, HEIGHT, (10, 170), 1).items():
            whole = class_masks(boxes).get(class_id, np.zeros((HEIGHT, WIDTH), bool))
            np.testing.assert_array_equal(decode_runs(runs, HEIGHT, 160) > 0, whole[:, 10:170], name)


def test_each_sample_is_read_in_the_way_of_its_step(folder):
    dataset = video_dataset(SeverstalRawDataset(reader(folder)))
    samples = StepSamples(dataset, [0, 1], ["clicks", "corrected"], ClassSteps(50, []))
    random.seed(0)
    assert len(samples) == 2
    assert not any(by_class_prompt(obj.object_id) for obj in samples[0].frames[0].objects)
    assert all(is_corrected(obj.object_id) for obj in samples[1].frames[0].objects)
