"""The page's responses: masks equal the stock predictor's, a click costs one decode, errors are sentences."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sam2.build_sam import build_sam2
from sam2.sam2_image_predictor import SAM2ImagePredictor

from helpers.serve_pages import BASE, Page, make_adapters, mask_of
from helpers.stock_models import NANO
from sam2_lora_ext.adapters.peft import attach_adapter, load_adapter
from sam2_lora_ext.deploy.predictors import fit_predictor
from sam2_lora_ext.serve.engine import Prompts

CLICKS = [[300.0, 100.0, 1], [900.5, 40.0, 0], [350.0, 200.0, 1]]
BOX = [250.0, 20.0, 600.0, 220.0]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    return make_adapters(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def folder(strips) -> Path:
    return strips / "train_images"


@pytest.fixture
def page(tmp_path, folder, adapters) -> Page:
    return Page(tmp_path, folder, adapters)


def stock(adapter: Path | None, pixels: np.ndarray) -> SAM2ImagePredictor:
    """SAM 2's own predictor with a model built only for this adapter."""
    model = build_sam2(NANO, str(BASE), device="cpu")
    if adapter is not None:
        attach_adapter(model, load_adapter(adapter)).requires_grad_().eval()
    predictor = fit_predictor(SAM2ImagePredictor(model))
    with torch.inference_mode():
        predictor.set_image(pixels)
    return predictor


@torch.inference_mode()
def expected(predictor: SAM2ImagePredictor, clicks: list, box: list | None = None) -> np.ndarray:
    """The mask after all clicks, one at a time, each with the logits of the previous one."""
    low = None
    for count in range(0 if box else 1, len(clicks) + 1):
        points = np.array(clicks[:count], dtype=np.float32).reshape(-1, 3)
        masks, scores, lows = predictor.predict(
            point_coords=points[:, :2] if count else None,
            point_labels=points[:, 2].astype(int) if count else None,
            box=None if box is None else np.array(box),
            mask_input=low,
            multimask_output=count == 1 and box is None,
        )
        best = scores.argmax()
        low = lows[best][None]
    return masks[best] > 0


def test_masks_are_those_of_the_stock_predictor_for_each_model(page, adapters):
    pixels = page.images.read(1)
    predictors = {"sam2_nano": stock(None, pixels), **{name: stock(path, pixels) for name, path in adapters.items()}}
    seen = []
    for clicks, box in ((CLICKS[:1], None), (CLICKS, None), ([], BOX), (CLICKS[1:], BOX)):
        for pair in (("sam2_nano", "line_1"), ("line_2", "line_1")):
            found = page.post("/api/predict", {"image": 1, "models": pair, "clicks": clicks, "box": box})["answers"]
            assert [answer["model"] for answer in found] == list(pair)
            for answer in found:
                mask = mask_of(answer["runs"], *pixels.shape[:2])
                assert np.array_equal(mask, expected(predictors[answer["model"]], clicks, box))
                assert answer["area"] == mask.sum() and answer["window"] == [0, 1600]
                seen.append(mask.tobytes())
    assert len(set(seen)) > 8  # the models and prompts do differ


def test_a_click_costs_one_decode(page):
    """This also holds after another model and after Undo; clicks that the model has not seen are decoded first."""
    counts = {"encoder": 0, "decoder": 0}
    network = page.engine.model("sam2_nano").network
    network.image_encoder.register_forward_hook(lambda *_: counts.__setitem__("encoder", counts["encoder"] + 1))
    network.sam_mask_decoder.register_forward_hook(lambda *_: counts.__setitem__("decoder", counts["decoder"] + 1))

    def cost(clicks: list, *models: str) -> tuple[int, int]:
        before = dict(counts)
        page.post("/api/predict", {"image": 0, "models": models, "clicks": clicks})
        return tuple(counts[name] - before[name] for name in counts)

    page.post("/api/images/0/open", ["sam2_nano", "line_1"])
    assert counts == {"encoder": 2, "decoder": 0}
    assert cost(CLICKS[:1], "sam2_nano", "line_1") == (0, 2)
    assert cost(CLICKS[:2], "sam2_nano", "line_1") == (0, 2)
    assert cost(CLICKS[:1], "sam2_nano") == (0, 1)
    assert cost(CLICKS, "line_2") == (1, 3)
    assert cost([*CLICKS, [1.0, 1.0, 0]], "line_2") == (0, 1)


def test_a_window_is_what_the_model_sees(tmp_path, folder, adapters):
    page = Page(tmp_path, folder, adapters, crop=512)
    pixels = page.images.read(2)
    (found,) = page.post("/api/predict", {"image": 2, "models": ["line_1"], "clicks": [[700, 90, 1]]})["answers"]
    start, stop = found["window"]
    assert stop - start == 512 and abs(start + stop - 1400) <= 256
    inner = expected(stock(adapters["line_1"], np.ascontiguousarray(pixels[:, start:stop])), [[700 - start, 90, 1]])
    mask = mask_of(found["runs"], *pixels.shape[:2])
    assert np.array_equal(mask[:, start:stop], inner) and not mask[:, :start].any() and not mask[:, stop:].any()
    assert page.post("/api/images/2/open", ["line_1"])["encode_ms"] == 0
    assert page.engine.window(1600, Prompts(((10, 5, 1), (900, 5, 1)))) == (0, 1600)
    assert page.engine.window(1600, Prompts(((10, 5, 1),), whole=True)) == (0, 1600)
    assert page.engine.window(1600, Prompts(box=(1100, 0, 1600, 9))) == (1088, 1600)
    assert page.engine.window(300, Prompts(((10, 5, 1),))) == (0, 300)


def test_the_image_is_the_pixels_that_the_model_gets(page):
    answer = page.client.get("/api/images/3")
    assert answer.headers["content-type"] == "image/png"
    (page.out.parent / "shown.png").write_bytes(answer.content)
    with Image.open(page.out.parent / "shown.png") as image:
        assert np.array_equal(np.asarray(image), page.images.read(3))


@pytest.mark.parametrize(
    "change, said",
    [
        ({"image": 99}, "there is no image 99: there are 12"),
        ({"image": -1}, "there is no image -1"),
        ({"models": ["x"]}, "there is no model 'x': choose from 'sam2_nano', 'line_1', 'line_2'"),
        ({"clicks": []}, "there is no prompt"),
        ({"clicks": [[-1, 5, 1]]}, "(-1, 5) is outside the strip of 1600x256 pixels"),
        ({"clicks": [[5, 257, 1]]}, "outside the strip"),
        ({"box": [5, 5, 5, 9]}, "a box must have x0 < x1"),
        ({"box": [5, 5, 9, 1e300]}, "outside the strip"),
    ],
)
def test_prompts_that_cannot_be_answered_are_a_sentence(page, change, said):
    assert said in page.refused("/api/predict", {"image": 0, "models": ["line_1"], "clicks": CLICKS, **change})


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"image": 0, "models": []},
        {"image": 0, "models": ["line_1"] * 3},
        {"image": "../x", "models": ["line_1"]},
        {"image": 0, "models": ["line_1"], "clicks": [[1, 1, 2]]},
        {"image": 0, "models": ["line_1"], "clicks": [[1, 1]]},
        {"image": 0, "models": ["line_1"], "clicks": [[1, 1, 1]] * 65},
        {"image": 0, "models": ["line_1"], "file": "x"},
    ],
)
def test_another_form_is_refused_in_one_sentence(page, body):
    assert "\n" not in page.refused("/api/predict", body, 422)


def test_numbers_that_are_none_are_refused(page):
    text = '{"image": 0, "models": ["line_1"], "clicks": [[NaN, 1e999, 1]]}'
    answer = page.client.post("/api/predict", content=text, headers={"content-type": "application/json"})
    assert answer.status_code == 422 and "clicks" in answer.json()["detail"]
