"""Simulated users of an evaluation: where they click, which boxes they draw, and that they can be replayed."""

import numpy as np
import pytest
import torch

from sam2_lora_ext.evaluate.clicks import click_rounds, exact_boxes, shifted_boxes, sound_clicks
from sam2_lora_ext.evaluate.views import Answer


def rectangles() -> torch.Tensor:
    masks = torch.zeros(2, 1, 64, 160, dtype=torch.bool)
    masks[0, 0, 10:40, 8:50] = True
    masks[1, 0, 20:60, 110:150] = True
    return masks


class Oracle:
    """Predicts the left part of an object's truth, wider from click to click, and records its prompts."""

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
    perfect = [[bool((masks[o] == truth[o]).all()) for o in range(2)] for masks, *_ in rounds]
    assert perfect == [[True, False]] + [[True, True]] * 3
    assert [(o, len(labels)) for o, _, labels in view.asked] == [(0, 1), (1, 1), (1, 2)]
    coords, labels = view.asked[2][1:]
    assert labels == [1, 1] and coords[0] == view.asked[1][1][0]  # the history goes along
    assert 30 <= coords[1][0] < 52 and 2 <= coords[1][1] < 18  # inside what was missing
    assert rounds[0][1].tolist() == [1.0, 1.0] and rounds[3][1].tolist() == [1.0, 2.0]
    assert [len(labels) for _, labels in rounds[3][2]] == [1, 2]


def test_replayed_clicks_are_made_whatever_the_answers():
    truth = torch.zeros(2, 1, 20, 60, dtype=torch.bool)
    truth[0, 0, 5:10, 5:10] = True
    truth[1, 0, 2:18, 20:52] = True
    first = Oracle(truth, [[60, 60, 60], [30, 40, 52]])
    clicks = list(click_rounds(first, truth, 4))[-1][2]
    other = Oracle(truth, [[7, 7, 7], [52, 52, 52]])  # its own errors would call for other clicks
    rounds = list(click_rounds(other, truth, 4, clicks))
    assert other.asked == first.asked and [len(labels) for _, labels in clicks] == [1, 3]
    assert int(rounds[3][0][0].sum()) == 10  # one click was all that the first model needed there


def test_boxes_are_exact_and_shifted_ones_move_as_a_whole():
    boxes = exact_boxes(rectangles())
    assert boxes.tolist() == [[8, 10, 49, 39], [110, 20, 149, 59]]
    moved = shifted_boxes(boxes, 0.1, (64, 160), "a.png", [7, 8])
    step = moved - boxes
    assert step[0].abs().tolist() == pytest.approx([4.2, 3.0, 4.2, 3.0])
    assert step[0, :2].tolist() == pytest.approx(step[0, 2:].tolist())
    turned = shifted_boxes(boxes.flip(0), 0.1, (64, 160), "a.png", [8, 7])
    assert torch.equal(turned.flip(0), moved)  # the order does not matter
    others = [shifted_boxes(boxes, 0.1, (64, 160), "a.png", [7, 8], seed=seed) for seed in range(8)]
    assert len({tuple(other.flatten().tolist()) for other in others}) > 1
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
