"""The meter of class prompts, which stitches strips: compared with numpy and pycocotools, and in closed form."""

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from pycocotools import mask as coco

from helpers.class_strips import CLASSES, NAMES, feed, meter_of, outputs_of, random_outputs, tiles_of, truth_of
from helpers.data_sets import HEIGHT, STRIPS, WIDTH, write_kaggle
from sam2_lora_ext.class_prompts.meter import ClassPromptMeter
from sam2_lora_ext.class_prompts.pairs import PairRows, TrainingWindow
from sam2_lora_ext.data.class_validation import ClassTiles
from sam2_lora_ext.data.dataset import SeverstalRawDataset
from sam2_lora_ext.data.kaggle import KaggleReader
from sam2_lora_ext.meters import SegmentationMeter
from sam2_lora_ext.run.history import History
from sam2_lora_ext.utils.errors import UserError

PAIRS = len(STRIPS) * len(CLASSES)
EMPTY = 1 - 6 / PAIRS  # a: 1 and 3, b: 4, d: 2 and 3, f: 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_kaggle(tmp_path_factory.mktemp("kaggle") / "k")


def by_hand(tiles, logits_of, scores_of, exclusive):
    """The Kaggle Dice and the predicted masks of each (strip, class), from loops in numpy and pycocotools' areas."""
    values, drawn = np.zeros((6, 4)), np.zeros((6, 4), bool)
    for image in range(6):
        starts = tiles.starts(image)
        total, weights = np.zeros((4, HEIGHT, WIDTH)), np.zeros((4, 1, WIDTH))
        highest = np.full(4, -np.inf)
        for tile, start in enumerate(starts):
            low = logits_of(image, tile).numpy()
            large = np.array([np.array(Image.fromarray(m).resize((64, HEIGHT), Image.BILINEAR)) for m in low])
            ramp = np.minimum(np.arange(1, 65), np.arange(64, 0, -1))
            shown = (scores_of(image, tile).numpy() >= 0)[:, None, None]  # other tiles do not contribute to the mask
            total[:, :, start : start + 64] += large * ramp * shown
            weights[..., start : start + 64] += ramp * shown
            highest = np.maximum(highest, scores_of(image, tile).numpy())
        strip = np.where(weights > 0, total / np.maximum(weights, 1), -1024)
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
    # the resampling differs from torch's, so single pixels at mask edges may differ
    assert got == pytest.approx(wanted, abs=2e-3)


def perfect(tiles, grow=None):
    """Outputs whose decision is the truth: logits of 5 inside and -5 outside the mask, scores by presence."""

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
    """Nine strips of 256 x 1600, three of them clean: stitched tiles of 512 columns are the annotation."""
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
    """Class 2 is predicted in one tile of the clean strip c.jpg."""
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


def test_a_tile_that_says_absent_adds_no_mask(folder):
    """The class is present in other tiles, and only their masks count."""
    tiles = tiles_of(folder)
    logits, scores = perfect(tiles)

    def shown(image, tile):  # whether the class has a pixel in the tile
        start = tiles.starts(image)[tile]
        return torch.from_numpy(truth_of(image)[:, :, start : start + 64].any((1, 2)))

    meter = meter_of(tiles, exclusive=False)
    feed(
        meter,
        tiles,
        lambda image, tile: torch.where(shown(image, tile)[:, None, None], logits(image, tile), 5.0),
        lambda image, tile: torch.where(shown(image, tile), scores(image, tile), torch.tensor(-9.0)),
    )
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
    with pytest.raises(UserError, match="was not bound to the validation strips"):
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


def test_rows_of_pairs_in_closed_form():
    """Two present pairs and one absent pair, with two predictions each and one wrong score."""
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


def test_without_a_clean_strip_there_are_no_false_alarms_to_monitor(folder):
    assert "false_alarms" in meter_of(tiles_of(folder)).keys()
    assert "false_alarms" not in meter_of(tiles_of(folder, include_clean=False)).keys()
    with pytest.raises(UserError, match="set trainer.monitor_mode=min"):
        History.of("false_alarms", "max", None)
