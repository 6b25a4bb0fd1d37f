"""Validation tiles of class prompts are fixed and unique, with each strip on one rank and batches of one kind."""

import numpy as np
import pytest
import torch.distributed as dist
from PIL import Image

from helpers.class_strips import CLASSES, NAMES, raw_of, tiles_of, truth_of
from helpers.data_sets import HEIGHT, STRIPS, WIDTH, reader, video_dataset, write_kaggle
from sam2_lora_ext.class_prompts.agreement import shortcomings
from sam2_lora_ext.data.class_validation import ClassTiles, ClassValidation
from sam2_lora_ext.data.collate import collate_fn
from sam2_lora_ext.data.dataset import SeverstalRawDataset
from sam2_lora_ext.data.ids import by_class_prompt, class_of
from sam2_lora_ext.data.pixels import ModelInput
from sam2_lora_ext.utils.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_kaggle(tmp_path_factory.mktemp("kaggle") / "k")


def test_tiles_cover_every_strip_and_are_unique(folder):
    tiles = tiles_of(folder)
    assert len(tiles) == 6 * 4
    seen, covered = set(), {image: np.zeros(WIDTH, int) for image in range(6)}
    for place in range(len(tiles)):
        sample = tiles[place]
        (frame,) = sample.frames
        image, tile = tiles.tiles[place]
        start = tiles.starts(image)[tile]
        covered[image][start : start + 64] += 1
        ids = [(sample.video_id, obj.object_id, obj.frame_index) for obj in frame.objects]
        assert [class_of(number) for _, number, _ in ids] == CLASSES
        assert all(by_class_prompt(number) for _, number, _ in ids) and not seen & set(ids)
        seen |= set(ids)
        pixels = np.asarray(Image.open(folder / "images" / NAMES[image]).convert("RGB"))
        np.testing.assert_array_equal(np.asarray(frame.data), pixels[:, start : start + 64])
        for obj, whole in zip(frame.objects, truth_of(image)):
            np.testing.assert_array_equal(obj.segment.numpy() > 0, whole[:, start : start + 64])
    assert all(columns.min() >= 1 for columns in covered.values())


def test_tiles_do_not_depend_on_the_truth(tmp_path, folder):
    """The same images with other defects have the same tiles."""
    moved = {name: [(1, 90, 0, 100, 10)] for name in STRIPS}
    other = ClassTiles(raw_of(write_kaggle(tmp_path / "k", moved)), 64, 16, ())
    tiles = tiles_of(folder)
    assert other.tiles == tiles.tiles
    for place in (0, 5, 23):
        one, two = tiles[place].frames[0].data, other[place].frames[0].data
        np.testing.assert_array_equal(np.asarray(one), np.asarray(two))


def test_narrow_strips_are_one_tile(folder):
    for width in (None, WIDTH, 10 * WIDTH):
        tiles = tiles_of(folder, width=width)
        assert len(tiles) == 6 and tiles[0].size == (HEIGHT, WIDTH)


def test_which_strips_take_part(tmp_path, folder):
    assert len(tiles_of(folder, include_clean=False)) == 4 * 4
    copy = write_kaggle(tmp_path / "k")
    (copy / "train.csv").write_text((copy / "train.csv").read_text().replace("a.jpg,1,", "a.jpg,1,0 "))
    lost = ClassTiles(SeverstalRawDataset(reader(copy), training=False, on_invalid="skip"), 64, 16, ())
    assert {lost.raw.index.name(image) for image in lost.images} == set(NAMES) - {"a.jpg"}


def test_what_a_validation_cannot_measure_is_said(folder, tmp_path):
    assert shortcomings(tiles_of(folder)) == []
    strips = write_kaggle(tmp_path / "k", {"a.jpg": [(1, 0, 0, 9, 9), (3, 50, 0, 60, 9)]})
    said = shortcomings(ClassTiles(SeverstalRawDataset(reader(strips), training=False), 64, 16, ()))
    assert len(said) == 2 and "no clean strip" in said[0] and "defect_2, defect_4" in said[1]


def test_clips_and_other_mistakes_are_refused(folder):
    with pytest.raises(UserError, match="single frames"):
        tiles_of(folder, windows={"width": 80, "stride": 40, "num_frames": 2})
    with pytest.raises(UserError, match="overlap"):
        tiles_of(folder, overlap=64)
    with pytest.raises(UserError, match="one VOSDataset"):
        ClassValidation([object()], [1], 64, 16, ())


@pytest.mark.parametrize(("size", "ranks"), [(1, 1), (3, 1), (100, 1), (3, 2), (5, 4), (2, 9)])
def test_batches_have_every_tile_and_whole_strips_on_a_rank(folder, size, ranks):
    tiles = tiles_of(folder)
    batches = [tiles.batches(size, rank, ranks) for rank in range(ranks)]
    assert len({len(mine) for mine in batches}) == 1
    assert all(0 < len(batch) <= size for mine in batches for batch in mine)
    of_strip = {}
    for rank, mine in enumerate(batches):
        for place in (place for batch in mine for place in batch):
            of_strip.setdefault(tiles.tiles[place][0], {}).setdefault(rank, set()).add(place)
    for image in range(6):
        assert max(map(len, of_strip[image].values())) == 4  # some rank has all of them


class Collate:
    """Collates float images; a class, so that it can be pickled for workers."""

    __name__ = "collate_fn"

    def __call__(self, batch):
        return collate_fn(batch, "severstal")


@pytest.fixture
def lone_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_the_loader_gives_clicks_and_tiles_in_batches_of_one_kind(folder, lone_rank):
    clicks = video_dataset(raw_of(folder, max_objects=2, group_width=50), transforms=[ModelInput(32)])
    validation = ClassValidation(
        [clicks],
        [2],
        64,
        16,
        [ModelInput(32)],
        tiles_per_batch=5,
        num_workers=0,
        shuffle=False,
        pin_memory=False,
        drop_last=False,
        collate_fn=Collate(),
    )
    loader = validation.get_loader(0)
    batches = list(loader)
    assert len(batches) == len(loader) == 5 + (len(clicks) + 1) // 2
    rows = {True: [], False: []}
    for batch in batches:
        ids = batch.metadata.unique_objects_identifier[0]
        (kind,) = set(by_class_prompt(ids[:, 1]).tolist())
        rows[kind] += map(tuple, ids.tolist())
        assert batch.img_batch.shape[-2:] == (32, 32)
    assert len(rows[True]) == len(set(rows[True])) == 24 * 4
    assert len(rows[False]) == len(set(rows[False])) == 9 + 2
