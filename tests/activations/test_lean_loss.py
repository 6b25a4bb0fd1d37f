"""The lean loss compared with the plain one, which is bitwise stock's, and with finite differences."""

import pytest
import torch
from torch.nn import functional as F
from training.trainer import CORE_LOSS_KEY

from benchmarks.measure import Saved
from helpers.loss_batches import NAMES, WEIGHTS, leaves, make_batch
from helpers.small_runs import make_batch as make_model_batch
from helpers.small_runs import make_model
from sam2_lora_ext.activations.mask_sums import mask_sums
from sam2_lora_ext.losses import SeverstalLoss
from sam2_lora_ext.utils.errors import UserError

SETTINGS = [
    {},
    {"pred_obj_scores": True, "supervise_all_iou": True, "iou_use_l1_loss": True},
    {"focal_gamma": 1.5, "focal_alpha": -1.0},
    {"weight_dict": WEIGHTS | {"loss_tversky": 2.0}, "class_weights": {1: 0.5}},
]


def run(implementation, outputs, targets, settings):
    for frame in outputs:
        frame["class_ids"] = torch.arange(targets.shape[1])
    losses = SeverstalLoss(**{"weight_dict": WEIGHTS, "implementation": implementation, **settings})(outputs, targets)
    grads = torch.autograd.grad(losses[CORE_LOSS_KEY], leaves(outputs), allow_unused=True)
    rows = {f"{key} of each": value for frame in outputs for key, value in frame["object_losses"].items()}
    return {**losses, **rows}, grads


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("channels", [1, 3])
def test_values_and_gradients_equal_plain(settings, channels):
    batch = {"frames": 2, "objects": 4, "channels": channels, "size": 40}
    values, grads = run("lean", *make_batch(**batch), settings)
    expected, expected_grads = run("plain", *make_batch(**batch), settings)
    assert list(values) == list(expected)
    for key in expected:
        torch.testing.assert_close(values[key], expected[key])
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert (grad is None) == (expected_grad is None)
        if grad is not None:
            torch.testing.assert_close(grad, expected_grad, atol=1e-8, rtol=1e-5)


def test_double_precision_equals_plain_closely():
    def doubled(implementation):
        outputs, targets = make_batch(size=30)
        with torch.no_grad():
            frame = {key: [v.double().requires_grad_() for v in steps] for key, steps in outputs[0].items()}
        return run(implementation, [frame], targets, SETTINGS[1])

    (values, grads), (expected, expected_grads) = doubled("lean"), doubled("plain")
    for value, expected_value in zip((*values.values(), *grads), (*expected.values(), *expected_grads), strict=True):
        # plain has float32 sums
        torch.testing.assert_close(value.double(), expected_value.double(), rtol=1e-6, atol=1e-15)


@pytest.mark.parametrize("gamma", [0.0, 1.5, 2.0])
@pytest.mark.parametrize("alpha", [-1.0, 0.25])
def test_gradients_by_finite_differences(alpha, gamma):
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    targets = (torch.rand(2, 1, 4, 5) > 0.5).double()
    assert torch.autograd.gradcheck(lambda x: mask_sums(x, targets, alpha, gamma)[:3], logits)


@pytest.mark.parametrize(("inside", "level"), [(1.0, -8.0), (1.0, 4.0), (0.25, -10.0)])
def test_sums_of_many_pixels_in_float32(inside, level):
    """Some are differences of others, so all are added up alike."""
    torch.manual_seed(0)
    logits = level + torch.randn(1, 1, 1024, 1024)
    targets = torch.rand(1, 1, 1024, 1024) <= inside
    got, expected = mask_sums(logits, targets, 0.25, 2.0), mask_sums(logits.double(), targets, 0.25, 2.0)
    torch.testing.assert_close(got.focal.double(), expected.focal, rtol=1e-6, atol=0)
    for one, other in zip(got[1:], expected[1:], strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-6, atol=2**-4)  # a float32's step at a million pixels


def test_closed_forms():
    logits = torch.tensor([[[[0.0, 0.0, 3.0, -200.0]]]], dtype=torch.float64)
    targets = torch.tensor([[[[1.0, 0.0, 0.0, 0.0]]]], dtype=torch.float64)
    sums = mask_sums(logits, targets, 0.25, 2.0)
    p = torch.tensor(3.0, dtype=torch.float64).sigmoid()
    ln2 = torch.tensor(2.0, dtype=torch.float64).log()
    expected = (0.25 * ln2 / 4 + 0.75 * ln2 / 4 + 0.75 * p**2 * -torch.log(1 - p)) / 4
    torch.testing.assert_close(sums.focal, expected.view(1, 1))
    torch.testing.assert_close(sums.overlap, torch.tensor([[0.5]], dtype=torch.float64))
    torch.testing.assert_close(sums.drawn, (1 + p).view(1, 1))
    assert sums.hits == 0 and sums.positives == 1


def test_saturated_logits_are_finite_and_equal_plain():
    def saturated(implementation):
        outputs, targets = make_batch(objects=3, size=8)
        with torch.no_grad():
            for tensor in leaves(outputs):
                tensor.mul_(500)
        return run(implementation, outputs, targets, SETTINGS[3])

    (values, grads), (expected, expected_grads) = saturated("lean"), saturated("plain")
    for value, expected_value in zip((*values.values(), *grads), (*expected.values(), *expected_grads), strict=True):
        if value is not None:
            assert value.isfinite().all()
            torch.testing.assert_close(value, expected_value, rtol=1e-4, atol=1e-6)  # 1 - p loses digits in plain


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_logits_are_computed_in_single(autocast):
    outputs, targets = make_batch(size=40)
    half = [{key: [v.detach().bfloat16().requires_grad_() for v in steps] for key, steps in outputs[0].items()}]
    exact = [{key: [v.detach().float().requires_grad_() for v in steps] for key, steps in half[0].items()}]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        values, grads = run("lean", half, targets, {})
    expected, expected_grads = run("plain", exact, targets, {})
    torch.testing.assert_close(values["loss_mask"].float(), expected["loss_mask"])
    assert grads[0].dtype == torch.bfloat16
    torch.testing.assert_close(grads[0].float(), expected_grads[0], rtol=0.01, atol=1e-7)  # rounded to 8 bits


def test_nothing_is_kept_but_logits_and_targets():
    outputs, targets = make_batch(objects=2, steps=3, channels=3, size=64)
    with Saved(()) as saved:
        SeverstalLoss(WEIGHTS, implementation="lean", pred_obj_scores=True)(outputs, targets)
    logits = sum(tensor.nbytes for tensor in outputs[0][f"multistep_{NAMES[0]}"]) // 3  # the chosen channel's
    small = 3 * 1500  # scores and sums
    assert logits + 2 * 64 * 64 <= saved.total <= logits + 2 * 64 * 64 + small


def test_a_batch_without_objects():
    outputs = [
        {
            f"multistep_{name}": [torch.zeros(shape, requires_grad=True)]
            for name, shape in zip(NAMES, ((0, 3, 4, 4), (0, 3), (0, 1)), strict=True)
        }
    ]
    values, grads = run("lean", outputs, torch.zeros(1, 0, 4, 4, dtype=torch.bool), {})
    assert values[CORE_LOSS_KEY] == 0 and grads[0].shape == (0, 3, 4, 4)


def test_an_unknown_implementation_is_refused():
    with pytest.raises(UserError, match="plain.*lean.*'fast'"):
        SeverstalLoss(WEIGHTS, implementation="fast")


@pytest.mark.parametrize("settings", SETTINGS)
def test_small_masks_give_what_enlarged_ones_do_and_are_all_that_is_kept(settings):
    outputs, targets = make_batch(frames=1, objects=3, channels=3, size=64)
    torch.manual_seed(0)
    key, small_key = "multistep_pred_multimasks_high_res", "multistep_pred_multimasks"
    small = [torch.randn(3, 3, 16, 16, requires_grad=True) for _ in outputs[0][key]]
    outputs[0][key] = [F.interpolate(x, (64, 64), mode="bilinear", align_corners=False) for x in small]
    outputs[0]["class_ids"] = torch.arange(3)
    results = []
    for implementation, frame in (("plain", outputs[0]), ("lean", outputs[0] | {small_key: small})):
        loss = SeverstalLoss(**{"weight_dict": WEIGHTS, "implementation": implementation, **settings})
        with Saved(targets) as saved:
            values = loss([frame], targets)
        results.append((*values.values(), *torch.autograd.grad(values[CORE_LOSS_KEY], small)))
    for value, expected in zip(*reversed(results), strict=True):
        torch.testing.assert_close(value, expected, atol=1e-7, rtol=1e-5)
    chosen = sum(x.nbytes for x in small) // 3  # of three channels the one that has a gradient
    assert chosen <= saved.total < chosen + 2000  # and scores and sums


@pytest.mark.parametrize("points", [0.0, 1.0])
def test_both_losses_agree_on_the_models_outputs_whatever_the_prompt(points):
    model = make_model(prob_to_use_pt_input_for_train=points, num_init_cond_frames_for_train=1).train()
    batch = make_model_batch([[1_000_000, 2_000_001]], frames=3)
    outputs = model(batch)
    assert model.prompted_by_points == bool(points)
    values = []
    for implementation in ("plain", "lean"):
        loss = SeverstalLoss(weight_dict=dict(WEIGHTS), implementation=implementation, **SETTINGS[1])
        values.append(loss(outputs, batch.masks))
    for key in values[0]:
        torch.testing.assert_close(values[1][key], values[0][key], rtol=1e-5, atol=1e-6)
