"""Views of a strip: against the plain evaluation, exact identities of tiles, automatic masks, galleries."""

import copy

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from sam2_lora_ext.data.ids import CLEAN, object_id
from sam2_lora_ext.data.rle import decode_runs
from sam2_lora_ext.evaluate.automatic import AutomaticMasks
from sam2_lora_ext.evaluate.evaluation import run_model
from sam2_lora_ext.evaluate.gallery import choose
from sam2_lora_ext.evaluate.predictor import Sample, evaluate
from sam2_lora_ext.evaluate.protocol import Protocol
from sam2_lora_ext.evaluate.views import Viewer
from sam2_lora_ext.host.configs import config_root
from sam2_lora_ext.utils.errors import UserError

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
        assert [click[2] for click in row.clicks][0] == 1 and len(row.clicks) == 3
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


def test_a_model_replays_its_own_clicks_bit_for_bit(nano):
    protocol = Protocol(clicks=(1, 2), max_clicks=3)
    own = run_model(nano, [sample(), clean(), sample(1)], protocol)
    again = run_model(nano, [sample(), clean(), sample(1)], protocol, replay=own.clicks())
    assert [(row.by_clicks, row.clicks, row.score) for row in own.objects] == [
        (row.by_clicks, row.clicks, row.score) for row in again.objects
    ]


def test_a_model_that_answers_with_nan_is_stopped(nano):
    broken = copy.deepcopy(nano)
    torch.nn.init.constant_(broken.sam_mask_decoder.pred_obj_score_head.layers[-1].bias, float("nan"))
    with pytest.raises(UserError, match="object score of 0.png is nan"):
        run_model(broken, [sample()], Protocol(clicks=(1,), max_clicks=1))


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

    automatic = AutomaticMasks(copy.deepcopy(nano), 3, (0.0, 0.0), tile=100, overlap=20)  # it is sure of nothing
    case = sample()
    masks = automatic.masks(case.image)
    assert len(masks) > 1
    best, count = automatic.best_ious(case.image, case.masks[:2])
    encode = [coco.encode(np.asfortranarray(mask.numpy().astype(np.uint8))) for mask in [*masks, *case.masks[:2, 0]]]
    assert count == len(masks) and best == pytest.approx(
        coco.iou(encode[-2:], encode[:-2], [0] * count).max(1).tolist()
    )
    automatic = AutomaticMasks(copy.deepcopy(nano), 3, (2.0, 0.0))
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
