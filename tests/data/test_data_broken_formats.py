"""Broken Supervisely, COCO and label files: one sentence with the file for each."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from helpers.data_formats import make_coco, make_labels, make_supervisely, rle_of
from helpers.data_sets import WIDTH, write_image
from sam2_lora_ext.data.coco import COCOReader
from sam2_lora_ext.data.index import build_index, collect
from sam2_lora_ext.data.label_png import LabelPNGReader
from sam2_lora_ext.data.supervisely import SuperviselyReader
from sam2_lora_ext.utils.errors import UserError


def supervisely(change: Callable[[dict], None]) -> Callable[[Path], None]:
    """Changes the annotation of a.jpg."""

    def damage(folder: Path) -> None:
        path = folder / "train/ann/a.jpg.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return damage


def text_of(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "train/ann" / name).write_text(text)


def set_bitmap(**values) -> Callable[[Path], None]:
    return supervisely(lambda content: content["objects"][1]["bitmap"].update(values))


@pytest.mark.parametrize(
    ("damage", "cause", "row"),
    [
        (supervisely(lambda content: content.pop("objects")), "JSON without objects", None),
        (supervisely(lambda content: content.update(objects=None)), "JSON without objects", None),
        (text_of("a.jpg.json", "[1, 2]"), "JSON without objects", None),
        (text_of("a.jpg.json", '{"objects": ['), "not JSON", None),
        (text_of("a.jpg.json", ""), "not JSON", None),
        (lambda folder: (folder / "train/ann/a.jpg.json").unlink(), "annotation missing", None),
        (text_of("zz.jpg.json", '{"objects": []}'), "image missing", None),
        (supervisely(lambda content: content.update(size={"height": 5, "width": 5})), "image size", None),
        (supervisely(lambda content: content.update(size={"height": 5})), "JSON without objects", None),
        (supervisely(lambda content: content["objects"][1].update(classTitle="rust")), "unknown class", 2),
        (supervisely(lambda content: content["objects"][1].pop("classTitle")), "object fields", 2),
        (supervisely(lambda content: content["objects"].__setitem__(1, 5)), "object fields", 2),
        (
            supervisely(
                lambda content: content["objects"].__setitem__(1, {"classTitle": "defect_1", "geometryType": "polygon"})
            ),
            "geometry",
            2,
        ),
        (set_bitmap(origin=[5000, 3]), "bitmap outside", 2),
        (set_bitmap(origin=[-5000, -3]), "bitmap outside", 2),
        (set_bitmap(origin=[5]), "object fields", 2),
        (set_bitmap(origin="ab"), "object fields", 2),
        (set_bitmap(origin=[float("inf"), 0]), "object fields", 2),
        (set_bitmap(origin=[10**30, -(10**30)]), "bitmap outside", 2),
        (set_bitmap(data="*** no base64 ***"), "invalid base64", 2),
        (set_bitmap(data="AAAA"), "bitmap damaged", 2),
        (set_bitmap(data=None), "invalid base64", 2),
    ],
)
def test_broken_supervisely_data(tmp_path, damage, cause, row):
    make_supervisely(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match="1 invalid entries"):
        build_index(SuperviselyReader(tmp_path))
    index = build_index(SuperviselyReader(tmp_path), "skip")
    assert [(problem.cause, problem.row) for problem in index.problems] == [(cause, row)]
    if row is not None:
        assert len(index.masks(0)) == 2 and not index.complete[0]  # a.jpg has three objects


@pytest.mark.parametrize(
    ("change", "cause", "row"),
    [
        (lambda c: c["images"][0].update(file_name="../a.jpg"), "path in name", 1),
        (lambda c: c["images"][0].update(file_name="gone.jpg"), "image missing", 1),
        (lambda c: c["images"][0].update(width=5), "image size", 1),
        (lambda c: c["images"][1].update(id=10), "duplicate row", 2),
        (lambda c: c["annotations"][0].update(image_id=99), "image missing", 1),
        (lambda c: c["annotations"][0].update(category_id=99), "unknown class", 1),
        (lambda c: c["annotations"][0].update(segmentation=None), "segmentation", 1),
        (lambda c: c["annotations"][0].update(segmentation=[]), "polygon", 1),
        (lambda c: c["annotations"][0].update(segmentation=[[1, 2, 3, 4]]), "polygon", 1),
        (lambda c: c["annotations"][0].update(segmentation=[[1, 2, 3, 4, 5, "x"]]), "segmentation", 1),
        (lambda c: c["annotations"][0].update(segmentation=[[900, 900, 950, 900, 950, 950]]), "mask empty", 1),
        (lambda c: c["annotations"][0].update(segmentation={"size": [4, 4], "counts": [16]}), "RLE size", 1),
        (
            lambda c: c["annotations"][0].update(segmentation={"size": [40, 200], "counts": [5, 5]}),
            "RLE out of range",
            1,
        ),
        (
            lambda c: c["annotations"][0].update(segmentation={"size": [40, 200], "counts": "~~broken"}),
            "RLE not COCO",
            1,
        ),
        (lambda c: c["annotations"][0].update(segmentation={"size": [40, 200], "counts": 5}), "segmentation", 1),
        # pycocotools ends with a segmentation fault here
        (lambda c: c["annotations"][0].update(segmentation=[[0, 0, 1e9, 0, 1e9, 1e9]]), "polygon", 1),
        (
            lambda c: c["annotations"][0].update(segmentation={"size": [40, 200], "counts": "PPo0PPo0"}),
            "RLE out of range",
            1,
        ),
    ],
)
def test_broken_coco_data(tmp_path, change, cause, row):
    content = make_coco(tmp_path, lambda box: rle_of(box, False))
    change(content)
    (tmp_path / "coco.json").write_text(json.dumps(content))
    problems = collect(COCOReader(tmp_path / "images", tmp_path / "coco.json")).problems
    assert (problems[0].cause, problems[0].row) == (cause, row)
    with pytest.raises(UserError, match=f"{len(problems)} invalid entries"):
        build_index(COCOReader(tmp_path / "images", tmp_path / "coco.json"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"images": [], "annotations": []}',
        '{"images": 1, "annotations": [], "categories": []}',
        '{"images": [], "annotations": [], "categories": [{"name": "x"}]}',
        "[" * 100_000,
        '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "x"}, {"id": 1, "name": "y"}]}',
    ],
)
def test_no_coco_file(tmp_path, text):
    (tmp_path / "coco.json").write_text(text)
    with pytest.raises(UserError, match="coco.json"):
        COCOReader(tmp_path, tmp_path / "coco.json")


def save_label(label, path):
    Image.fromarray(label).save(path)


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (lambda f: (f / "annotations/a.png").unlink(), "label missing"),
        (lambda f: (f / "images/a.jpg").unlink(), "image missing"),
        (lambda f: (f / "annotations/a.png").write_bytes(b""), "label empty"),
        (lambda f: (f / "annotations/a.png").write_text("text"), "not a label"),
        (lambda f: (f / "annotations/a.png").write_bytes((f / "annotations/a.png").read_bytes()[:80]), "label damaged"),
        (lambda f: Image.new("L", (7, 7)).save(f / "annotations/a.png"), "label size"),
        (lambda f: Image.new("RGB", (WIDTH, 40), (1, 2, 3)).save(f / "annotations/a.png"), "label mode"),
        (lambda f: Image.new("L", (WIDTH, 40), 9).save(f / "annotations/a.png"), "unknown class"),
        (lambda f: Image.new("L", (WIDTH, 40)).save(f / "annotations/a.bmp"), "duplicate label"),
        (lambda f: write_image(f / "images/a.png"), "duplicate image"),
    ],
)
def test_broken_label_images(tmp_path, damage, cause):
    make_labels(tmp_path, save_label)
    damage(tmp_path)
    index = collect(LabelPNGReader(tmp_path / "images", tmp_path / "annotations"))
    assert [problem.cause for problem in index.problems] == [cause]
    with pytest.raises(UserError, match="1 invalid entries"):
        build_index(LabelPNGReader(tmp_path / "images", tmp_path / "annotations"))
