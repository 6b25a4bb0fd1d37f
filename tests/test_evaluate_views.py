"""Simulated users and views: against the plain evaluation, exact identities of tiles, and small cases."""

import copy

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from sam2_lora_ext.data.ids import CLEAN, object_id
from sam2_lora_ext.data.rle import decode_runs
from sam2_lora_ext.evaluate.automatic import AutomaticMasks
from sam2_lora_ext.evaluate.clicks import click_rounds, exact_boxes, shifted_boxes, sound_clicks
from sam2_lora_ext.evaluate.gallery import choose
from sam2_lora_ext.evaluate.run import Protocol, run_model
from sam2_lora_ext.evaluate.views import Answer, Viewer
from sam2_lora_ext.evaluation import Sample, evaluate
from sam2_lora_ext.host import config_root

POSITIVE = torch.ones(1, dtype=torch.int32)


@pytest.fixture(scope="module")
def nano() -> torch.nn.Module:
    torch.manual_seed(0)
    return instantiate(OmegaConf.load(config_root() / "configs/sam2_nano.yaml").model).eval()


def sample(seed: int = 0, height: int = 64, width: int = 160) -> Sample:
    masks = torch.zeros(3, 1, height, width, dtype=torch.bool)
    masks[0, 0, 10:40, 8:50] = True
    masks[1, 0, 20:60, 110:150] = True
    image = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Sample(f"{seed}.png", image, [object_id(1, 0), object_id(3, 0), object_id(CLEAN, 0)], masks)


def clean(seed: int = 5) -> Sample:
    case = sample(seed)
    return Sample(case.name, case.image, [object_id(CLEAN, 0)], torch.zeros(1, 1, 64, 160, dtype=torch.bool))


# ---- the whole view ------------------------------------------------------------------------------------------------


def test_agrees_with_the_plain_evaluation(nano):
    """No mask of a random model is perfect, so both make the same clicks."""
    rows = evaluate(nano, [sample(), sample(1)], clicks=3)
    found = run_model(nano, [sample(), sample(1)], Protocol(clicks=(1, 2), max_clicks=3))
    assert [(row.name, row.object_id, row.by_clicks, row.by_box) for row in rows] == [
        (row.image, row.object_id, row.by_clicks, row.areas["box"]) for row in found.objects
    ]
    for row in found.objects:
        assert row.areas["1click"] == row.by_clicks[0] and row.areas["2clicks"] == row.by_clicks[1]
        assert decode_runs(row.runs, 64, 160).sum() == row.by_clicks[0][1]


def test_scores_are_the_decoders_and_the_hook_goes_away(nano):
    seen = []
    handle = nano.sam_mask_decoder.register_forward_hook(lambda module, inputs, outputs: seen.append(outputs[3]))
    with Viewer(nano) as viewer, torch.inference_mode():
        answers = viewer.look(sample().image).clicks(
            [(torch.tensor([[20.0, 20.0]]), POSITIVE), (torch.tensor([[120.0, 30.0]]), POSITIVE)], [None, None]
        )
    assert [answer.score for answer in answers] == seen[0][:, 0].tolist()
    handle.remove()
    assert not nano.sam_mask_decoder._forward_hooks


def test_clean_images_are_clicked_on_and_never_count_as_objects(nano):
    found = run_model(nano, [clean(), sample()], Protocol(clicks=(1,), max_clicks=1, clean_clicks=3, shifts=()))
    assert [row.image for row in found.clean] == ["5.png"] * 3 and len(found.objects) == 2
    assert len({row.click for row in found.clean}) > 1 and [row.item for row in found.objects] == [1, 1]


def test_more_objects_than_a_batch_are_all_answered(nano, monkeypatch):
    from sam2_lora_ext.evaluate import views

    whole = run_model(nano, [sample()], Protocol(clicks=(1,), max_clicks=2))
    monkeypatch.setattr(views, "BATCH", 1)
    single = run_model(nano, [sample()], Protocol(clicks=(1,), max_clicks=2))
    for a, b in zip(whole.objects, single.objects, strict=True):
        assert (
            np.abs(np.subtract(a.by_clicks, b.by_clicks)).max() <= 2
        )  # batched sums round otherwise: a pixel at the edge
        assert a.score == pytest.approx(b.score, abs=1e-4)


# ---- simulated users -----------------------------------------------------------------------------------------------


class Oracle:
    """Answers object o with the left part of its truth, wider from click to click, and notes what it was asked."""

    def __init__(self, truth: torch.Tensor, columns: list[list[int]]):
        self.truth, self.columns, self.asked = truth, columns, []

    def clicks(self, clicks, memories):
        answers = []
        for (coords, labels), memory in zip(clicks, memories, strict=True):
            o = (
                memory
                if memory is not None
                else next(o for o in range(len(self.truth)) if self.truth[o, 0, int(coords[0, 1]), int(coords[0, 0])])
            )
            self.asked.append((o, coords.tolist(), labels.tolist()))
            mask = self.truth[o, 0].clone()
            mask[:, self.columns[o][len(labels) - 1] :] = False
            answers.append(Answer(mask, float(len(labels)), o))
        return answers


def test_a_perfect_mask_gets_no_more_clicks_and_others_go_to_the_largest_error():
    truth = torch.zeros(2, 1, 20, 60, dtype=torch.bool)
    truth[0, 0, 5:10, 5:10] = True
    truth[1, 0, 2:18, 20:52] = True
    view = Oracle(truth, [[60, 60, 60], [30, 52, 52]])
    rounds = list(click_rounds(view, truth, 4))
    assert [[bool((masks[o] == truth[o]).all()) for o in range(2)] for masks, _ in rounds] == [[True, False]] + [
        [True, True]
    ] * 3
    assert [(o, len(labels)) for o, _, labels in view.asked] == [(0, 1), (1, 1), (1, 2)]
    coords, labels = view.asked[2][1:]
    assert labels == [1, 1] and coords[0] == view.asked[1][1][0]  # the history goes along
    assert 30 <= coords[1][0] < 52 and 2 <= coords[1][1] < 18  # inside what was missing
    assert rounds[0][1].tolist() == [1.0, 1.0] and rounds[3][1].tolist() == [1.0, 2.0]


def test_boxes_are_exact_and_shifted_ones_move_as_a_whole():
    boxes = exact_boxes(sample().masks[:2])
    assert boxes.tolist() == [[8, 10, 49, 39], [110, 20, 149, 59]]
    moved = shifted_boxes(boxes, 0.1, (64, 160), "a.png", [7, 8])
    step = moved - boxes
    assert step[0].abs().tolist() == pytest.approx([4.2, 3.0, 4.2, 3.0]) and step[0, :2].tolist() == pytest.approx(
        step[0, 2:].tolist()
    )
    assert torch.equal(
        shifted_boxes(boxes.flip(0), 0.1, (64, 160), "a.png", [8, 7]).flip(0), moved
    )  # the order does not matter
    assert not torch.equal(shifted_boxes(boxes, 0.1, (64, 160), "a.png", [7, 8], seed=2), moved) or not torch.equal(
        shifted_boxes(boxes, 0.1, (64, 160), "a.png", [7, 8], seed=3), moved
    )
    for o in range(8):
        cut = shifted_boxes(torch.tensor([[0.0, 0.0, 159.0, 63.0]]), 0.9, (64, 160), "a.png", [o])[0]
        assert 0 <= cut[0] <= cut[2] <= 159 and 0 <= cut[1] <= cut[3] <= 63


def test_sound_clicks_lie_on_exposed_steel():
    image = np.zeros((30, 50, 3), np.uint8)
    image[5:8, 40:44] = 120
    places = sound_clicks(image, 6, "a.png").long()
    assert ((places[:, 0] >= 40) & (places[:, 0] < 44) & (places[:, 1] >= 5) & (places[:, 1] < 8)).all()
    assert torch.equal(sound_clicks(image, 6, "a.png"), places.float())
    assert sound_clicks(np.zeros((30, 50, 3), np.uint8), 2, "b.png").tolist() == [[25, 15]] * 2


# ---- tiles ---------------------------------------------------------------------------------------------------------


def test_one_tile_is_the_whole_strip_bit_for_bit(nano):
    case = sample()
    single = Sample(case.name, case.image, case.object_ids[:1], case.masks[:1])
    whole = run_model(nano, [single], Protocol(clicks=(1, 2), max_clicks=3))
    tiled = run_model(nano, [single], Protocol(clicks=(1, 2), max_clicks=3, tile=400, overlap=30))
    assert whole.objects[0].by_clicks == tiled.objects[0].by_clicks
    assert whole.objects[0].areas == tiled.objects[0].areas and whole.objects[0].score == tiled.objects[0].score


def test_only_tiles_with_a_positive_click_answer(nano):
    case = sample()
    with Viewer(nano, tile=64, overlap=16) as viewer, torch.inference_mode():
        view = viewer.look(case.image)
        assert view.starts == [0, 48, 96]
        first = view.clicks([(torch.tensor([[20.0, 20.0]]), POSITIVE)], [None])[0]
        assert sorted(first.memory) == [0] and not first.mask[:, 64:].any()
        # a click in the columns that two tiles share is answered by both; a negative one alone opens no tile
        coords, labels = (
            torch.tensor([[20.0, 20.0], [50.0, 30.0], [130.0, 30.0]]),
            torch.tensor([1, 1, 0], dtype=torch.int32),
        )
        third = view.clicks([(coords, labels)], [first.memory])[0]
        assert sorted(third.memory) == [0, 1] and third.memory[0][0] == 2 and not third.mask[:, 112:].any()
        unchanged = view.clicks([(coords, labels)], [third.memory])[0]
        assert torch.equal(unchanged.mask, third.mask)


def test_a_box_is_answered_by_the_tiles_that_it_reaches(nano):
    case = sample()
    with Viewer(nano, tile=64, overlap=16) as viewer, torch.inference_mode():
        view = viewer.look(case.image)
        alone = view.boxes(torch.tensor([[8.0, 10.0, 40.0, 39.0]]))
        inside = view.prompters[0].corners(torch.tensor([[8.0, 10.0, 40.0, 39.0]]))[0][0, 0] > 0
        assert torch.equal(alone[0, 0, :, :64], inside) and not alone[0, 0, :, 64:].any()
        assert view.boxes(torch.tensor([[8.0, 10.0, 150.0, 39.0], [100.0, 10.0, 150.0, 39.0]])).shape == (2, 1, 64, 160)


# ---- automatic masks and pictures ----------------------------------------------------------------------------------


def test_automatic_masks_agree_with_pycocotools(nano):
    import pycocotools.mask as coco

    automatic = AutomaticMasks(copy.deepcopy(nano), 3, tile=100, overlap=20)
    automatic.generator.pred_iou_thresh = automatic.generator.stability_score_thresh = (
        0.0  # a random model is sure of nothing
    )
    case = sample()
    masks = automatic.masks(case.image)
    assert len(masks) > 1
    best, count = automatic.best_ious(case.image, case.masks[:2])
    encode = [coco.encode(np.asfortranarray(mask.numpy().astype(np.uint8))) for mask in [*masks, *case.masks[:2, 0]]]
    assert count == len(masks) and best == pytest.approx(
        coco.iou(encode[-2:], encode[:-2], [0] * count).max(1).tolist()
    )
    automatic.generator.pred_iou_thresh = 2.0
    assert automatic.best_ious(case.image, case.masks[:2]) == ([0.0, 0.0], 0)


def test_the_gallery_shows_each_object_once(nano):
    cases = [sample(seed) for seed in range(4)] + [clean(5), clean(6)]
    found = run_model(nano, cases, Protocol(clicks=(1,), max_clicks=1, shifts=()))
    chosen = choose(found, count=2)
    shown = [(row.image, row.object_id) for kind in ("best", "median", "worst") for row in chosen[kind]]
    assert len(shown) == len(set(shown)) == 6
    quality = [
        [
            row.by_clicks[0][0] / max(1, row.by_clicks[0][1] + row.by_clicks[0][2] - row.by_clicks[0][0])
            for row in chosen[kind]
        ]
        for kind in ("best", "median", "worst")
    ]
    assert min(quality[0]) >= max(quality[1]) and min(quality[1]) >= max(quality[2])
    assert all(row.score > 0 for row in chosen["false alarms"])
