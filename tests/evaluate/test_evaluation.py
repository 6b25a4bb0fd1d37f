"""Evaluation through the stock predictor: compared with the training model's validation, and exact small cases."""

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from sam2_lora_ext.data.ids import CLEAN, object_id
from sam2_lora_ext.evaluate.bootstrap import bootstrap_interval
from sam2_lora_ext.evaluate.predictor import (
    Row,
    Sample,
    averages,
    evaluate,
    make_predictor,
    max_logit_difference,
    read_sample,
)
from sam2_lora_ext.host.configs import config_root
from sam2_lora_ext.utils.errors import UserError


@pytest.fixture(scope="module")
def nano() -> torch.nn.Module:
    torch.manual_seed(0)
    config = OmegaConf.load(config_root() / "configs/sam2_nano.yaml").model
    model = instantiate(config).eval()
    torch.nn.init.constant_(model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias, 9.0)  # "an object is here"
    return model


def sample(seed: int = 0, side: int = 128) -> Sample:
    rng = np.random.default_rng(seed)
    masks = torch.zeros(3, 1, side, side, dtype=torch.bool)
    masks[0, 0, 20:60, 30:90] = True
    masks[1, 0, 80:110, 10:50] = True
    image = rng.integers(0, 255, (side, side, 3), dtype=np.uint8)
    return Sample("a.png", image, [object_id(1, 0), object_id(3, 0), object_id(CLEAN, 0)], masks)


def test_one_row_per_defect_and_clean_objects_are_left_out(nano):
    rows = evaluate(nano, [sample()], clicks=2)
    assert [row.object_id for row in rows] == [object_id(1, 0), object_id(3, 0)]
    assert [len(row.by_clicks) for row in rows] == [2, 2]
    assert rows[0].by_box[2] == 40 * 60 and rows[1].by_clicks[0][2] == 30 * 40  # target areas in pixels


def test_agrees_with_the_training_models_forward(nano):
    """At the model's own resolution the predictor and SAM2Train see the same image, click and box."""
    from training.utils.data_utils import BatchedVideoDatapoint, BatchedVideoMetaData

    from sam2_lora_ext.model import LoRASAM2Train

    config = OmegaConf.load(config_root() / "configs/sam2_nano.yaml").model
    config._target_ = f"{LoRASAM2Train.__module__}.LoRASAM2Train"
    model = instantiate(config, num_correction_pt_per_frame=1).eval()
    model.load_state_dict(nano.state_dict())
    case = sample()
    predictor = make_predictor(nano)
    image = predictor._transforms(case.image)  # 3 H W
    objects = len(case.object_ids)
    batch = BatchedVideoDatapoint(
        img_batch=image[None, None],
        obj_to_frame_idx=torch.zeros(1, objects, 2, dtype=torch.int),
        masks=case.masks[:, 0][None],
        metadata=BatchedVideoMetaData(
            unique_objects_identifier=torch.tensor([[[0, identifier, 0] for identifier in case.object_ids]]),
            frame_orig_size=torch.full((1, objects, 2), 128),
        ),
        dict_key="x",
        batch_size=[1],
    )
    rows = evaluate(nano, [case], clicks=1)
    for box in (0.0, 1.0):
        model.prob_to_use_box_input_for_eval = box
        with torch.no_grad():
            frame = model(batch)[0]
        # the training model empties a mask whose object score is negative, the stock image predictor does not: not so
        # here
        assert (frame["multistep_object_score_logits"][0] > 0).all()
        areas = (frame["multistep_pred_masks_high_res"][:2, 0] > 0).sum((1, 2)).tolist()
        assert areas == [(row.by_box if box else row.by_clicks[0])[1] for row in rows]


def test_an_image_that_cannot_be_decoded_is_named(tmp_path):
    from PIL import Image

    from sam2_lora_ext.data.dataset import SeverstalRawDataset
    from sam2_lora_ext.data.kaggle import KaggleReader

    file = tmp_path / "images/a.png"
    file.parent.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(file)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)  # header and end are whole, so the data set takes it
    (tmp_path / "train.csv").write_text("ImageId,ClassId,EncodedPixels\na.png,1,41 30\n")
    dataset = SeverstalRawDataset(KaggleReader(file.parent, tmp_path / "train.csv", size=None), training=False)
    with pytest.raises(UserError, match="a.png: the image cannot be decoded"):
        read_sample(dataset, 0, None)


def test_averages_are_means_over_defects():
    rows = [
        Row("a", 1, [[10, 10, 20], [20, 20, 20]], [0, 5, 20]),
        Row("b", 1, [[0, 10, 10], [5, 10, 10]], [10, 10, 10]),
    ]
    result = averages(rows)
    assert result["iou_1click"] == pytest.approx((0.5 + 0.0) / 2)
    assert result["iou_2clicks"] == pytest.approx((1.0 + 5 / 15) / 2)
    assert result["iou_box"] == pytest.approx((0.0 + 1.0) / 2)
    assert result["dice_1click"] == pytest.approx((20 / 30 + 0.0) / 2)


def test_a_model_does_not_differ_from_itself_and_does_from_a_changed_one(nano):
    import copy

    assert max_logit_difference(nano, nano, [sample()]) == 0.0
    other = copy.deepcopy(nano)
    with torch.no_grad():
        other.sam_mask_decoder.output_upscaling[3].weight.mul_(1.01)
    assert max_logit_difference(nano, other, [sample()]) > 0.0


def test_bootstrap_resamples_images_not_objects():
    # two images of 50 equal objects each: resampling objects would give a narrow interval, resampling images spans both
    values, groups = [0.0] * 50 + [1.0] * 50, ["a"] * 50 + ["b"] * 50
    assert bootstrap_interval(values, groups) == (0.0, 1.0)
    assert bootstrap_interval([0.3, 0.7], ["a", "a"]) == pytest.approx((0.5, 0.5))


def test_bootstrap_agrees_with_scipy():
    from scipy.stats import bootstrap

    values = np.random.default_rng(1).random(80)
    low, high = bootstrap_interval(values.tolist(), list(range(80)), draws=4000)
    theirs = bootstrap(
        (values,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=0.01)  # both are Monte-Carlo, 4,000 draws
