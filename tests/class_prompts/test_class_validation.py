"""Validation tiles of class prompts and the meter that puts strips together, against numpy and pycocotools."""

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from PIL import Image
from pycocotools import mask as coco

from helpers.data_sets import HEIGHT, STRIPS, WIDTH, class_masks, reader, video_dataset, write_kaggle
from sam2_lora_ext.class_prompts.agreement import shortcomings
from sam2_lora_ext.class_prompts.meter import ClassPromptMeter
from sam2_lora_ext.class_prompts.pairs import PairRows, TrainingWindow
from sam2_lora_ext.data.class_validation import ClassTiles, ClassValidation
from sam2_lora_ext.data.collate import collate_fn
from sam2_lora_ext.data.dataset import SeverstalRawDataset
from sam2_lora_ext.data.ids import by_class_prompt, class_of
from sam2_lora_ext.data.kaggle import KaggleReader
from sam2_lora_ext.data.pixels import ModelInput
from sam2_lora_ext.meters import SegmentationMeter
from sam2_lora_ext.utils.errors import UserError

CLASSES = [1, 2, 3, 4]
NAMES = list(STRIPS)
PAIRS = len(STRIPS) * len(CLASSES)
EMPTY = 1 - 6 / PAIRS  # a: 1 and 3, b: 4, d: 2 and 3, f: 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_kaggle(tmp_path_factory.mktemp("kaggle") / "k")


def raw_of(folder, **settings):
    return SeverstalRawDataset(reader(folder), training=False, **settings)


def tiles_of(folder, width=64, overlap=16, transforms=(), **settings):
    return ClassTiles(raw_of(folder, **settings), width, overlap, transforms)


def truth_of(image):
    """bool [C H W] by the drawing of the strip."""
    masks = class_masks(STRIPS[NAMES[image]])
    return np.array([masks.get(class_id, np.zeros((HEIGHT, WIDTH), bool)) for class_id in CLASSES])


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
    """The same images with other defects have the same windows."""
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


def outputs_of(logits, scores, truth=None):
    """A model's outputs for objects: logits [O h w], scores [O], truth [O H W]."""
    truth = torch.zeros(len(scores), 1, 1) if truth is None else truth
    return [
        {
            "class_prompt": True,
            "multistep_pred_masks": logits[:, None],
            "gt_masks": truth[:, None].bool(),
            "multistep_object_score_logits": [scores[:, None]],
        }
    ]


def feed(meter, tiles, logits_of, scores_of, places=None, per_batch=3):
    """Updates a meter with logits float [C h w] and scores [C] of each tile, in batches."""
    places = range(len(tiles)) if places is None else places
    for first in range(0, len(places), per_batch):
        chosen = [tiles.tiles[place] for place in places[first : first + per_batch]]
        samples = [tiles[place] for place in places[first : first + per_batch]]
        ids = torch.tensor([[s.video_id, o.object_id, o.frame_index] for s in samples for o in s.frames[0].objects])
        logits = torch.cat([logits_of(*tile) for tile in chosen])
        scores = torch.cat([scores_of(*tile) for tile in chosen])
        truth = torch.stack([o.segment for s in samples for o in s.frames[0].objects])
        order = torch.randperm(len(ids))  # objects in any order
        metadata = SimpleNamespace(unique_objects_identifier=ids[order][None])
        meter.update(outputs_of(logits[order], scores[order], truth[order]), metadata)


def meter_of(tiles, **settings):
    meter = ClassPromptMeter(**settings)
    meter.bind(tiles)
    return meter


def random_outputs(tiles, low=16):
    """(logits, scores) of each tile, the same each time."""

    def logits(image, tile):
        noise = torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(100 * image + tile))
        return F.interpolate(noise[None], (low, low), mode="bilinear")[0]

    def scores(image, tile):
        return torch.randn(4, generator=torch.Generator().manual_seed(7777 + 100 * image + tile)) - 0.5

    return logits, scores


def by_hand(tiles, logits_of, scores_of, exclusive):
    """The Kaggle Dice of each (strip, class) and what is drawn, by loops in numpy and pycocotools' areas."""
    values, drawn = np.zeros((6, 4)), np.zeros((6, 4), bool)
    for image in range(6):
        starts = tiles.starts(image)
        total, weights = np.zeros((4, HEIGHT, WIDTH)), np.zeros(WIDTH)
        highest = np.full(4, -np.inf)
        for tile, start in enumerate(starts):
            low = logits_of(image, tile).numpy()
            large = np.array([np.array(Image.fromarray(m).resize((64, HEIGHT), Image.BILINEAR)) for m in low])
            ramp = np.minimum(np.arange(1, 65), np.arange(64, 0, -1))
            total[:, :, start : start + 64] += large * ramp
            weights[start : start + 64] += ramp
            highest = np.maximum(highest, scores_of(image, tile).numpy())
        strip = total / weights
        strip[highest < 0] = -1024
        masks = strip > 0
        if exclusive:
            masks &= strip.argmax(0) == np.arange(4)[:, None, None]
        for c, (mask, truth) in enumerate(zip(masks, truth_of(image))):
            codes = [coco.encode(np.asfortranarray(part.astype(np.uint8))) for part in (mask, truth, mask & truth)]
            one, two, both = (int(coco.area(code)) for code in codes)
            values[image, c] = 2 * both / (one + two) if one + two else 1
            drawn[image, c] = one > 0
    return values, drawn


@pytest.mark.parametrize("exclusive", [True, False])
def test_stitched_dice_equals_independent_code_on_the_whole_strip(folder, exclusive):
    tiles = tiles_of(folder)
    outputs = random_outputs(tiles)
    meter = meter_of(tiles, exclusive=exclusive)
    feed(meter, tiles, *outputs)
    got = meter.compute_synced()
    values, drawn = by_hand(tiles, *outputs, exclusive)
    truth = np.array([[mask.any() for mask in truth_of(image)] for image in range(6)])
    clean = ~truth.any(1)
    wanted = (
        {
            "kaggle_dice": values.mean(),
            "kaggle_dice_empty": (~truth).mean(),
            "dice_present": values[truth].mean(),
            "false_alarms": drawn[clean].any(1).mean(),
            "recall": drawn[truth].mean(),
            "strips": 6,
            "clean_strips": 2,
        }
        | {f"kaggle_dice_class_{c}": values[:, place].mean() for place, c in enumerate(CLASSES)}
        | {f"dice_present_class_{c}": values[truth[:, place], place].mean() for place, c in enumerate(CLASSES)}
        | {f"recall_class_{c}": drawn[truth[:, place], place].mean() for place, c in enumerate(CLASSES)}
    )
    assert all(type(value) is float for value in got.values()) and got == meter.compute()
    assert set(got) | set(PairRows.keys()) == set(meter.keys(8, tracked=True))
    there = [(image, tile, c) for image, tile in tiles.tiles for c in range(4)]
    objects = {tile: tiles[place].frames[0].objects for place, tile in enumerate(tiles.tiles)}
    cut = {tile: [bool(obj.segment.any()) for obj in found] for tile, found in objects.items()}
    right = [(float(outputs[1](image, tile)[c]) > 0) == cut[image, tile][c] for image, tile, c in there]
    assert got.pop("class_prompts_presence") == np.mean(right)
    assert set(got) == set(wanted)
    # another resampling than torch's: single pixels at the edges of masks may fall on the other side
    assert got == pytest.approx(wanted, abs=2e-3)


def perfect(tiles, grow=None):
    """Outputs whose decision is the truth: large logits inside at the tile's own pixels, scores by presence."""

    def logits(image, tile):
        start = tiles.starts(image)[tile]
        mask = torch.from_numpy(truth_of(image)[:, :, start : start + 64]).float()
        return torch.where(mask > 0, 5.0, -5.0) if grow is None else grow(image, tile, mask)

    def scores(image, tile):
        return torch.from_numpy(np.where(truth_of(image).any((1, 2)), 4.0, -4.0)).float()

    return logits, scores


def test_the_truth_scores_1(folder):
    tiles = tiles_of(folder)
    meter = meter_of(tiles, exclusive=False)
    feed(meter, tiles, *perfect(tiles))
    values = meter.compute_synced()
    assert values["kaggle_dice"] == values["dice_present"] == values["recall"] == 1 and values["false_alarms"] == 0
    assert values["kaggle_dice_empty"] == pytest.approx(EMPTY)


def test_the_truth_of_real_strips_scores_1(real_data):
    """Nine strips of 256 x 1600, three of them clean, in tiles of 512: put together they are the annotation."""
    files = real_data / "severstal"
    raw = SeverstalRawDataset(KaggleReader(files / "train_images", files / "train.csv"), training=False)
    tiles = ClassTiles(raw, 512, 64, ())
    truth = {
        tile: torch.stack([obj.segment for obj in tiles[place].frames[0].objects]).bool()
        for place, tile in enumerate(tiles.tiles)
    }
    meter = meter_of(tiles)
    feed(
        meter,
        tiles,
        lambda *tile: torch.where(truth[tile], 5.0, -5.0),
        lambda *tile: truth[tile].any(2).any(1) * 8.0 - 4,
    )
    values = meter.compute_synced()
    assert len(tiles) == 36 and values["strips"] == 9 and values["clean_strips"] == 3
    assert values["kaggle_dice"] == 1 and values["false_alarms"] == 0
    assert values["kaggle_dice_empty"] == 1 - 9 / 36


def test_an_empty_submission_scores_the_share_of_empty_pairs(folder):
    tiles = tiles_of(folder)
    meter = meter_of(tiles)
    feed(meter, tiles, lambda *tile: torch.full((4, 8, 8), 3.0), lambda *tile: torch.full((4,), -1.0))
    values = meter.compute()
    assert values["kaggle_dice"] == pytest.approx(EMPTY) == values["kaggle_dice_empty"]
    assert values["dice_present"] == values["recall"] == values["false_alarms"] == 0


def test_one_false_pair_costs_exactly_one_over_the_pairs(folder):
    """Class 2 is drawn on the clean strip c.jpg, in one of its tiles."""
    tiles = tiles_of(folder)
    logits, scores = perfect(tiles)
    clean = NAMES.index("c.jpg")

    def false_scores(image, tile):
        return scores(image, tile) + 8 * torch.eye(4)[1] * (image == clean and tile == 2)

    def false_logits(image, tile):
        found = logits(image, tile)
        found[1, 5:9, 30:34] += 10.0 * (image == clean and tile == 2)
        return found

    meter = meter_of(tiles, exclusive=False)
    feed(meter, tiles, false_logits, false_scores)
    values = meter.compute()
    assert values["kaggle_dice"] == pytest.approx(1 - 1 / PAIRS, abs=1e-12)
    assert values["false_alarms"] == 0.5 and values["recall"] == 1


def test_the_score_of_a_class_is_the_largest_over_tiles(folder):
    tiles = tiles_of(folder)
    logits, scores = perfect(tiles)
    meter = meter_of(tiles, exclusive=False)
    feed(meter, tiles, logits, lambda image, tile: scores(image, tile) if tile == 1 else torch.full((4,), -9.0))
    assert meter.compute()["kaggle_dice"] == 1


def test_repeated_tiles_and_other_orders_change_nothing(folder):
    tiles = tiles_of(folder)
    outputs = random_outputs(tiles)
    meter = meter_of(tiles)
    feed(meter, tiles, *outputs)
    again = meter_of(tiles)
    places = list(range(len(tiles)))
    random.Random(1).shuffle(places)
    feed(again, tiles, *outputs, places=places + places[:7], per_batch=5)
    assert again.compute_synced() == meter.compute_synced()
    again.reset()
    assert again.compute_synced() == {}


def test_strips_that_lack_tiles_are_not_forgotten(folder):
    tiles = tiles_of(folder)
    meter = meter_of(tiles)
    feed(meter, tiles, *random_outputs(tiles), places=range(6))
    assert meter.compute()["strips"] == 1
    with pytest.raises(UserError, match="1 strips lack tiles, such as b.jpg"):
        meter.compute_synced()


def test_click_and_class_rows_stay_apart(folder):
    tiles = tiles_of(folder)
    clicks = [{"class_prompt": False, "multistep_pred_masks": torch.zeros(1, 1, 8, 8)}]
    meter = meter_of(tiles)
    meter.update(clicks, None)
    assert meter.compute_synced() == {}
    by_click = SegmentationMeter()
    ids = torch.zeros(1, 4, 3, dtype=torch.int64)
    by_click.update(outputs_of(torch.zeros(4, 8, 8), torch.zeros(4)), SimpleNamespace(unique_objects_identifier=ids))
    assert by_click.compute_synced() == {}


def test_a_meter_that_was_told_nothing_says_so(folder):
    meter = ClassPromptMeter()
    overall = ["kaggle_dice", "kaggle_dice_empty", "dice_present", "false_alarms", "recall", "strips", "clean_strips"]
    assert meter.keys() == overall + PairRows.keys()
    with pytest.raises(UserError, match="does not know the strips"):
        meter.update(outputs_of(torch.zeros(4, 8, 8), torch.zeros(4)), None)


def show_rank(rank, world, folder, store, out):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    tiles = tiles_of(folder)
    meter = meter_of(tiles)
    places = [place for batch in tiles.batches(3, rank, world) for place in batch]
    feed(meter, tiles, *random_outputs(tiles), places=places)
    (out / f"{rank}.json").write_text(json.dumps([meter.compute_synced(), meter.compute()["strips"]]))
    dist.destroy_process_group()


def test_two_ranks_give_exactly_what_one_gives(folder, tmp_path):
    mp.start_processes(show_rank, (2, folder, tmp_path / "store", tmp_path), nprocs=2, start_method="fork")
    both = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    tiles = tiles_of(folder)
    meter = meter_of(tiles)
    feed(meter, tiles, *random_outputs(tiles))
    assert both[0][0] == both[1][0] == meter.compute_synced()
    assert [strips for _, strips in both] == [3, 3]


class Collate:
    """Of float images; a class, so that workers can take it."""

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


def test_rows_of_pairs_in_closed_form():
    """Two pairs are there, one is not; two predictions each; one score is wrong."""
    window = TrainingWindow()
    outputs = [
        {
            "class_prompt": True,
            "gt_masks": torch.tensor([1, 1, 0]).bool()[:, None, None, None],
            "multistep_object_score_logits": [torch.tensor([[2.0], [-1.0], [-3.0]]), torch.full((3, 1), 9.0)],
            "object_losses": {"loss_mask": torch.tensor([2.0, 4.0, 0.0]), "loss_class": torch.tensor([1.0, 2.0, 6.0])},
        }
    ]
    ids = SimpleNamespace(unique_objects_identifier=torch.tensor([[[0, 1, 0], [0, 2, 0], [0, 3, 0]]]))
    window.update(outputs, ids)
    wanted = {"class_prompts_loss_mask": 1.5, "class_prompts_loss_class": 1.5, "class_prompts_presence": 2 / 3}
    assert window.compute() == window.compute_synced() == wanted
    window.update(outputs, ids)
    assert window.compute() == wanted  # training counts each time
    window.reset()
    assert window.compute_synced() == {}
