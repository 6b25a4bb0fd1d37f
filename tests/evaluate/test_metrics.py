"""Counts, IoU, Dice and means: closed forms, degenerate masks and torchmetrics."""

import itertools
import math

import pytest
import torch
from torchmetrics.functional.classification import binary_f1_score, binary_jaccard_index

from sam2_lora_ext.evaluate.metrics import class_means, dice, exact_mean, iou, mask_counts, score_accuracy


def test_closed_forms():
    prediction = torch.tensor([[True, True], [False, False]])
    target = torch.tensor([[True, False], [True, False]])
    counts = mask_counts(prediction, target)
    assert counts.dtype == torch.int64 and counts.tolist() == [1, 2, 2]
    assert iou(counts).item() == 1 / 3 and dice(counts).item() == 0.5
    assert iou(counts).dtype == dice(counts).dtype == torch.float64


@pytest.mark.parametrize("metric", [iou, dice])
def test_degenerate_masks(metric):
    counts = torch.tensor([[0, 0, 0], [0, 5, 0], [0, 0, 5], [0, 3, 4], [4, 4, 4]])
    assert metric(counts).tolist() == [1.0, 0.0, 0.0, 0.0, 1.0]
    assert metric(torch.zeros(0, 3, dtype=torch.int64)).shape == (0,)


def test_every_pair_of_2x2_masks_agrees_with_sets():
    masks = list(itertools.product([False, True], repeat=4))
    for first, second in itertools.product(masks, masks):
        counts = mask_counts(torch.tensor(first).view(2, 2), torch.tensor(second).view(2, 2))
        a, b = ({i for i in range(4) if mask[i]} for mask in (first, second))
        assert counts.tolist() == [len(a & b), len(a), len(b)]
        assert iou(counts).item() == (len(a & b) / len(a | b) if a | b else 1.0)
        assert dice(counts).item() == (2 * len(a & b) / (len(a) + len(b)) if a | b else 1.0)


def test_torchmetrics_agrees():
    torch.manual_seed(0)
    for share in (0.02, 0.3, 0.9):
        prediction, target = torch.rand(2, 50, 16, 24) < share
        counts = mask_counts(prediction, target)
        for index in range(50):
            both = prediction[index].flatten().int(), target[index].flatten().int()
            assert iou(counts)[index].item() == pytest.approx(binary_jaccard_index(*both).item(), abs=1e-7)  # float32
            assert dice(counts)[index].item() == pytest.approx(binary_f1_score(*both).item(), abs=1e-7)  # float32


def test_one_target_for_several_steps_and_large_areas():
    prediction = torch.ones(2, 3, 4, 5, dtype=torch.bool)
    prediction[:, 1] = False
    assert (
        mask_counts(prediction, torch.ones(2, 1, 4, 5, dtype=torch.bool)).tolist()
        == [[[20, 20, 20], [0, 0, 20], [20, 20, 20]]] * 2
    )
    big = torch.tensor([2**60, 2**60, 2**60])  # the strip of a whole mill: no float32 on the way
    assert iou(big).item() == dice(big).item() == 1.0


def test_means_are_the_same_in_any_order_and_leave_the_absent_out():
    values = torch.tensor([1e16, 1.0, -1e16, 1.0], dtype=torch.float64)
    assert exact_mean(values) == exact_mean(values.flip(0)) == 0.5
    assert exact_mean(torch.zeros(0)) is None and math.isnan(exact_mean(torch.tensor([math.nan])))
    means = class_means(torch.tensor([0.25, 0.75, 1.0]).double(), torch.tensor([1, 1, 4]), [1, 2, 3])
    assert means == {1: 0.5} and type(means[1]) is float


def test_score_accuracy():
    logits = torch.tensor([-1.0, 0.0, 2.0, 3.0, -3.0])
    assert score_accuracy(logits, torch.tensor([0, 0, 0, 1, 2])) == (2 / 3, 0.5)
    assert score_accuracy(logits, torch.ones(5, dtype=torch.int64)) == (None, 0.4)
    assert score_accuracy(logits[:0], torch.ones(0, dtype=torch.int64)) == (None, None)
