"""The networks without prompts: logits, targets, loss and learning rate compared with independent computations."""

from types import SimpleNamespace

import pytest
import torch
from fvcore.common.param_scheduler import CompositeParamScheduler, CosineParamScheduler, LinearParamScheduler
from torch import nn

from benchmarks.rivals import Channels, factor, labels, softmax_loss
from sam2_lora_ext.class_prompts.steps import new_tokens
from sam2_lora_ext.data.ids import class_prompt_id
from sam2_lora_ext.inspection.demo import KEYS, figures


def test_logits_are_those_of_the_softmax_against_the_rest():
    z = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    logits, scores = Channels(nn.Identity(), 8)(
        z * torch.tensor([0.229, 0.224, 0.225])[:, None, None] + torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    )
    p = torch.cat([torch.zeros(2, 1, 8, 8), z], 1).softmax(1)[:, 1:]
    torch.testing.assert_close(logits, torch.logit(p), rtol=1e-4, atol=1e-4)  # float32 through the normalisation
    torch.testing.assert_close(scores, logits.flatten(2).amax(2))  # a hundredth of 64 pixels is one


def test_labels_name_the_class_of_each_pixel():
    masks = torch.zeros(1, 3, 2, 2, dtype=torch.bool)
    masks[0, 0, 0, 0] = masks[0, 2, 1] = True
    ids = torch.tensor([[(0, class_prompt_id(2), 0), (0, class_prompt_id(5), 0), (1, class_prompt_id(5), 0)]])
    batch = SimpleNamespace(
        masks=masks,
        img_batch=torch.zeros(1, 2, 3, 2, 2),
        obj_to_frame_idx=torch.tensor([[(0, 0), (0, 0), (0, 1)]]),
        metadata=SimpleNamespace(unique_objects_identifier=ids),
    )
    assert labels(batch, [2, 5]).tolist() == [[[1, 0], [0, 0]], [[0, 0], [2, 2]]]


def test_the_loss_of_a_sure_and_right_answer_is_nothing_and_absent_classes_add_none():
    target = torch.tensor([[[0, 1], [1, 0]]])
    right = torch.where(target[:, None] == torch.tensor([1, 2])[:, None, None], 40.0, -40.0)
    assert float(softmax_loss(right, target)) == pytest.approx(0, abs=1e-6)
    assert float(softmax_loss(-right, target)) > 40


def test_the_learning_rate_is_that_of_the_class_prompts():
    host = CompositeParamScheduler(
        [LinearParamScheduler(0.01, 1.0), CosineParamScheduler(1.0, 0.01)], [0.05, 0.95], ["rescaled", "rescaled"]
    )
    for step in range(100):
        assert factor(step / 100) == pytest.approx(host(step / 100), abs=1e-9)


def test_a_class_named_null_is_none():
    tokens, _ = new_tokens({"classes": {1: "pit", 2: "scratch", 4: None}, "tokens": 2, "init": "normal"}, 8, 0)
    assert tokens.class_ids == (1, 2) and tokens.tokens.shape == (2, 2, 8)


def test_figures_of_the_demo_are_numbers_or_none():
    summary = dict.fromkeys(KEYS, 0.5) | {"recall": {"mean": 0.25, "low": 0, "high": 1}, "false_alarms": None}
    assert figures(summary) == dict.fromkeys(KEYS, 0.5) | {"recall": 0.25, "false_alarms": None}
