"""Our collate function against SAM 2's own: the same batch, in a worker process too."""

from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from training.utils.data_utils import collate_fn as stock_collate_fn

from helpers.data_sets import HEIGHT, WIDTH, datapoint, reader, video_dataset, write_kaggle
from sam2_lora_ext.data.collate import collate_fn
from sam2_lora_ext.data.dataset import SeverstalRawDataset
from sam2_lora_ext.data.pixels import ModelInput


def samples(videos, frames, normalise):
    rng = np.random.default_rng(0)
    made = []
    for number in range(videos):
        masks = {k * 1_000_000 + number: rng.random((HEIGHT, WIDTH)) < 0.3 for k in range(1, 2 + number)}
        sample = ModelInput(32, normalise=normalise)(datapoint(masks, frames=frames))
        sample.video_id = 40 + number
        made.append(sample)
    return made


def assert_same(ours, stock):
    for one, other in (
        (ours.img_batch, stock.img_batch),
        (ours.obj_to_frame_idx, stock.obj_to_frame_idx),
        (ours.masks, stock.masks),
        (ours.metadata.unique_objects_identifier, stock.metadata.unique_objects_identifier),
        (ours.metadata.frame_orig_size, stock.metadata.frame_orig_size),
    ):
        assert one.dtype == other.dtype and one.stride() == other.stride() and torch.equal(one, other)
    assert ours.dict_key == stock.dict_key and ours.batch_size == stock.batch_size


@pytest.mark.parametrize(("videos", "frames"), [(1, 1), (3, 1), (1, 4), (2, 3)])
def test_the_batch_is_stocks(videos, frames):
    ready, raw = (samples(videos, frames, normalise) for normalise in (True, False))
    stock = stock_collate_fn(ready, "severstal")
    assert raw[0].frames[0].data.dtype == torch.uint8
    assert_same(collate_fn(raw, "severstal"), stock)
    assert_same(collate_fn(ready, "severstal"), stock)  # images that are normalised already


def test_another_mean():
    sample = samples(1, 1, False)
    pixels = sample[0].frames[0].data.permute(2, 0, 1)
    images = collate_fn(sample, "severstal", mean=[0.5, 0.0, 0.0], std=[0.25, 1.0, 1.0]).img_batch[0, 0]
    torch.testing.assert_close(images[0], (pixels[0] / 255 - 0.5) / 0.25)
    torch.testing.assert_close(images[1:], pixels[1:] / 255)


def test_in_a_worker_the_images_are_shared_from_the_start(tmp_path):
    raw = SeverstalRawDataset(reader(write_kaggle(tmp_path / "k")), training=False)
    options = {"batch_size": 2, "num_workers": 1, "multiprocessing_context": "spawn"}
    ours, stock = (
        DataLoader(
            video_dataset(raw, [ModelInput(32, normalise=normalise)]),
            collate_fn=partial(function, dict_key="severstal"),
            **options,
        )
        for function, normalise in ((collate_fn, False), (stock_collate_fn, True))
    )
    count = 0
    for one, other in zip(ours, stock, strict=True):
        assert_same(one, other)
        assert one.img_batch.is_shared()
        count += 1
    assert count == 3
