"""Masks kept on the page are read back equal from every format, and foreign data sets are never replaced."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from helpers.serve_pages import CLASSES, Page, make_adapters, mask_of
from sam2_lora_ext.data.coco import COCOReader
from sam2_lora_ext.data.index import build_index
from sam2_lora_ext.data.kaggle import KaggleReader
from sam2_lora_ext.data.label_png import LabelPNGReader
from sam2_lora_ext.data.supervisely import SuperviselyReader
from sam2_lora_ext.serve.classes import Inspector

CLICKS = [[300.0, 100.0, 1], [900.5, 40.0, 0], [350.0, 200.0, 1]]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    return make_adapters(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def folder(strips) -> Path:
    return strips / "train_images"


@pytest.fixture
def page(tmp_path, folder, adapters) -> Page:
    return Page(tmp_path, folder, adapters)


def keep(page: Page, image: int, class_id: int, clicks: list) -> dict:
    body = {"image": image, "model": "line_1", "class_id": class_id, "clicks": clicks}
    return page.post("/api/keep", body)["kept"][-1]


READERS = {
    "kaggle": lambda folder: KaggleReader(folder / "train_images", folder / "train.csv", CLASSES),
    "kaggle_old": lambda folder: KaggleReader(folder / "train_images", folder / "train.csv", CLASSES),
    "label_png": lambda folder: LabelPNGReader(folder / "images", folder / "annotations", CLASSES),
    "coco": lambda folder: COCOReader(folder / "images", folder / "annotations.json"),
    "supervisely": lambda folder: SuperviselyReader(folder, classes=CLASSES),
}


@pytest.mark.parametrize("kind", READERS)
def test_kept_masks_come_back_from_every_format(kind, page):
    one = keep(page, 0, 2, CLICKS[:1])
    two = keep(page, 4, 4, CLICKS[:2])
    page.post("/api/images/2/clean", {"clean": True})
    found = page.post("/api/save", {"format": kind, "name": "round-1"})
    assert found["folder"] == str(page.out / "round-1") and not found["unsaved"] and found["labelled"] == 3
    index = build_index(READERS[kind](page.out / "round-1"))
    names = page.images.names()
    assert index.names() == [names[0], names[2], names[4]]
    assert [[(class_id, runs.ravel().tolist()) for class_id, runs in index.masks(image)] for image in range(3)] == [
        [(2, one["runs"])],
        [],
        [(4, two["runs"])],
    ]
    if index.instances:
        assert index.mask_id.tolist() == [one["number"], two["number"]]
    assert np.array_equal(index.read(0), page.images.read(0))


def test_a_save_replaces_its_own_data_set_and_no_other(page):
    keep(page, 0, 1, CLICKS[:1])
    save = {"format": "coco", "name": "round"}
    page.post("/api/save", save)
    keep(page, 1, 1, CLICKS[:1])
    page.post("/api/save", save)
    file = page.out / "round/annotations.json"
    assert len(json.loads(file.read_text())["annotations"]) == 2
    file.write_text("corrected by hand")
    assert "was changed since it was saved: choose another name" in page.refused("/api/save", save)
    assert file.read_text() == "corrected by hand"
    (page.out / "other").mkdir()
    assert "exists already" in page.refused("/api/save", {"format": "coco", "name": "other"})
    assert sorted(path.name for path in page.out.iterdir()) == ["other", "round"]


def test_a_mask_that_is_kept_twice_is_kept_once(page):
    """Its number stays the same; with another class it is another mask."""
    one, again = keep(page, 0, 1, CLICKS[:1]), keep(page, 0, 1, CLICKS[:1])
    assert one["number"] == again["number"] and page.labels.count() == (1, 1)
    assert keep(page, 0, 2, CLICKS[:1])["number"] != one["number"] and page.labels.count() == (1, 2)


def test_what_cannot_be_kept_or_saved_is_a_sentence(page):
    assert "nothing to save" in page.refused("/api/save", {"format": "coco", "name": "a"})
    assert "there is no format 'yolo': choose from kaggle" in page.refused("/api/save", {"format": "yolo", "name": "a"})
    asked = {"image": 0, "model": "line_1", "class_id": 3, "clicks": CLICKS[:1]}
    assert "there is no class 3: choose from 1, 2, 4" in page.refused("/api/keep", asked)
    assert "no class prompts" in page.refused("/api/keep", {"image": 0, "model": "line_1"})
    kept = keep(page, 0, 1, CLICKS[:1])
    assert "has masks" in page.refused("/api/images/0/clean", {"clean": True})
    keep(page, 0, 2, CLICKS[:1])
    assert "overlap" in page.refused("/api/save", {"format": "label_png", "name": "a"}) and not list(page.out.iterdir())
    assert page.client.delete("/api/images/0/masks/99").status_code == 400
    assert page.client.delete(f"/api/images/0/masks/{kept['number']}").json()["masks"] == 1
    assert page.post("/api/images/1/clean", {"clean": True})["clean"]
    assert not page.post("/api/images/1/clean", {"clean": False})["clean"]
    assert page.labels.count() == (1, 1)


def test_a_format_of_one_mask_a_class_says_what_it_joins(page):
    keep(page, 0, 1, CLICKS[:1])
    keep(page, 0, 1, CLICKS[2:])
    assert "2 of 2 annotations are joined" in page.post("/api/save", {"format": "kaggle", "name": "a"})["note"]
    assert page.post("/api/save", {"format": "coco", "name": "b"})["note"] is None


def test_class_prompts_are_masks_without_a_click(tmp_path, folder, adapters):
    """The segmenter, with a known result, is built once and called once per strip."""
    masks = np.zeros((3, 256, 1600), dtype=bool)
    masks[0, 5:9, 10:30] = masks[0, 100:120, 500:520] = masks[2, :, 1599] = True
    made, asked = [], []

    def segment(image: np.ndarray) -> SimpleNamespace:
        asked.append(image.shape)
        return SimpleNamespace(masks=torch.from_numpy(masks), scores=torch.tensor([2.5, -3.0, 0.5]))

    page = Page(tmp_path, folder, adapters, makers={"line_1": lambda: made.append(1) or Inspector(segment, (1, 2, 4))})
    shown = page.client.get("/api/state").json()["models"]
    assert [model["class_prompts"] for model in shown] == [False, True, False]
    for _ in range(2):
        found = page.post("/api/classes", {"image": 0, "model": "line_1"})["found"]
    counts = [(one["class_id"], one["score"], len(one["parts"])) for one in found]
    assert counts == [(1, 2.5, 2), (2, -3.0, 0), (4, 0.5, 1)]
    whole = sum(mask_of(runs, 256, 1600) for runs in found[0]["parts"])
    assert np.array_equal(whole, masks[0]) and made == [1] and asked == [(256, 1600, 3)]
    assert "no class prompts" in page.refused("/api/classes", {"image": 0, "model": "line_2"})
    kept = page.post("/api/keep", {"image": 0, "model": "line_1"})["kept"]
    assert [one["class_id"] for one in kept] == [1, 1, 4]
    page.post("/api/save", {"format": "coco", "name": "found"})
    assert len(json.loads((page.out / "found/annotations.json").read_text())["annotations"]) == 3


def test_class_prompts_of_a_merged_file_are_those_of_the_segmenter(tmp_path, folder):
    from helpers.class_models import make_prompts, write_merged
    from sam2_lora_ext.inspection.segmenter import load_segmenter
    from sam2_lora_ext.serve.classes import ClassPages
    from sam2_lora_ext.serve.images import Images
    from sam2_lora_ext.serve.models import load_models

    file = write_merged(tmp_path / "steel.pt", make_prompts(crop=256))
    loaded = load_models(file, {}, config="configs/sam2_nano.yaml")
    assert list(loaded.makers) == ["steel"] and loaded.class_names == {1: "scratch", 2: "scale", 3: "patch"}
    images = Images(folder, tmp_path)
    found = ClassPages(images, loaded.makers).inspect(0, "steel")
    expected = load_segmenter("configs/sam2_nano.yaml", file, device="cpu")(images.read(0))
    assert [one.score for one in found] == pytest.approx(expected.scores.tolist())
    for one, mask in zip(found, expected.masks.numpy(), strict=True):
        shown = sum((mask_of(part.ravel().tolist(), *mask.shape) for part in one.parts), np.zeros_like(mask))
        assert np.array_equal(shown, mask)
