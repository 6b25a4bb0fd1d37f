"""Metrics of an inspection compared with torchmetrics, and the fitted decision with brute force."""

import numpy as np
import pytest
import torch
from torchmetrics.classification import (
    BinaryAUROC,
    BinaryAveragePrecision,
    BinaryPrecision,
    BinaryRecall,
    MultilabelF1Score,
    MultilabelJaccardIndex,
)

from sam2_lora_ext.adapters.decision import Decision
from sam2_lora_ext.class_prompts.decide import decide
from sam2_lora_ext.class_prompts.stitching import Tiles
from sam2_lora_ext.inspection.areas import Table, best_areas, best_threshold, components_of
from sam2_lora_ext.inspection.evaluation import InspectionTally
from sam2_lora_ext.inspection.fitting import Looked, fit_decision, platt, score_of
from sam2_lora_ext.inspection.matching import true_objects
from sam2_lora_ext.inspection.pixel_ap import PixelRanks
from sam2_lora_ext.inspection.segmenter import Inspection

NAMES = ("scratch", "scale", "patch")


def make_strips(count: int = 24, classes: int = 3, noise: float = 1.0, shift: float = 0.0, seed: int = 0):
    """Strips of one tile of 16 x 24: a rectangle of one class with noisy logits and scores; a third are clean."""
    generator = torch.Generator().manual_seed(seed)
    strips = []
    for number in range(count):
        truth = torch.zeros(classes, 16, 24, dtype=torch.bool)
        if number % 3:
            place = number // 3 % classes
            y, x = torch.randint(0, 8, (2,), generator=generator).tolist()
            truth[place, y : y + 6, x : x + 9] = True
        logits = torch.where(truth, 2.0, -2.0) + noise * torch.randn(truth.shape, generator=generator) + shift
        scores = torch.where(truth.flatten(1).any(1), 1.0, -1.0) + noise * torch.randn(classes, generator=generator)
        strips.append(Looked(f"{number}.png", Tiles(logits[None], scores[None], (0,), 24, (16, 24)), truth))
    return strips


def inspect(strip: Looked, decision: Decision) -> Inspection:
    logits, scores = strip.tiles.logits[0], strip.tiles.scores[0]
    masks = decide(logits, scores, decision)
    return Inspection(masks, scores, logits, ())


def tally_of(strips: list[Looked], decision: Decision) -> InspectionTally:
    tally = InspectionTally(NAMES, decision)
    for strip in strips:
        tally.add(strip.name, inspect(strip, decision), strip.truth, 0.001)
    return tally


def test_the_numbers_are_those_of_torchmetrics() -> None:
    strips, decision = make_strips(), Decision.default(3)
    found = tally_of(strips, decision).summary()
    masks = torch.stack([inspect(strip, decision).masks for strip in strips])
    truth = torch.stack([strip.truth for strip in strips])
    scores = torch.stack([strip.tiles.scores[0] for strip in strips])
    flat = masks.movedim(1, -1).reshape(-1, 3), truth.movedim(1, -1).reshape(-1, 3)
    assert found["macro_dice"]["mean"] == pytest.approx(float(MultilabelF1Score(3)(*(x.int() for x in flat))), rel=1e-6)
    jaccard = MultilabelJaccardIndex(3)(*(x.int() for x in flat))
    assert found["macro_iou"]["mean"] == pytest.approx(float(jaccard), rel=1e-6)
    there, said = truth.flatten(2).any(2), masks.flatten(2).any(2)
    for place, name in enumerate(NAMES):
        row = found["classes"][name]
        recall = BinaryRecall()(said[:, place].int(), there[:, place].int())
        assert row["recall"]["mean"] == pytest.approx(float(recall))
        assert row["precision"]["mean"] == pytest.approx(
            float(BinaryPrecision()(said[:, place].int(), there[:, place].int()))
        )
        logits = scores[:, place]
        wanted = BinaryAUROC()(logits.sigmoid(), there[:, place].int())
        assert row["image_auroc"] == pytest.approx(float(wanted), abs=1e-6)
        sure = torch.stack([s.tiles.logits[0][place].sigmoid() * s.tiles.scores[0][place].sigmoid() for s in strips])
        exact = BinaryAveragePrecision()(sure.flatten(), truth[:, place].flatten().int())
        assert row["pixel_ap"] == pytest.approx(float(exact), abs=1e-4)  # ties within a bin
        assert row["found"] + row["missed"] == row["strips"] == int(there[:, place].sum())
    margins, sick = scores.amax(1), there.any(1)
    wanted = BinaryAUROC()(margins.sigmoid(), sick.int())
    assert found["image_auroc"]["mean"] == pytest.approx(float(wanted), abs=1e-6)
    assert found["false_alarms"]["mean"] == pytest.approx(float(said.any(1)[~sick].float().mean()))
    # Kaggle's, written out anew
    dice = [
        2 * (m & t).sum() / (m.sum() + t.sum()) if (m | t).any() else 1.0
        for pair in zip(masks.numpy(), truth.numpy(), strict=True)
        for m, t in zip(*pair, strict=True)
    ]
    assert found["kaggle_dice"]["mean"] == pytest.approx(np.mean(dice))
    assert found["kaggle_dice"]["low"] < found["kaggle_dice"]["mean"] < found["kaggle_dice"]["high"]
    assert found["kaggle_dice_empty"] == pytest.approx(float((~there).float().mean()))


def test_truth_is_one_and_one_false_pair_costs_one_over_the_pairs() -> None:
    strips, decision = make_strips(noise=0.0), Decision.default(3)
    found = tally_of(strips, decision).summary()
    for key in ("kaggle_dice", "dice_present", "macro_dice", "macro_iou", "recall", "precision", "image_auroc"):
        assert found[key]["mean"] == 1.0, key
    assert found["false_alarms"]["mean"] == found["false_alarms_at_recall_95"]["mean"] == 0.0
    assert all(row["recall_iou_50"]["mean"] == 1.0 for row in found["objects"].values() if row["objects"])
    strips[0].tiles.logits[0, 1, 3, 3], strips[0].tiles.scores[0, 1] = 5.0, 5.0  # on a clean strip
    other = tally_of(strips, decision).summary()
    assert other["kaggle_dice"]["mean"] == pytest.approx(1 - 1 / (3 * len(strips)), abs=1e-12)
    assert other["classes"]["scale"]["false"] == 1


def test_nothing_drawn_scores_the_empty_pairs() -> None:
    strips = make_strips()
    never = Decision.from_dict({**Decision.default(3).as_dict(), "threshold": [99.0] * 3})
    found = tally_of(strips, never).summary()
    assert found["kaggle_dice"]["mean"] == pytest.approx(found["kaggle_dice_empty"])
    assert found["precision"] is None and found["recall"]["mean"] == 0.0


def test_objects_are_matched_with_the_best_of_their_class() -> None:
    truth, masks = np.zeros((2, 20, 40), bool), np.zeros((2, 20, 40), bool)
    truth[0, 0:10, 0:10], truth[0, 0:4, 20:24], truth[1, 15:19, 5:9] = True, True, True
    masks[0, 0:10, 0:5], masks[0, 0:10, 6:9] = True, True  # two parts of the first
    masks[1, 0:4, 20:24] = True  # the second, but of another class
    rows = sorted((row.place, row.area, row.iou) for row in true_objects(masks, truth))
    assert rows == [(0, 16, 0.0), (0, 100, 0.5), (1, 16, 0.0)]


def test_the_threshold_is_that_of_brute_force() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        scores = rng.integers(-3, 4, 12) / 2  # with ties
        empty = rng.random(12) < 0.6
        drawn = np.where(empty, rng.random(12) < 0.3, rng.random(12))
        value, threshold = best_threshold(scores, drawn, empty, 0.0)
        tried = [np.where(scores >= t, drawn, empty).mean() for t in [*np.unique(scores), 99.0]]
        assert value == pytest.approx(max(tried))
        assert np.where(scores >= threshold, drawn, empty).mean() == pytest.approx(value)


def test_small_false_components_make_a_smallest_area() -> None:
    truth = np.zeros((30, 40), bool)
    truth[5:15, 5:15] = True
    table = Table()
    for number in range(10):
        mask = truth.copy() if number % 2 else np.zeros_like(truth)
        mask[25:28, 30 : 33 + number % 2] = True  # 9 or 12 pixels of nothing
        wanted = truth if number % 2 else np.zeros_like(truth)
        areas, overlaps = components_of(mask, wanted)
        assert overlaps.tolist() == ([100, 0] if number % 2 else [0])
        table.add(1.0, int(wanted.sum()), areas, overlaps)
    value, found = best_areas(table)
    assert value == 1.0 and found["threshold"] == 0.0 and 12 < found["min_area"] <= 100


def test_calibration_finds_the_scale_that_made_the_pixels() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, 200_000)
    truth = rng.random(len(logits)) < 1 / (1 + np.exp(-(1.7 * logits - 0.6)))
    assert platt(logits, truth) == pytest.approx((1.7, -0.6), abs=0.03)
    assert platt(logits, np.zeros(len(logits), bool)) == (1.0, 0.0)
    assert platt(logits, logits < 0) == (1.0, 0.0)
    separable = platt(np.array([-1.0, 1.0]), np.array([False, True]))
    assert 1 < separable[0] < 20


def test_fitting_never_loses_and_finds_a_shift() -> None:
    for shift in (0.0, 1.8, -1.8):
        strips = make_strips(count=30, noise=0.8, shift=shift, seed=1)
        fit = fit_decision(strips, NAMES)
        assert fit.decision.fitted and fit.after >= fit.before
        assert fit.after == pytest.approx(score_of(strips, fit.decision))
        fresh = make_strips(count=30, noise=0.8, shift=shift, seed=2)
        if shift:
            assert score_of(fresh, fit.decision) > score_of(fresh, Decision.default(3)) + 0.05


def test_what_validation_cannot_say_is_said() -> None:
    strips = [strip for strip in make_strips() if strip.truth.any() and not strip.truth[2].any()]
    fit = fit_decision(strips, NAMES)
    assert "no validation strip has patch" in fit.notes[0] and "no validation strip is clean" in fit.notes[1]
    for row in ("threshold", "scale", "bias", "min_area"):
        assert getattr(fit.decision, row)[2] == getattr(Decision.default(3), row)[2]


def test_pixels_of_a_class_that_occurs_nowhere_have_no_precision() -> None:
    ranks = PixelRanks()
    ranks.add(np.full((4, 4), 0.5), np.zeros((4, 4), bool))
    assert ranks.average_precision() is None
