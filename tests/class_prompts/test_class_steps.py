"""Class steps in `LoRASAM2Train`: prompts, single masks, corrections, gradients, equality with stock's heads."""

import numpy as np
import pytest
import torch
from torch import nn
from training.trainer import CORE_LOSS_KEY

from helpers.class_batches import CLASSES, LOSS, STOCKS, class_batch, class_model, loss_of
from helpers.small_runs import make_batch, make_model
from sam2_lora_ext.class_prompts.steps import new_tokens, steel_without_objects
from sam2_lora_ext.lora.class_tokens import find_tokens
from sam2_lora_ext.losses import SeverstalLoss
from sam2_lora_ext.utils.errors import UserError

PRESENT = [[1, 255], [2]]
SCORES = "multistep_object_score_logits"


def run(model: nn.Module, batch: object, train: bool = True, seed: int = 5) -> dict:
    """The outputs for a batch's frame, with given seeds."""
    model.train(train)
    torch.manual_seed(seed)
    model.rng = np.random.default_rng(seed)
    return model(batch)[0]


def low_scores(model: nn.Module, by: float = -50.0) -> None:
    """Moves all object scores far below (or above) 0."""
    with torch.no_grad():
        model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.fill_(by)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("tokens", [1, 4])
def test_one_prediction_of_a_single_mask(train, tokens):
    """Even one token gives a single mask, where stock would predict three; no click is drawn, no memory encoded."""
    outputs = run(class_model(tokens), class_batch(PRESENT), train)
    labels = outputs["point_inputs"]["point_labels"]
    assert labels.tolist() == [[16 + c * tokens + k for k in range(tokens)] for _ in range(2) for c in range(3)]
    assert outputs["class_prompt"] and outputs["class_ids"].tolist() == [*CLASSES] * 2
    assert [masks.shape[:2] for masks in outputs["multistep_pred_multimasks"]] == [(6, 1)]
    assert outputs["multistep_pred_masks_high_res"].shape == (6, 1, 128, 128)
    assert outputs["maskmem_features"] is None


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("prompt_seed", [None, 3])
def test_corrections_of_classes_that_are_absent(train, prompt_seed):
    """They are negative clicks in the predicted mask, or on sound steel without any object if it is empty."""
    model = class_model(prompt_seed=prompt_seed, prob_to_sample_from_gt_for_train=0.0)
    batch = class_batch(PRESENT, corrected=True)
    outputs = run(model, batch, train)
    points = outputs["multistep_point_inputs"][-1]
    coords, labels = points["point_coords"][:, 4:].long(), points["point_labels"][:, 4:]
    assert labels.shape == (6, 2) and len(outputs[SCORES]) == 3
    assert all(masks.shape[1] == 1 for masks in outputs["multistep_pred_multimasks"])
    steel = steel_without_objects(
        batch.img_batch[0].mean(1)[[0] * 3 + [1] * 3] > -1.85, batch.masks[0], torch.tensor([0] * 3 + [1] * 3)
    )
    for number in (1, 3, 5):
        assert labels[number].tolist() == [0, 0]
        for step, (x, y) in enumerate(coords[number].tolist()):
            drawn = outputs["multistep_pred_masks_high_res"][number, step] > 0
            assert drawn[y, x] if drawn.any() else steel[number, y, x]
    for number in (0, 2, 4):  # of a class that is there, by stock's rule
        x, y = coords[number, 0].tolist()
        assert bool(labels[number, 0]) == bool(batch.masks[0, number, y, x])


def test_steel_is_without_any_object_of_the_image():
    masks = torch.zeros(3, 1, 3, dtype=torch.bool)
    masks[0, 0, 0] = masks[2, 0, 2] = True
    sound = torch.ones(3, 1, 3, dtype=torch.bool)
    found = steel_without_objects(sound, masks, torch.tensor([0, 0, 1]))
    assert found[:, 0].tolist() == [[False, True, True], [False, True, True], [True, True, False]]


def test_click_steps_are_those_of_a_model_without_class_prompts():
    """They are bitwise equal, and the tokens have a gradient of zero, since DDP waits for it."""
    ours, plain = class_model(), make_model(num_correction_pt_per_frame=2)
    batch = make_batch([[1_000_001], [255_000_000, 0]])
    one, other = run(ours, batch), run(plain, batch)
    assert not one["class_prompt"]
    for name in ("multistep_pred_masks_high_res", "multistep_pred_masks"):
        assert torch.equal(one[name], other[name])
    assert all(torch.equal(a, b) for a, b in zip(one[SCORES], other[SCORES], strict=True))
    loss_of(batch, one).backward()
    gradient = find_tokens(ours).tokens.grad
    assert gradient is not None and not gradient.any()


def test_an_object_of_class_0_with_pixels_is_no_clean_sample():
    """It is clicked inside its mask; an object without pixels, of any class, gets a positive click on sound steel."""
    model = make_model(num_correction_pt_per_frame=1, prob_to_use_box_input_for_train=0.0)
    batch = make_batch([[1_000_001, 2_000_001]])
    batch.metadata.unique_objects_identifier[0, 0, 1] = 3  # class 0
    batch.masks[0, 1] = False
    points = run(model, batch)["multistep_point_inputs"][0]
    (x, y), labels = points["point_coords"][0, 0].long().tolist(), points["point_labels"]
    assert batch.masks[0, 0, y, x] and labels.tolist() == [[1], [1]]


@pytest.mark.parametrize("checkpoints", ["none", "ours", "stock's"])
@pytest.mark.parametrize("corrected", [False, True])
def test_a_missed_class_has_a_mask_gradient_and_an_absent_one_has_none(checkpoints, corrected):
    """All scores are far below 0; activation checkpointing leaves gradients bitwise equal."""
    keep = {"activations": {"decoder": 0.0}}
    settings = {
        "none": keep,
        "ours": {"activations": {"decoder": 1.0}},
        "stock's": {**keep, "use_act_ckpt_iterative_pt_sampling": True},
    }
    found = []
    for kind in ("none", checkpoints):
        model, batch = class_model(**settings[kind]), class_batch(PRESENT, corrected=corrected)
        low_scores(model)
        outputs = run(model, batch)
        masks = outputs["multistep_pred_multimasks_high_res"]
        for step in masks:
            step.retain_grad()
        assert all(scores.max() < 0 for scores in outputs[SCORES]) and min(step.min() for step in masks) > -1000
        with_masks = {name: weight * (name != "loss_class") for name, weight in LOSS.items()}
        loss = SeverstalLoss(with_masks, **STOCKS)  # plain: it reads the large masks
        loss([outputs], batch.masks)[CORE_LOSS_KEY].backward()
        for step in masks:
            assert step.grad.flatten(1).any(1).tolist() == [True, False, True, False, True, False]
        found.append({name: value.grad for name, value in model.named_parameters() if value.requires_grad})
    assert found[0]["sam_prompt_encoder.class_tokens.tokens"].any()
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_the_loss_of_a_class_gives_other_tokens_no_gradient():
    model, batch = class_model(activations="stock"), class_batch([[1, 2, 255]])
    outputs = run(model, batch)
    tokens = find_tokens(model).tokens
    for position in range(3):
        mask = outputs["multistep_pred_masks"][position].square().mean() + outputs[SCORES][0][position].sum()
        gradient = torch.autograd.grad(mask, tokens, retain_graph=True)[0]
        assert gradient.flatten(1).any(1).tolist() == [place == position for place in range(3)]


def test_absent_classes_have_no_mask_gradient_unless_asked_for():
    model, batch = class_model(), class_batch([[1]])
    for absent_focal, expected in ((0.0, [True, False, False]), (0.5, [True, True, True])):
        outputs = run(model, batch)
        only_masks = {"loss_class": 0.0}
        loss = loss_of(batch, outputs, weights=only_masks, absent_focal=absent_focal)
        gradient = torch.autograd.grad(loss, find_tokens(model).tokens)[0]
        assert gradient.flatten(1).any(1).tolist() == expected


def test_the_step_is_the_heads_on_the_image_features():
    """As in the image predictor, features are computed once and each class is a prompt of its own."""
    model, batch = class_model(), class_batch([[1, 255]])
    model.activations = model.activations.of("stock")
    outputs = run(model, batch, train=False)
    with torch.no_grad():
        features = model.forward_image(batch.flat_img_batch)["backbone_fpn"]
        tokens = find_tokens(model)
        for position, number in enumerate(CLASSES):
            sparse, dense = model.sam_prompt_encoder(
                tokens.prompt_of(tokens.position_of(torch.tensor([number]))), None, None
            )
            masks, ious, _, scores = model.sam_mask_decoder(
                features[-1] + model.no_mem_embed.view(1, -1, 1, 1),
                model.sam_prompt_encoder.get_dense_pe(),
                sparse,
                dense,
                multimask_output=False,
                repeat_image=False,
                high_res_features=features[:-1],
            )
            one = slice(position, position + 1)
            torch.testing.assert_close(outputs["multistep_pred_masks"][one], masks, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(outputs["multistep_pred_ious"][0][one], ious, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(outputs[SCORES][0][one], scores, rtol=1e-4, atol=1e-4)


def test_faults_are_sentences():
    model = class_model()
    mixed = class_batch(PRESENT)
    mixed.metadata.unique_objects_identifier[0, 0, 1] = 1_000_001
    with pytest.raises(UserError, match="all objects of a step must have the same"):
        model(mixed)
    strange = class_batch([[3]], classes=[1, 3])
    with pytest.raises(UserError, match="no class prompt for class 3"):
        model(strange)
    clip = make_batch([[1_000_001]], frames=2)
    clip.metadata.unique_objects_identifier[..., 1] = class_batch([[1]]).metadata.unique_objects_identifier[0, 0, 1]
    with pytest.raises(UserError, match="a clip has 2 frames"):
        model(clip)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"classes": {}}, "classes must name"),
        ({"tokens": 0}, "at least 1"),
        ({"init": "zeros"}, "init must be one of"),
        ({"token": 3}, "no setting 'token'"),
    ],
)
def test_wrong_settings(changes, words):
    from hydra.errors import InstantiationException

    with pytest.raises(InstantiationException, match=words):
        make_model(class_prompts={"classes": CLASSES, **changes})


def test_a_class_of_the_config_below_can_be_left_out():
    tokens, _ = new_tokens({"classes": {1: "pit", 2: "line", 3: None}}, 8, 0)
    assert tokens.class_ids == (1, 2) and tokens.class_names == ("pit", "line")
    with pytest.raises(UserError, match="each class needs its own name, got"):
        new_tokens({"classes": {1: "pit", 2: "pit"}}, 8, 0)
