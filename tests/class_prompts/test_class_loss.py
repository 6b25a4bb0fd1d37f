"""The loss of class steps in closed form: divisors, absent classes, ranks."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from training.trainer import CORE_LOSS_KEY

from sam2_lora_ext.losses import SeverstalLoss
from sam2_lora_ext.utils.errors import UserError

WEIGHTS = {"loss_mask": 20, "loss_dice": 1, "loss_iou": 1, "loss_class": 1, "loss_tversky": 1}
SETTINGS = {"pred_obj_scores": True, "supervise_all_iou": True, "iou_use_l1_loss": True}
MASK_TERMS = ("loss_mask", "loss_dice", "loss_iou", "loss_tversky")


def pairs(present: list[int], seed: int = 0, class_prompt: bool = True):
    """One prediction of a single mask for each pair, and targets [1 O H W]."""
    rng = torch.Generator().manual_seed(seed)
    count = len(present)
    outputs = {
        "multistep_pred_multimasks_high_res": [torch.randn(count, 1, 12, 12, generator=rng).requires_grad_()],
        "multistep_pred_ious": [torch.rand(count, 1, generator=rng).requires_grad_()],
        "multistep_object_score_logits": [torch.randn(count, 1, generator=rng).requires_grad_()],
        "class_prompt": class_prompt,
        "class_ids": torch.arange(count) % 4 + 1,
    }
    targets = (torch.rand(1, count, 12, 12, generator=rng) > 0.6) & torch.tensor(present).bool()[:, None, None]
    return outputs, targets


def part(outputs: dict, targets: torch.Tensor, chosen: list[int]):
    """The outputs and targets of some pairs."""
    kept = {
        key: [value[0][chosen].detach().requires_grad_()] if isinstance(value, list) else value
        for key, value in outputs.items()
    }
    return {**kept, "class_ids": outputs["class_ids"][chosen]}, targets[:, chosen]


def terms(outputs: dict, targets: torch.Tensor, **settings: object) -> dict[str, float]:
    losses = SeverstalLoss(WEIGHTS, **{**SETTINGS, **settings})([outputs], targets)
    return {key: float(value) for key, value in losses.items()}


@pytest.mark.parametrize("implementation", ["plain", "lean"])
def test_mask_terms_are_means_over_the_present_and_the_score_over_all(implementation):
    outputs, targets = pairs([1, 0, 0, 1, 0, 0])
    kind = {"implementation": implementation, "class_weights": {1: 2.0, 4: 0.5}}
    got = terms(outputs, targets, **kind)
    present = terms(*part({**outputs, "class_prompt": False}, targets, [0, 3]), **kind)  # stock's divisor: these two
    stock = terms({**outputs, "class_prompt": False}, targets, **kind)
    for name in MASK_TERMS:
        assert got[name] == pytest.approx(present[name], rel=1e-5)
        assert stock[name] == pytest.approx(present[name] * 2 / 6, rel=1e-5)
    assert got["loss_class"] == pytest.approx(stock["loss_class"], rel=1e-6)
    rows = outputs["object_losses"]
    for name in MASK_TERMS:
        assert float(rows[name].sum()) / 2 == pytest.approx(got[name], rel=1e-5)
        assert not rows[name][torch.tensor([1, 2, 4, 5])].any()


def test_without_any_class_the_mask_loss_is_0_and_absent_pairs_have_no_gradient():
    outputs, targets = pairs([0, 0, 0])
    loss = SeverstalLoss(WEIGHTS, **SETTINGS)
    losses = loss([outputs], targets)
    assert all(float(losses[name]) == 0 for name in MASK_TERMS) and float(losses["loss_class"]) > 0
    losses[CORE_LOSS_KEY].backward()
    assert not outputs["multistep_pred_multimasks_high_res"][0].grad.any()
    assert not outputs["multistep_pred_ious"][0].grad.any()
    assert outputs["multistep_object_score_logits"][0].grad.all()


@pytest.mark.parametrize("implementation", ["plain", "lean"])
def test_absent_focal_adds_the_mean_focal_term_of_absent_pairs(implementation):
    """The added term is that mean times the share of absent pairs."""
    outputs, targets = pairs([1, 0, 0])
    plain, more = (terms(outputs, targets, implementation=implementation, absent_focal=a) for a in (0.0, 0.1))
    alone = {**SETTINGS, "pred_obj_scores": False, "implementation": implementation}  # stock then treats all as present
    absent = terms(*part({**outputs, "class_prompt": False}, targets, [1, 2]), **alone)
    assert more["loss_mask"] - plain["loss_mask"] == pytest.approx(0.1 * absent["loss_mask"] * 2 / 3, rel=1e-4)
    assert all(more[name] == plain[name] for name in MASK_TERMS[1:])
    with pytest.raises(UserError, match="absent_focal must be"):
        SeverstalLoss(WEIGHTS, absent_focal=-1.0)


def gradient_of_rank(rank: int, address: str, chosen: list[list[int]], present: list[int], result) -> None:
    dist.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=len(chosen))
    outputs, targets = part(*pairs(present), chosen[rank])
    SeverstalLoss(WEIGHTS, **SETTINGS)([outputs], targets)[CORE_LOSS_KEY].backward()
    with torch.no_grad():  # in validation, ranks may have batches of different kinds, so they must not communicate
        SeverstalLoss(WEIGHTS, **SETTINGS)._forward({**outputs, "class_prompt": rank == 0}, targets[0], 3.0)
    result[rank] = outputs["multistep_pred_multimasks_high_res"][0].grad / len(chosen)  # DDP's mean
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("present", [[1, 0, 0, 0, 0, 0], [1, 0, 1, 0, 1, 0]])
def test_two_ranks_are_one_with_both_batches(present, tmp_path):
    """With a class present on only one rank, the gradient is the same as on one rank with all pairs."""
    outputs, targets = pairs(present)
    SeverstalLoss(WEIGHTS, **SETTINGS)([outputs], targets)[CORE_LOSS_KEY].backward()
    expected = outputs["multistep_pred_multimasks_high_res"][0].grad
    with mp.Manager() as manager:
        result = manager.dict()
        mp.spawn(gradient_of_rank, (str(tmp_path / "meet"), [[0, 1, 2], [3, 4, 5]], present, result), nprocs=2)
        found = torch.cat([result[0], result[1]])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)
