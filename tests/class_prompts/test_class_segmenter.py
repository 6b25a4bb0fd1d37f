"""The segmenter compared with stock SAM 2: class by class, tile by tile, from file to masks."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sam2.sam2_image_predictor import SAM2ImagePredictor
from scipy import ndimage

from helpers.class_models import class_model, make_prompts, make_strip, tokens_of, write_merged
from helpers.stock_models import NANO, build
from sam2_lora_ext.adapters.decision import ABSENT, Decision
from sam2_lora_ext.class_prompts.stitching import Tiles, merge_tiles
from sam2_lora_ext.data.tiles import stitch
from sam2_lora_ext.deploy.predictors import fit_predictor
from sam2_lora_ext.deploy.stock import noise_pixels, normalised
from sam2_lora_ext.host.class_encoder import install_class_prompts
from sam2_lora_ext.inspection.network import ClassNetwork
from sam2_lora_ext.inspection.segmenter import Segmenter, load_segmenter
from sam2_lora_ext.lora.class_tokens import ClassTokens, find_tokens
from sam2_lora_ext.utils.errors import UserError

CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # the order of sums depends on the batch size


def test_all_classes_at_once_equal_stock_asked_class_by_class() -> None:
    model = class_model(make_prompts())
    predictor = fit_predictor(SAM2ImagePredictor(model))
    images = [make_strip(128, 128, seed) for seed in (0, 1)]
    scores = []
    model.sam_mask_decoder.register_forward_hook(lambda module, args, outputs: scores.append(outputs[3][0, 0]))
    wanted = []
    for image in images:
        predictor.set_image(image)
        for place in range(3):
            coords, labels = find_tokens(model).prompt_of(torch.tensor([place]))
            wanted.append(predictor._predict(coords, labels, multimask_output=False, return_logits=True)[2][0, 0])
    network = ClassNetwork(model)
    pixels = torch.stack([torch.from_numpy(image).permute(2, 0, 1) / 255 for image in images])
    with torch.inference_mode():
        logits, found = network(pixels)
    torch.testing.assert_close(logits.clamp(-32, 32).flatten(0, 1), torch.stack(wanted), **CLOSE)  # stock clamps
    torch.testing.assert_close(found.flatten(), torch.stack(scores), **CLOSE)


def test_a_token_made_of_a_click_is_that_click() -> None:
    model = build(NANO)
    encoder, pixels = model.sam_prompt_encoder, noise_pixels(128)
    with torch.inference_mode():
        click = encoder._embed_points(torch.tensor([[[40.0, 70.0]]]), torch.tensor([[1]]), pad=False)  # 1 1 D
        features = model.forward_image(normalised(pixels))["backbone_fpn"]
        coarse = features[2] + model.no_mem_embed.reshape(1, -1, 1, 1)
        sparse, dense = encoder((torch.tensor([[[40.0, 70.0]]]), torch.tensor([[1]])), None, None)
        wanted = model.sam_mask_decoder(coarse, encoder.get_dense_pe(), sparse, dense, False, False, features[:2])
        install_class_prompts(model, ClassTokens(click.clone(), [7], ["scratch"]))
        logits, scores = ClassNetwork(model)(pixels)
    assert torch.equal(logits, wanted[0]) and torch.equal(scores, wanted[3])


def test_permuted_classes_permute_the_answers() -> None:
    prompts, pixels = make_prompts(), noise_pixels(128)
    order = [2, 0, 1]
    with torch.inference_mode():
        logits, scores = ClassNetwork(class_model(prompts))(pixels)
        other, turned = ClassNetwork(class_model(replace(prompts, tokens=prompts.tokens[order])))(pixels)
    torch.testing.assert_close(other, logits[:, order], **CLOSE)
    torch.testing.assert_close(turned, scores[:, order], **CLOSE)


def test_tiles_that_all_show_a_class_are_stitched_as_before() -> None:
    generator = torch.Generator().manual_seed(0)
    small, starts = torch.randn(3, 2, 8, 8, generator=generator), (0, 20, 36)
    tiles = Tiles(small, torch.full((3, 2), 1.0), starts, 32, (16, 68))
    large = torch.nn.functional.interpolate(small, (16, 32), mode="bilinear", align_corners=False)
    logits, scores = merge_tiles(tiles, Decision.default(2))
    torch.testing.assert_close(logits, stitch(large, starts, 68))
    assert scores.tolist() == [1.0, 1.0]


def test_a_tile_without_the_class_has_no_say() -> None:
    logits = torch.full((2, 1, 4, 4), 5.0)
    logits[1] = -7.0  # ignored, since this tile predicts that the class is absent
    tiles = Tiles(logits, torch.tensor([[2.0], [-1.0]]), (0, 4), 8, (4, 12))
    merged, scores = merge_tiles(tiles, Decision.default(1))
    assert scores.tolist() == [2.0]
    assert (merged[0, :, :8] == 5).all() and (merged[0, :, 8:] == ABSENT).all()


def test_a_strip_of_one_tile_is_the_network_upscaled() -> None:
    prompts = make_prompts(crop=None)
    segmenter, strip = Segmenter(class_model(prompts), prompts), make_strip(100, 90)
    tiles = segmenter.look(strip)
    assert tiles.starts == (0,) and tiles.width == 90
    found = segmenter.judge(tiles)
    there = (tiles.scores[0] >= 0).tolist()
    assert any(there) and found.masks.shape == (3, 100, 90)
    for place, present in enumerate(there):
        if present:
            large = torch.nn.functional.interpolate(tiles.logits[:, place, None], (100, 90), mode="bilinear")[0, 0]
            torch.testing.assert_close(found.logits[place], large)
        else:
            assert not found.masks[place].any()
    assert (found.masks.sum(0) <= 1).all()


def test_the_batch_of_tiles_changes_rounding_only() -> None:
    prompts, strip = make_prompts(), make_strip()
    model = class_model(prompts)
    one, all_ = (Segmenter(model, prompts, batch_size=count).look(strip) for count in (1, 16))
    assert len(one.starts) == 3  # 300 columns, tiles of 128, at least 32 in common
    torch.testing.assert_close(one.logits, all_.logits, **CLOSE)
    torch.testing.assert_close(one.scores, all_.scores, **CLOSE)


def test_objects_are_the_components_of_the_masks() -> None:
    prompts, strip = make_prompts(), make_strip()
    found = Segmenter(class_model(prompts), prompts)(strip)
    assert found.objects
    for place, class_id in enumerate(prompts.class_ids):
        labels, count = ndimage.label(found.masks[place].numpy(), np.ones((3, 3)))
        own = [row for row in found.objects if row.class_id == class_id]
        assert len(own) == count and sum(row.area for row in own) == int(found.masks[place].sum())
        for row in own:
            x0, y0, x1, y1 = row.box
            number = int(labels[:, x0:x1].T.ravel()[row.runs[0, 0] - x0 * strip.shape[0]])
            inside = labels == number
            assert int(inside.sum()) == row.area and inside[y0:y1, x0:x1].sum() == row.area
            mean = found.logits[place][torch.from_numpy(inside)].sigmoid().mean()
            assert row.score == pytest.approx(float(found.scores[place].sigmoid() * mean), rel=1e-5)


def test_a_merged_file_is_the_model_in_memory(tmp_path: Path) -> None:
    prompts, strip = make_prompts(), make_strip()
    path = write_merged(tmp_path / "steel.pt", prompts)
    loaded = load_segmenter(None, path, device="cpu")
    wanted = Segmenter(class_model(prompts), prompts)(strip)
    assert torch.equal(loaded(strip).masks, wanted.masks) and torch.equal(loaded(strip).scores, wanted.scores)
    from sam2.build_sam import build_sam2

    build_sam2(NANO, str(path), device="cpu", hydra_overrides_extra=["++model.image_size=128"])  # stock, strictly


def test_mistakes_are_sentences(tmp_path: Path) -> None:
    from sam2_lora_ext.adapters.weights import write_weights

    write_weights(tmp_path / "plain.pt", build(NANO).state_dict())
    with pytest.raises(UserError, match="has no class prompts"):
        load_segmenter(None, tmp_path / "plain.pt")
    prompts = make_prompts()
    with pytest.raises(UserError, match="trained at 256 pixels"):
        Segmenter(class_model(prompts), replace(prompts, resolution=256))
    with pytest.raises(UserError, match="width 32"):
        load_segmenter(None, write_merged(tmp_path / "other.pt", make_prompts(width=32)))
    with pytest.raises(UserError, match="cannot share"):
        Segmenter(class_model(prompts), prompts, overlap=128)
    model = class_model(prompts)
    segmenter = Segmenter(model, prompts)
    install_class_prompts(model, tokens_of(make_prompts(count=3)))  # as switching live adapters does
    with pytest.raises(UserError, match="other class prompts than this segmenter"):
        segmenter(make_strip(64, 64, 0))
    with pytest.raises(UserError, match="uint8"):
        Segmenter(class_model(prompts), prompts)(np.zeros((4, 4), np.uint8))
