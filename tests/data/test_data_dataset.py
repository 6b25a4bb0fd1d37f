"""The data set inside SAM 2's own `VOSDataset` and loaders."""

import pickle

import numpy as np
import pytest
from PIL import Image
from training.dataset.sam2_datasets import TorchTrainMixedDataset
from training.dataset.transforms import ComposeAPI, NormalizeAPI, RandomResizeAPI, ToTensorAPI
from training.dataset.vos_dataset import VOSDataset
from training.dataset.vos_sampler import EvalSampler, RandomUniformSampler

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
from sam2_lora_ext.data.ids import class_of
from sam2_lora_ext.data.items import group_objects
from sam2_lora_ext.data.kaggle import KaggleReader
from sam2_lora_ext.data.pixels import ModelInput
from sam2_lora_ext.data.sampler import ObjectSampler
from sam2_lora_ext.data.transforms import FixedStripCrop
from sam2_lora_ext.utils.errors import UserError

STOCK_STEPS = ComposeAPI([RandomResizeAPI(64, True, square=True), ToTensorAPI(), NormalizeAPI([0.5] * 3, [0.5] * 3)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_kaggle(tmp_path_factory.mktemp("kaggle") / "k")


def masks_of(raw, item):
    return {number: mask.numpy() for number, mask in raw.get_video(item)[1].load(0).items()}


def test_objects_are_the_masks_of_the_table(folder):
    raw = SeverstalRawDataset(reader(folder), objects="classes")
    assert len(raw) == 6 and raw.class_names[3] == "defect_3"
    for item, (name, boxes) in enumerate(STRIPS.items()):
        video, _ = raw.get_video(item)
        assert (video.video_name, video.video_id) == (name, item)
        assert video.frames[0].image_path == str(folder / "images" / name)
        found = {int(class_of(number)): mask for number, mask in masks_of(raw, item).items()}
        expected = class_masks(boxes) or {0: np.zeros((HEIGHT, WIDTH))}
        assert set(found) == set(expected)
        for class_id, mask in expected.items():
            np.testing.assert_array_equal(found[class_id], mask)


def test_components_and_one_object(folder):
    parts = SeverstalRawDataset(reader(folder))
    assert list(masks_of(parts, 3)) == [2_000_000, 3_000_000, 3_000_001, 3_000_002]
    assert [int(mask.sum()) for mask in masks_of(parts, 3).values()] == [400, 1, 1, 300]
    whole = SeverstalRawDataset(reader(folder), objects="all")
    assert whole.class_names == {1: "defect"}
    (number,), (mask,) = masks_of(whole, 3), masks_of(whole, 3).values()
    assert number == 1_000_000
    np.testing.assert_array_equal(mask, np.logical_or.reduce(list(class_masks(STRIPS["d.jpg"]).values())))


def test_minimum_area_keeps_identifiers_and_never_makes_an_image_clean(folder):
    raw = SeverstalRawDataset(reader(folder), min_area=2)
    assert list(masks_of(raw, 3)) == [2_000_000, 3_000_002]
    large = SeverstalRawDataset(reader(folder), min_area=500)
    assert [large.get_video(item)[0].video_name for item in range(len(large))] == ["b.jpg", "c.jpg", "e.jpg"]


@pytest.mark.parametrize(
    "sampler",
    [RandomUniformSampler(1, 2), EvalSampler(), ObjectSampler(max_num_objects=2), ObjectSampler(training=False)],
    ids=lambda sampler: type(sampler).__name__,
)
def test_stock_vos_dataset_and_collate(folder, sampler):
    raw = SeverstalRawDataset(reader(folder))
    dataset = VOSDataset([STOCK_STEPS], True, raw, sampler, 1)
    batch = batch_of([dataset[item] for item in range(len(dataset))])
    assert batch.img_batch.shape == (1, 6, 3, 64, 64) and batch.masks.shape[-2:] == (64, 64)
    identifiers = batch.metadata.unique_objects_identifier[0]
    empty = ~batch.masks[0].flatten(1).any(1)
    clean = class_of(identifiers[:, 1]) == 0
    assert clean.sum() == 2 and bool(empty[clean].all())


def test_evaluation_shows_every_object_and_clean_image_once_in_the_same_order(folder):
    raws = [SeverstalRawDataset(reader(folder), training=False, max_objects=count) for count in (None, 1, 2)]
    lists = [identifiers(video_dataset(raw)) for raw in raws]
    assert lists[0] == lists[1] == lists[2] and len(lists[0]) == len(set(lists[0])) == OBJECTS + 2
    assert [len(raw) for raw in raws] == [6, OBJECTS + 2, 8]
    assert identifiers(video_dataset(raws[2])) == lists[2]


@pytest.mark.parametrize(("ranks", "batch_size"), [(1, 1), (1, 4), (3, 2)])
def test_stock_loader_with_several_ranks_covers_everything(folder, ranks, batch_size, monkeypatch):
    raw = SeverstalRawDataset(reader(folder), training=False, max_objects=2)
    dataset = video_dataset(raw, [ModelInput(32)])
    seen = []
    for rank in range(ranks):  # what DistributedSampler asks the process group for
        monkeypatch.setattr("torch.distributed.is_available", lambda: True)
        monkeypatch.setattr("torch.distributed.get_world_size", lambda: ranks)
        monkeypatch.setattr("torch.distributed.get_rank", lambda rank=rank: rank)
        loader = TorchTrainMixedDataset([dataset], [batch_size], 0, False, False, False, batch_of).get_loader(0)
        for batch in loader:
            seen += [tuple(row[:2]) for row in batch.metadata.unique_objects_identifier[0].tolist()]
    assert len(set(seen)) == OBJECTS + 2 and set(seen) == set(identifiers(dataset))


def test_evaluation_crops_show_each_object(folder):
    raw = SeverstalRawDataset(reader(folder), training=False, max_objects=3, group_width=60)
    dataset = video_dataset(raw, [FixedStripCrop(60)])
    found = identifiers(dataset)
    assert len(found) == len(set(found)) == OBJECTS + 2
    for sample in (dataset[item] for item in range(len(dataset))):
        assert sample.size == (HEIGHT, 60)
        assert all(obj.segment.any() or obj.object_id == 0 for obj in sample.frames[0].objects)
    ungrouped = video_dataset(SeverstalRawDataset(reader(folder), training=False), [FixedStripCrop(60)])
    with pytest.raises(UserError, match="group_width: 60"):
        ungrouped[0]


def test_sixteen_bit_images_pass_through_stock(tmp_path):
    (tmp_path / "images").mkdir()
    values = np.random.default_rng(0).integers(0, 4096, (HEIGHT, WIDTH)).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "images/x.png")
    (tmp_path / "train.csv").write_text("ImageId,ClassId,EncodedPixels\nx.png,1,1 5\n")
    raw = SeverstalRawDataset(reader(tmp_path), bits=12)
    np.testing.assert_array_equal(np.asarray(video_dataset(raw)[0].frames[0].data)[..., 0], values >> 4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"objects": "blobs"}, "instances, components, classes, all or null"),
        ({"min_area": 0}, "min_area"),
        ({"min_area": 99999, "include_clean": False}, "has no sample"),
        ({"split": "train"}, "split file"),
        ({"split_file": "gone.csv", "split": "x"}, "gone.csv"),
        ({"clean_share": 1.0}, "clean_share"),
        ({"clean_share": 0.2, "training": False}, "clean_share"),
        ({"clean_part_width": 5}, "clean_part_width"),
        ({"clean_share": 0.2, "include_clean": False}, "include_clean"),
        ({"max_objects": 3}, "max_num_objects"),
        ({"group_width": 3}, "group_width"),
        ({"training": False, "max_objects": 0}, "max_objects"),
        ({"on_invalid": "ignore"}, "on_invalid"),
    ],
)
def test_bad_arguments(folder, arguments, words):
    with pytest.raises(UserError, match=words):
        SeverstalRawDataset(reader(folder), **arguments)


def test_groups():
    boxes = np.array([[50, 0, 60, 9], [0, 0, 10, 9], [12, 0, 30, 9], [0, 0, 100, 9]])
    assert [group.tolist() for group in group_objects(boxes, 2, None)] == [[0, 1], [2, 3]]
    assert [group.tolist() for group in group_objects(boxes, None, 30)] == [[1], [3], [2], [0]]
    assert [group.tolist() for group in group_objects(boxes[:3], None, 30)] == [[1, 2], [0]]
    assert [group.tolist() for group in group_objects(boxes[:3], 1, 30)] == [[1], [2], [0]]


def test_pickles_are_small_and_whole(folder):
    raw = SeverstalRawDataset(reader(folder), training=False)
    text = pickle.dumps(video_dataset(raw))
    assert len(text) < 20_000
    assert identifiers(pickle.loads(text)) == identifiers(video_dataset(raw))


def test_real_strips(real_data):
    raw = SeverstalRawDataset(
        KaggleReader(real_data / "severstal/train_images", real_data / "severstal/train.csv"),
        training=False,
        max_objects=4,
        group_width=512,
    )
    dataset = video_dataset(raw, [FixedStripCrop(512), ModelInput(256)])
    found = identifiers(dataset)
    assert len(found) == len(set(found)) == 19 + 3
