"""SegmentationMeter: exact values on small masks, torchmetrics, the stock Trainer's display, real gloo ranks.

Spawned ranks import this file: what they do not need is imported inside the tests, which saves them half a minute.
"""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sam2_lora_ext.data.ids import object_id
from sam2_lora_ext.meters import SegmentationMeter
from sam2_lora_ext.utils.errors import UserError


def frame(areas, truth=4, scores=(1.0,), losses=None):
    """One object on 2x4 pixels, `truth` of them true; each step draws the first `area` pixels."""
    draw = torch.stack([(torch.arange(8) < area).view(2, 4) for area in areas])
    outputs = {
        "multistep_pred_masks_high_res": torch.where(draw, 0.5, 0.0)[None],  # logit 0 is "not drawn"
        "multistep_object_score_logits": [torch.tensor([[s]]) for s in (list(scores) * len(areas))[: len(areas)]],
        "gt_masks": (torch.arange(8) < truth).view(1, 1, 2, 4),
    }
    return outputs | ({"object_losses": {k: torch.tensor([v]) for k, v in losses.items()}} if losses else {})


def feed(meter, frames, ids):
    meter.update(
        find_stages=frames, find_metadatas=SimpleNamespace(unique_objects_identifier=torch.tensor(ids).view(-1, 1, 3))
    )


def test_exact_values_by_click_and_class():
    meter = SegmentationMeter()
    feed(meter, [frame([1, 2, 3, 4, 4, 4, 4, 4])], [0, object_id(1, 0), 0])
    feed(meter, [frame([2, 2, 2, 2, 2, 2, 2, 8])], [0, object_id(3, 0), 0])
    values = meter.compute_synced()
    assert (
        values
        == meter.compute()
        == {
            "iou_1click": 0.375,
            "iou_1click_class_1": 0.25,
            "iou_1click_class_3": 0.5,
            "dice_1click": (0.4 + 2 / 3) / 2,
            "dice_1click_class_1": 0.4,
            "dice_1click_class_3": 2 / 3,
            "iou_2clicks": 0.5,
            "iou_2clicks_class_1": 0.5,
            "iou_2clicks_class_3": 0.5,
            "dice_2clicks": 2 / 3,
            "dice_2clicks_class_1": 2 / 3,
            "dice_2clicks_class_3": 2 / 3,
            "iou_4clicks": 0.75,
            "iou_4clicks_class_1": 1.0,
            "iou_4clicks_class_3": 0.5,
            "dice_4clicks": (1 + 2 / 3) / 2,
            "dice_4clicks_class_1": 1.0,
            "dice_4clicks_class_3": 2 / 3,
            "iou_8clicks": 0.75,
            "iou_8clicks_class_1": 1.0,
            "iou_8clicks_class_3": 0.5,
            "dice_8clicks": (1 + 2 / 3) / 2,
            "dice_8clicks_class_1": 1.0,
            "dice_8clicks_class_3": 2 / 3,
            "defect_accuracy": 1.0,
            "objects": 2.0,
            "clean": 0.0,
        }
    )
    assert set(values) <= set(meter.keys(8))


@pytest.mark.parametrize(
    ("prompt", "steps", "names"),
    [
        ("click", 1, ["1click"]),
        ("click", 3, ["1click", "2clicks", "3clicks"]),
        ("click", 8, ["1click", "2clicks", "4clicks", "8clicks"]),
        ("click", 10, ["1click", "2clicks", "4clicks", "8clicks", "10clicks"]),
        ("box", 1, ["box"]),
        ("box", 2, ["box", "box_1click"]),
        ("box", 8, ["box", "box_1click", "box_2clicks", "box_4clicks", "box_7clicks"]),
    ],
)
def test_the_keys_say_the_prompt(prompt, steps, names):
    meter = SegmentationMeter(classes=[2], prompt=prompt)
    feed(meter, [frame([4] * steps)], [0, object_id(2, 0), 0])
    values = meter.compute()
    assert [key for key in values if key.startswith("iou")] == [f"iou_{n}{c}" for n in names for c in ("", "_class_2")]
    assert all(values[f"{metric}_{name}"] == 1.0 for metric in ("iou", "dice") for name in names)
    assert set(values) <= set(meter.keys(steps))


def test_clean_objects_count_apart():
    meter = SegmentationMeter()
    feed(meter, [frame([4], scores=[-1.0])], [0, object_id(1, 0), 0])  # a defect that the score denies
    feed(meter, [frame([0, 0], truth=0, scores=[-2.0, 3.0])], [1, object_id(0, 0), 0])
    feed(meter, [frame([3, 0], truth=0, scores=[5.0, 0.0])], [2, object_id(0, 0), 0])
    values = meter.compute()
    assert values["iou_1click"] == 1.0 and "iou_1click_class_0" not in values
    assert "iou_2clicks" not in values  # only clean objects have a second step
    assert (values["clean_accuracy"], values["clean_accuracy_last"], values["defect_accuracy"]) == (0.5, 0.5, 0.0)
    assert (values["objects"], values["clean"]) == (1.0, 2.0)
    meter.reset()
    feed(meter, [frame([0], truth=0, scores=[-2.0])], [1, object_id(0, 0), 0])
    assert meter.compute() == {"clean_accuracy": 1.0, "clean_accuracy_last": 1.0, "objects": 0.0, "clean": 1.0}


def test_frames_after_the_first_are_tracked_frames():
    meter = SegmentationMeter(classes=[2])
    defect = object_id(2, 5)
    first, second = frame([1, 4], losses={"core_loss": 1.0}), frame([2], losses={"core_loss": 0.5})
    left = frame([0], truth=0, scores=[-1.0], losses={"core_loss": 0.25})
    corrected = frame([1, 4], losses={"core_loss": 0.25})
    feed(meter, [first, second, left, corrected], [[9, defect, number] for number in (10, 11, 12, 13)])
    values = meter.compute()
    assert (values["iou_1click"], values["iou_2clicks"]) == (0.25, 1.0)
    assert values["iou_tracked"] == values["iou_tracked_class_2"] == (0.5 + 1.0 + 0.25) / 3
    assert values["dice_tracked"] == pytest.approx((2 / 3 + 1.0 + 0.4) / 3, abs=1e-15)
    assert (values["objects"], values["defect_accuracy"]) == (1.0, 1.0)  # first frames only
    assert values["loss"] == 2.0  # the clip's, as stock adds it up
    assert set(values) <= set(meter.keys(2, tracked=True))


def test_padding_duplicates_count_once_and_reset_forgets():
    meter = SegmentationMeter(classes=[1])  # class 7, which is not listed, counts overall only
    for video, class_id, area in ((0, 1, 4), (1, 7, 2), (0, 1, 4), (0, 1, 4)):
        feed(meter, [frame([area])], [video, object_id(class_id, 0), 0])
        meter.compute()  # as the display does in between
    values = meter.compute_synced()
    assert [values[key] for key in ("iou_1click", "iou_1click_class_1", "objects")] == [0.75, 1.0, 2.0]
    assert "iou_1click_class_7" not in values
    meter.reset()
    assert meter.compute() == meter.compute_synced() == {}


def test_a_batch_without_objects():
    meter = SegmentationMeter()
    outputs = {
        "multistep_pred_masks_high_res": torch.zeros(0, 2, 4, 4),
        "gt_masks": torch.zeros(0, 1, 4, 4) > 0,
        "multistep_object_score_logits": [torch.zeros(0, 1)] * 2,
        "object_losses": {"core_loss": torch.zeros(0)},
    }
    nothing = SimpleNamespace(unique_objects_identifier=torch.zeros(1, 0, 3, dtype=torch.int64))
    meter.update(find_stages=[outputs], find_metadatas=nothing)
    assert meter.compute() == {}
    feed(meter, [frame([4], losses={"loss_mask": 1.0, "core_loss": 2.0})], [0, object_id(1, 0), 0])
    assert meter.compute()["loss"] == 2.0


def make_batches(count, seed=0):
    """Batches of 2 objects (clean ones among them), with the losses of the real loss function."""
    from sam2_lora_ext.losses import SeverstalLoss

    rng = torch.Generator().manual_seed(seed)
    loss = SeverstalLoss({"loss_mask": 20, "loss_dice": 1, "loss_iou": 1, "loss_class": 1}, pred_obj_scores=True)
    batches = []
    for video in range(count):
        classes = torch.tensor([video % 5, 1 + video % 3])
        masks = torch.randn(2, 3, 6, 8, generator=rng)
        targets = (torch.rand(2, 6, 8, generator=rng) > 0.5) & (classes > 0)[:, None, None]
        scores = [torch.randn(2, 1, generator=rng) for _ in range(3)]
        outputs = {
            "multistep_pred_masks_high_res": masks,
            "gt_masks": targets[:, None],
            "multistep_pred_multimasks_high_res": [masks[:, s : s + 1] for s in range(3)],
            "multistep_pred_ious": [torch.rand(2, 1, generator=rng) for _ in range(3)],
            "multistep_object_score_logits": scores,
        }
        value = loss([outputs], targets[None])["core_loss"].item()
        ids = torch.tensor([[[video, object_id(c, k), 0] for k, c in enumerate(classes.tolist())]])
        batches.append(([outputs], SimpleNamespace(unique_objects_identifier=ids), value))
    return batches


def fed(meter, batches):
    for outputs, metadata, _ in batches:
        meter.update(find_stages=outputs, find_metadatas=metadata)
    return meter


def test_torchmetrics_and_the_stock_loss_agree():
    from torchmetrics.functional.classification import binary_f1_score, binary_jaccard_index

    batches = make_batches(20)
    values, expected = fed(SegmentationMeter(), batches).compute_synced(), {}
    for (outputs,), metadata, _ in batches:
        for k, (_, object_number, _) in enumerate(metadata.unique_objects_identifier[0].tolist()):
            class_id = object_number // 1_000_000
            for step, name in enumerate(("1click", "2clicks", "3clicks")):
                drawn = (outputs["multistep_pred_masks_high_res"][k, step] > 0).int().flatten()
                truth = outputs["gt_masks"][k].int().flatten()
                for metric, function in (("iou", binary_jaccard_index), ("dice", binary_f1_score)):
                    if class_id:
                        for key in (f"{metric}_{name}", f"{metric}_{name}_class_{class_id}"):
                            expected.setdefault(key, []).append(function(drawn, truth).item())
    assert len(expected) == 30
    for key, each in expected.items():
        assert values[key] == pytest.approx(sum(each) / len(each), abs=1e-6), key  # torchmetrics is in float32
    stock = sum(value for *_, value in batches) / len(batches)
    assert values["loss"] == pytest.approx(stock, rel=1e-6)  # the stock mean is in float32
    parts = values["loss_mask"] * 20 + values["loss_dice"] + values["loss_iou"] + values["loss_class"]
    assert parts == pytest.approx(values["loss"], rel=1e-6)  # float32 rows
    assert set(values) <= set(SegmentationMeter().keys(3))
    quiet = fed(SegmentationMeter(losses=False), batches)
    assert quiet.compute() == {k: v for k, v in values.items() if "loss" not in k}
    assert not [key for key in quiet.keys(3) if "loss" in key]


def test_values_survive_a_checkpoint_and_stock_display(tmp_path, caplog):
    from training.utils.train_utils import ProgressMeter

    meter = SegmentationMeter()
    progress = ProgressMeter(1, [], {"val_severstal/quality": meter})
    progress.display(0)  # before the first batch
    fed(meter, make_batches(4))
    with caplog.at_level("INFO"):
        progress.display(0)
    assert f"val_severstal/quality/iou_1click: {meter.compute()['iou_1click']:.4f}" in caplog.text
    values = meter.compute_synced()
    assert all(type(value) is float for value in values.values())
    torch.save(values, tmp_path / "checkpoint.pt")
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True) == values
    assert json.loads(json.dumps(values, allow_nan=False)) == values


def test_is_better_is_higher():
    better = SegmentationMeter().is_better
    assert better(0.6, 0.5) and not better(0.5, 0.5) and not better(float("nan"), 0.5)


def test_mistakes_are_sentences():
    with pytest.raises(UserError, match="choose 'click' or 'box'"):
        SegmentationMeter(prompt="mask")
    with pytest.raises(UserError, match="clean samples are always reported"):
        SegmentationMeter(classes=[0, 1])
    outputs = frame([4])
    del outputs["gt_masks"]
    meter = SegmentationMeter()
    with pytest.raises(UserError, match="LoRASAM2Train"):
        feed(meter, [outputs], [0, object_id(1, 0), 0])
    feed(meter, [frame([4], losses={"core_loss": 1.0})], [0, object_id(1, 0), 0])
    feed(meter, [frame([4])], [1, object_id(1, 0), 0])
    with pytest.raises(UserError, match="use one loss"):
        meter.compute()


def worker(rank, folder, batches):
    torch.set_num_threads(1)
    for ranks in (3, 2):  # the last of three processes sits the second round out
        if rank >= ranks:
            continue
        dist.init_process_group("gloo", init_method=f"file://{folder}/store{ranks}", rank=rank, world_size=ranks)
        padded = range(rank, 7 + (-7 % ranks), ranks)  # by repetition, as DistributedSampler does
        meter = fed(SegmentationMeter(), [batches[index % 7] for index in padded])
        lonely = fed(SegmentationMeter(), batches[3:4] if rank == ranks - 1 else [])  # the other ranks have no row
        values = (meter.compute_synced(), meter.compute(), lonely.compute_synced())
        torch.save(values, f"{folder}/{ranks}_{rank}.pt")
        dist.destroy_process_group()


def test_one_two_and_three_ranks_agree_to_the_last_digit(tmp_path):
    batches = make_batches(7)
    alone, lonely = fed(SegmentationMeter(), batches), fed(SegmentationMeter(), batches[3:4])
    mp.spawn(worker, (str(tmp_path), batches), nprocs=3)
    for ranks in (2, 3):
        for rank in range(ranks):
            values, local, gathered = torch.load(tmp_path / f"{ranks}_{rank}.pt", weights_only=True)
            assert values == alone.compute_synced() and gathered == lonely.compute()
            assert local["objects"] + local["clean"] == 2 * len(range(rank, 7 + (-7 % ranks), ranks))


def test_training_counts_an_object_each_time_it_comes():
    """Two steps on one object: validation would keep the first, the rows of training are the mean of both."""
    values = {}
    for distinct in (True, False):
        meter = SegmentationMeter(distinct=distinct)
        feed(meter, [frame([4], losses={"core_loss": 1.0})], [0, object_id(1, 0), 0])
        feed(meter, [frame([2], losses={"core_loss": 4.0})], [0, object_id(1, 0), 0])
        values[distinct] = meter.compute()
    assert (values[True]["iou_1click"], values[True]["loss"], values[True]["objects"]) == (1.0, 1.0, 1.0)
    assert (values[False]["iou_1click"], values[False]["loss"], values[False]["objects"]) == (0.75, 2.5, 2.0)
