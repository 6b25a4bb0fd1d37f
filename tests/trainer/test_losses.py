"""SeverstalLoss against SAM 2's own loss (to the bit), closed forms and finite differences."""

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from training.loss_fns import MultiStepMultiMasksAndIous, dice_loss
from training.trainer import CORE_LOSS_KEY

from helpers.loss_batches import NAMES, WEIGHTS, leaves, make_batch
from sam2_lora_ext.losses import SeverstalLoss
from sam2_lora_ext.tversky import FLOOR, focal_tversky
from sam2_lora_ext.utils.errors import UserError


def one_step(*tensors):
    return [{f"multistep_{name}": [tensor] for name, tensor in zip(NAMES, tensors, strict=True)}]


def run(loss, **shape):
    """Every reported value, and the gradient of core_loss for every output."""
    outputs, targets = make_batch(**shape)
    losses = loss(outputs, targets)
    grads = torch.autograd.grad(losses[CORE_LOSS_KEY], leaves(outputs), allow_unused=True)
    return losses, grads, outputs


@pytest.mark.parametrize(
    ("all_iou", "scores", "channels", "frames", "l1"),
    list(itertools.product((True, False), (True, False), (1, 3), (1, 2), (True, False))),
)
def test_neutral_settings_are_stock_to_the_bit(all_iou, scores, channels, frames, l1):
    settings = {
        "supervise_all_iou": all_iou,
        "iou_use_l1_loss": l1,
        "pred_obj_scores": scores,
        "focal_gamma_obj_score": 1.5,
        "focal_alpha_obj_score": 0.3,
    }
    neutral = {"class_weights": {1: 1.0, 3: 1}, "tversky_alpha": 0.1}
    for steps, objects in itertools.product((1, 3), (1, 3, 7)):
        shape = {"frames": frames, "objects": objects, "steps": steps, "channels": channels}
        expected, expected_grads, _ = run(MultiStepMultiMasksAndIous(dict(WEIGHTS), **settings), **shape)
        losses, grads, outputs = run(SeverstalLoss(WEIGHTS | {"loss_tversky": 0}, **neutral, **settings), **shape)
        assert list(losses) == list(expected)
        for key in expected:
            assert torch.equal(losses[key], expected[key]), key
        for grad, expected_grad in zip(grads, expected_grads, strict=True):
            assert (grad is None) == (expected_grad is None)
            assert grad is None or torch.equal(grad, expected_grad)
        for key in expected:
            mean = sum(frame["object_losses"][key].mean() for frame in outputs)
            torch.testing.assert_close(mean, expected[key].detach())


@pytest.mark.parametrize("scores", [True, False])
def test_many_objects_and_tied_channels_are_stock_to_the_bit(scores):
    def tied(loss):
        outputs, targets = make_batch(objects=70, steps=1, channels=3, size=4)
        with torch.no_grad():
            outputs[0]["multistep_pred_multimasks_high_res"][0][:, 1:] = 0.5
        losses = loss(outputs, targets)
        return losses, torch.autograd.grad(losses[CORE_LOSS_KEY], leaves(outputs), allow_unused=True)

    expected, expected_grads = tied(MultiStepMultiMasksAndIous(dict(WEIGHTS), pred_obj_scores=scores))
    losses, grads = tied(SeverstalLoss(WEIGHTS, pred_obj_scores=scores))
    assert all(torch.equal(losses[key], expected[key]) for key in expected)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(grads, expected_grads, strict=True))


def test_half_precision_logits_and_autocast_are_stock_to_the_bit():
    for dtype, enabled in ((torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, True)):
        values = []
        for loss_type in (MultiStepMultiMasksAndIous, SeverstalLoss):
            loss = loss_type(dict(WEIGHTS), pred_obj_scores=True)
            outputs, targets = make_batch(size=40)
            cast = [{key: [v.to(dtype) for v in steps] for key, steps in frame.items()} for frame in outputs]
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                values.append(loss(cast, targets))
        assert all(torch.equal(values[0][key], values[1][key]) for key in values[0])


def test_settings_are_copied_and_checkpoints_keep_loading():
    given = {"loss_mask": 1, "loss_dice": 1, "loss_iou": 1}
    loss = SeverstalLoss(given, class_weights={3: 0.5})
    assert given == {"loss_mask": 1, "loss_dice": 1, "loss_iou": 1}
    assert loss.weight_dict["loss_class"] == 0.0
    assert loss.state_dict() == {}  # the Trainer loads the loss's state strictly


def test_class_weights_scale_each_objects_loss():
    class_ids = torch.tensor([3, 0, 1, 9])
    weights = torch.tensor([2.0, 0.5, 0.0, 1.0])  # class 9 is not named

    def rows(loss):
        outputs, targets = make_batch(objects=4)
        targets[:, 2], targets[:, 1] = True, False
        outputs[0]["class_ids"] = class_ids
        losses = loss(outputs, targets)
        return losses, outputs[0]["object_losses"], torch.autograd.grad(losses[CORE_LOSS_KEY], leaves(outputs))

    plain, plain_rows, plain_grads = rows(SeverstalLoss(WEIGHTS, pred_obj_scores=True))
    weighted, weighted_rows, grads = rows(SeverstalLoss(WEIGHTS, {0: 0.5, 1: 0.0, 3: 2.0}, pred_obj_scores=True))
    for name in plain_rows:
        torch.testing.assert_close(weighted_rows[name], plain_rows[name] * weights)
        torch.testing.assert_close(weighted[name].detach(), (plain_rows[name] * weights).sum() / 4)
    for grad, plain_grad in zip(grads, plain_grads, strict=True):
        torch.testing.assert_close(grad, plain_grad * weights.view(-1, *[1] * (grad.dim() - 1)))
    assert plain_rows["loss_mask"][1] == 0 and plain_rows["loss_class"][1] > 0  # a clean object has a score only


def test_object_losses_are_detached_floats_by_object():
    loss = SeverstalLoss(WEIGHTS | {"loss_tversky": 2.0}, pred_obj_scores=True, supervise_all_iou=True)
    _, _, outputs = run(loss, frames=2, objects=3)
    for frame in outputs:
        rows = frame["object_losses"]
        assert list(rows) == ["loss_mask", "loss_dice", "loss_iou", "loss_class", "loss_tversky", "core_loss"]
        assert all(row.shape == (3,) and row.dtype == torch.float32 and not row.requires_grad for row in rows.values())
        expected = 20 * rows["loss_mask"] + rows["loss_dice"] + rows["loss_iou"] + rows["loss_class"]
        torch.testing.assert_close(rows["core_loss"], expected + 2 * rows["loss_tversky"])
        assert (rows["loss_tversky"] > 0).tolist() == [True, False, True]  # object 1 is absent


def test_tversky_is_added_on_the_channel_that_stock_selects():
    torch.manual_seed(0)
    target = torch.rand(1, 2, 8, 8) > 0.5
    good = torch.where(target[0], 2.0, -2.0)
    masks = torch.stack([-good, good, torch.zeros_like(good)], dim=1).requires_grad_()  # channel 1 is the best
    outputs = one_step(masks, torch.zeros(2, 3), torch.zeros(2, 1))
    losses = SeverstalLoss(WEIGHTS | {"loss_tversky": 3.0})(outputs, target)
    expected = focal_tversky(good, target[0].float(), 0.7, 0.3, 4 / 3)
    torch.testing.assert_close(losses["loss_tversky"], expected.mean())
    torch.testing.assert_close(outputs[0]["object_losses"]["loss_tversky"], expected)
    grad = torch.autograd.grad(losses["loss_tversky"], masks)[0]
    assert grad[:, 1].abs().sum() > 0 and grad[:, [0, 2]].abs().sum() == 0


def test_tversky_closed_forms():
    certain = 100.0  # sigmoid is exactly 0 or 1
    drawn, truth = torch.tensor([[1, 1], [0, 0]]), torch.tensor([[1, 0], [1, 0]])  # TP, FP, FN = 1
    logits, targets = certain * (2 * drawn - 1).double()[None], truth.double()[None]
    value = focal_tversky(logits, targets, alpha=0.7, beta=0.3, gamma=2.0)
    torch.testing.assert_close(value, torch.tensor([(1 - 2 / (1 + 0.7 + 0.3 + 1)) ** 0.5], dtype=torch.float64))

    empty = torch.zeros(1, 2, 2)
    floor = torch.tensor([FLOOR]) ** 0.75
    assert torch.equal(focal_tversky(empty - certain, empty, 0.7, 0.3, 4 / 3), floor)  # nothing there, nothing drawn
    torch.testing.assert_close(focal_tversky(empty + certain, empty, 0.7, 0.5, 1.0), torch.tensor([2 / 3]))  # FP = 4
    torch.testing.assert_close(focal_tversky(empty - certain, empty + 1, 0.75, 0.5, 1.0), torch.tensor([3 / 4]))


def test_tversky_with_equal_prices_is_the_dice_of_stock():
    torch.manual_seed(0)
    logits, targets = torch.randn(4, 6, 6), (torch.rand(4, 6, 6) > 0.5).float()
    p = logits.sigmoid()
    # alpha = beta = 1/2, gamma = 1: 1 - (TP + 1) / ((P + G) / 2 + 1), stock's with its smoothing doubled
    expected = 1 - (2 * (p * targets).sum((1, 2)) + 2) / ((p + targets).sum((1, 2)) + 2)
    torch.testing.assert_close(focal_tversky(logits, targets, 0.5, 0.5, 1.0), expected)
    stock = dice_loss(logits[:, None], targets[:, None], 1, loss_on_multimask=True)[:, 0]
    torch.testing.assert_close(expected, stock, atol=0.03, rtol=0)  # the smoothing is one pixel of about 36


def test_tversky_gradients():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    targets = (torch.rand(2, 3, 3) > 0.5).double()
    assert torch.autograd.gradcheck(lambda x: focal_tversky(x, targets, 0.7, 0.3, 4 / 3), logits)
    perfect = (200 * targets - 100).float().requires_grad_()
    focal_tversky(perfect, targets.float(), 0.7, 0.3, 4 / 3).sum().backward()
    assert torch.equal(perfect.grad, torch.zeros_like(perfect))  # not NaN


def test_a_batch_without_objects():
    outputs = one_step(torch.zeros(0, 3, 4, 4), torch.zeros(0, 3), torch.zeros(0, 1))
    losses = SeverstalLoss(WEIGHTS, pred_obj_scores=True)(outputs, torch.zeros(1, 0, 4, 4, dtype=torch.bool))
    assert losses[CORE_LOSS_KEY] == 0 and outputs[0]["object_losses"][CORE_LOSS_KEY].shape == (0,)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"weight_dict": WEIGHTS | {"loss_focal": 1}}, "unknown loss term 'loss_focal'.*loss_mask, .*loss_tversky"),
        ({"weight_dict": {"loss_mask": 1, "loss_iou": 1}}, "lacks loss_dice"),
        ({"weight_dict": WEIGHTS, "class_weights": {"scratch": 1}}, "key 'scratch'"),
        ({"weight_dict": WEIGHTS, "class_weights": {-1: 1}}, "key -1"),
        ({"weight_dict": WEIGHTS, "class_weights": {1: -0.5}}, r"class_weights\[1\] is -0.5"),
        ({"weight_dict": WEIGHTS, "class_weights": {1: float("nan")}}, "finite weight"),
        ({"weight_dict": WEIGHTS, "tversky_gamma": 0.0}, "tversky_gamma > 0"),
    ],
)
def test_bad_settings_are_refused(kwargs, message):
    with pytest.raises(UserError, match=message):
        SeverstalLoss(**kwargs)


def test_class_weights_without_classes_are_refused():
    outputs, targets = make_batch()
    with pytest.raises(UserError, match="class_ids.*LoRASAM2Train"):
        SeverstalLoss(WEIGHTS, {1: 2.0})(outputs, targets)


def test_the_focal_term_matches_a_closed_form():
    logits, target = torch.tensor([[[[0.0]]]]), torch.ones(1, 1, 1, 1, dtype=torch.bool)
    outputs = one_step(logits, torch.tensor([[0.25]]), torch.tensor([[0.0]]))
    losses = SeverstalLoss(WEIGHTS, pred_obj_scores=True)(outputs, target[0])
    ln2 = F.softplus(torch.tensor(0.0))
    torch.testing.assert_close(losses["loss_mask"], 0.25 * ln2 * 0.25)  # alpha = 1/4, (1 - p)^2 = 1/4
    torch.testing.assert_close(losses["loss_dice"], torch.tensor(1 - 2 / 2.5))
    torch.testing.assert_close(losses["loss_iou"], torch.tensor(0.0625))  # logit 0 draws nothing: IoU 0
    torch.testing.assert_close(losses["loss_class"], ln2)


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    shape = {"objects": 1 + 2 * rank}  # 1 and 3 objects: stock divides by 2 on both ranks
    expected, expected_grads, _ = run(MultiStepMultiMasksAndIous(dict(WEIGHTS), pred_obj_scores=True), **shape)
    losses, grads, outputs = run(SeverstalLoss(WEIGHTS, pred_obj_scores=True), **shape)
    dist.destroy_process_group()
    assert all(torch.equal(losses[key], expected[key]) for key in expected)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected_grads, strict=True))
    _, _, alone = run(SeverstalLoss(WEIGHTS, pred_obj_scores=True), **shape)
    for key, rows in outputs[0]["object_losses"].items():
        torch.testing.assert_close(rows.sum() / 2, losses[key].detach())
        assert torch.equal(rows, alone[0]["object_losses"][key])  # whatever the ranks


def test_two_ranks_divide_as_stock_does(tmp_path):
    mp.spawn(worker, (str(tmp_path),), nprocs=2)
