"""The decision: closed forms on small maps, and components compared with scipy's."""

import numpy as np
import torch
from scipy import ndimage

from sam2_lora_ext.adapters.decision import Decision
from sam2_lora_ext.class_prompts.decide import decide


def change(classes: int = 2, **rows) -> Decision:
    """The default decision with some rows replaced."""
    return Decision.from_dict({**Decision.default(classes).as_dict(), **rows})


def test_the_largest_of_the_present_takes_the_pixel() -> None:
    logits = torch.tensor([[[3.0, 1.0, -1.0, 2.0]], [[2.0, 2.0, -2.0, 2.0]]])
    both, first = torch.tensor([1.0, 1.0]), torch.tensor([1.0, -1.0])
    assert decide(logits, both, Decision.default(2)).int().tolist() == [[[1, 0, 0, 1]], [[0, 1, 0, 0]]]
    assert decide(logits, first, Decision.default(2)).int().tolist() == [[[1, 1, 0, 1]], [[0, 0, 0, 0]]]
    overlapping = Decision.default(2, exclusive=False)
    assert decide(logits, both, overlapping).int().tolist() == [[[1, 1, 0, 1]], [[1, 1, 0, 1]]]


def test_scale_and_bias_move_the_border() -> None:
    logits = torch.tensor([[[3.0, 1.0]], [[2.0, 2.0]]])
    decision = change(scale=[1.0, 2.0], bias=[0.0, -3.5])  # z of the second class: 0.5, 0.5
    assert decide(logits, torch.ones(2), decision).int().tolist() == [[[1, 1]], [[0, 0]]]


def test_a_score_at_the_threshold_is_present() -> None:
    logits, decision = torch.ones(2, 1, 1), change(threshold=[0.5, 0.5], exclusive=False)
    assert decide(logits, torch.tensor([0.5, 0.49]), decision).flatten().tolist() == [True, False]


def test_components_are_those_of_scipy() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 40, 70, generator=generator)
    decision = change(3, min_area=[0, 6, 1], weak_area=[0, 6, 20], weak_score=[0.0, 0.0, 2.0], exclusive=False)
    found = decide(logits, torch.tensor([1.0, 1.0, 1.0]), decision).numpy()
    for mask, logit, least in zip(found, logits.numpy(), (0, 6, 20), strict=True):  # the third class's score is weak
        labels, count = ndimage.label(logit > 0, np.ones((3, 3)))
        areas = ndimage.sum_labels(np.ones_like(labels), labels, range(count + 1))
        assert np.array_equal(mask, (labels > 0) & (areas[labels] >= least))
    assert decide(logits, torch.full((3,), -1.0), decision).sum() == 0
