"""Instance annotations are preserved in index, objects, conversion, evaluation and scan."""

import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest

from helpers.data_formats import make_coco, make_supervisely, rle_of
from helpers.data_sets import HEIGHT, WIDTH, reader, write_image, write_kaggle
from helpers.prepare import run
from sam2_lora_ext.data.cache import cached_index
from sam2_lora_ext.data.coco import COCOReader
from sam2_lora_ext.data.dataset import SeverstalRawDataset
from sam2_lora_ext.data.guess_format import guess_reader
from sam2_lora_ext.data.index import build_index
from sam2_lora_ext.data.objects import components_differ, make_objects
from sam2_lora_ext.data.rle import decode_runs
from sam2_lora_ext.data.supervisely_bitmap import encode_bitmap
from sam2_lora_ext.utils.errors import UserError


def coco(folder, compressed=True):
    """Touching squares of one class, one annotation in two parts, a crowd; ids in no order; the content."""
    (folder / "images").mkdir(parents=True)
    for name in ("a.png", "b.png"):
        write_image(folder / "images" / name)
    boxes = {7: (0, 2, 2, 12, 12), 3: (0, 12, 2, 22, 12), 9: (5, 100, 5, 110, 9), 8: (5, 40, 5, 50, 9)}
    annotations = [
        {
            "id": number,
            "image_id": 42 if number != 8 else 11,
            "category_id": category,
            "iscrowd": int(number == 8),
            "area": (x1 - x0) * (y1 - y0),
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "segmentation": rle_of((x0, y0, x1, y1), compressed),
        }
        for number, (category, x0, y0, x1, y1) in boxes.items()
    ]
    parts = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    parts[5:9, 60:70] = parts[5:9, 80:90] = 1
    annotations.append({**annotations[2], "id": 1, "area": 80, "bbox": [60, 5, 30, 4], "segmentation": encoded(parts)})
    size = {"height": HEIGHT, "width": WIDTH}
    images = [{"id": number, "file_name": name, **size} for number, name in ((42, "a.png"), (11, "b.png"))]
    content = {"images": images, "annotations": annotations}
    content["categories"] = [{"id": 0, "name": "pit"}, {"id": 5, "name": "scratch"}]
    (folder / "coco.json").write_text(json.dumps(content))
    return content


def encoded(mask):
    from pycocotools import mask as mask_utils

    rle = mask_utils.encode(np.asfortranarray(mask))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def test_touching_annotations_and_one_in_two_parts(shared_cases):
    folder = shared_cases / "coco_touch"
    index = build_index(COCOReader(folder / "images", folder / "annotations.json"))
    objects = make_objects(index)
    assert objects.mode == "instances" and objects.annotation.tolist() == [1, 2, 3]
    assert objects.areas.tolist() == [900, 900, 800]
    assert objects.boxes.tolist() == [[10, 10, 40, 40], [40, 10, 70, 40], [100, 10, 150, 30]]
    assert objects.ids.tolist() == [1_000_000, 1_000_001, 2_000_000]
    components = make_objects(index, "components")
    assert components.areas.tolist() == [1800, 400, 400] and set(components.annotation.tolist()) == {-1}
    assert make_objects(index, "classes").areas.tolist() == [1800, 800]
    assert make_objects(index, "all").areas.tolist() == [2600]
    assert components_differ(index) == (2, 1)


def test_coco_to_coco_is_the_identity(tmp_path):
    content = coco(tmp_path / "c")
    run("convert", tmp_path / "c", "--to", "coco", "--out", tmp_path / "o", "--quiet")
    written = json.loads((tmp_path / "o/annotations.json").read_text())

    def by_id(entries):
        return {entry["id"]: entry for entry in entries}

    for part in ("images", "annotations", "categories"):
        assert by_id(written[part]) == by_id(content[part]), part


def test_ids_that_cannot_be_kept_are_numbered_anew(tmp_path):
    content = coco(tmp_path / "c")
    content["annotations"][0]["id"] = "text"
    content["annotations"][1]["id"] = 9  # that of another one
    content["images"][0]["id"] = "x"
    for entry in content["annotations"]:
        entry["image_id"] = "x" if entry["image_id"] == 42 else 11
    (tmp_path / "c/coco.json").write_text(json.dumps(content))
    index = build_index(guess_reader(tmp_path / "c"))
    assert sorted(index.mask_id.tolist()) == [-1, 1, 8, 9, 9] and index.image_id.tolist() == [-1, 11]
    assert any("1 annotations repeat the id of another one" in note for note in index.notes)
    run("convert", tmp_path / "c", "--to", "coco", "--out", tmp_path / "o", "--quiet")
    written = json.loads((tmp_path / "o/annotations.json").read_text())
    ids = [entry["id"] for entry in written["annotations"]]
    assert sorted(ids) == [1, 8, 9, 10, 11] and sorted(entry["id"] for entry in written["images"]) == [11, 12]


def test_category_ids_are_kept_only_where_they_give_the_same_classes(tmp_path):
    coco(tmp_path / "c")
    for classes, ids in (("pit,scratch", [0, 5]), ("scratch,pit", [1, 2])):
        out = tmp_path / classes
        run("convert", tmp_path / "c", "--classes", classes, "--to", "coco", "--out", out, "--quiet")
        written = json.loads((out / "annotations.json").read_text())
        assert [entry["id"] for entry in written["categories"]] == ids
        assert list(build_index(guess_reader(out)).class_names.values()) == classes.split(",")


@pytest.mark.parametrize("through", ["coco", "supervisely"])
def test_instances_survive_supervisely(tmp_path, through):
    coco(tmp_path / "c")
    before = make_objects(build_index(guess_reader(tmp_path / "c")))
    run("convert", tmp_path / "c", "--to", "supervisely", "--out", tmp_path / "s", "--quiet")
    run("convert", tmp_path / "s", "--to", through, "--out", tmp_path / "t", "--quiet")
    after = make_objects(build_index(guess_reader(tmp_path / "t")))
    for name in ("ids", "areas", "boxes", "annotation", "runs", "offsets"):
        assert np.array_equal(getattr(before, name), getattr(after, name)), name


def test_supervisely_objects_that_touch_or_have_parts(tmp_path):
    make_supervisely(tmp_path)
    masks = np.zeros((3, HEIGHT, WIDTH), bool)
    masks[0, 3:9, 10:20] = masks[1, 3:9, 20:30] = masks[2, 3:5, 50:55] = masks[2, 3:5, 60:65] = True
    objects = [{"id": 90 - n, "classTitle": "defect_1", "bitmap": encode_bitmap(mask)} for n, mask in enumerate(masks)]
    (tmp_path / "train/ann/a.jpg.json").write_text(json.dumps({"objects": objects}))
    index = build_index(guess_reader(tmp_path))
    table = make_objects(index)
    assert table.annotation[:3].tolist() == [90, 89, 88] and table.areas[:3].tolist() == [60, 60, 20]
    for place, mask in enumerate(masks):
        assert np.array_equal(decode_runs(table.runs_of(place), HEIGHT, WIDTH) > 0, mask)


def test_formats_without_instances(tmp_path):
    index = build_index(reader(write_kaggle(tmp_path / "k")))
    assert not index.instances and make_objects(index).mode == "components" and components_differ(index) == (0, 0)
    assert set(index.mask_id.tolist()) == {-1}
    with pytest.raises(UserError, match="choose components, classes or all, or null"):
        make_objects(index, "instances")


@pytest.mark.parametrize("kind", ["kaggle", "kaggle_old", "label_png"])
def test_conversion_says_what_it_joins(tmp_path, caplog, kind):
    coco(tmp_path / "c")
    with caplog.at_level(logging.WARNING):
        run("convert", tmp_path / "c", "--to", kind, "--out", tmp_path / "o", "--quiet")
    assert "4 of 5 annotations are joined with another one, so 3 masks are written" in caplog.text
    assert "1 annotations lose that flag" in caplog.text  # iscrowd
    index = build_index(guess_reader(tmp_path / "o", size=(HEIGHT, WIDTH), classes=["pit", "scratch"]))
    assert make_objects(index, "classes").areas.tolist() == [200, 120, 40]


def test_the_cache_keeps_it_all(tmp_path):
    coco(tmp_path / "c")
    (tmp_path / "c/images/notes.txt").write_text("")
    fresh = build_index(guess_reader(tmp_path / "c"))
    assert fresh.unread and fresh.class_source == {1: 0, 2: 5}
    for _ in range(2):
        index = cached_index(guess_reader(tmp_path / "c"), cache_dir=tmp_path / "cache")
        for name, value in vars(fresh).items():
            assert (
                np.array_equal(getattr(index, name), value)
                if isinstance(value, np.ndarray)
                else (getattr(index, name) == value)
            ), name
    part = fresh.subset(np.array([1]))
    assert part.mask_id.tolist() == [8] and part.image_id.tolist() == [11] and part.mask_crowd.all() and part.instances


def test_training_objects_and_the_note_about_components(tmp_path, caplog):
    coco(tmp_path / "c")
    source = guess_reader(tmp_path / "c")
    raw = SeverstalRawDataset(source, training=False, include_clean=False)
    assert sum(len(raw.items[item].objects) for item in range(len(raw))) == 5 and raw.objects.mode == "instances"
    with caplog.at_level(logging.WARNING):
        SeverstalRawDataset(source, objects="components", training=False)
    assert "joins 2 of 5 annotations" in caplog.text and "splits 1 that" in caplog.text


def test_evaluation_rows_name_the_annotation(tmp_path):
    from sam2_lora_ext.evaluate.compare import Samples, _rows

    coco(tmp_path / "c")
    dataset = SeverstalRawDataset(guess_reader(tmp_path / "c"), training=False, include_clean=False)
    samples = Samples(dataset)
    asked = [
        SimpleNamespace(
            image=sample.name,
            item=item,
            object_id=number,
            by_clicks=[],
            clicks=[],
            areas={},
            boundary={},
            score=0.0,
            automatic=None,
        )
        for item, sample in enumerate(samples)
        for number in sample.object_ids
    ]
    rows = _rows(SimpleNamespace(objects=asked), samples)
    assert [(row["object_id"], row["annotation"]) for row in rows] == [
        (1_000_000, 7),
        (1_000_001, 3),
        (2_000_000, 9),
        (2_000_001, 1),
        (2_000_000, 8),
    ]
    plain = SeverstalRawDataset(reader(write_kaggle(tmp_path / "k")), training=False, include_clean=False)
    asked[0].object_id = int(plain.objects.ids[plain.items[0].objects[0]])
    assert _rows(SimpleNamespace(objects=asked[:1]), Samples(plain))[0]["annotation"] is None


def test_scan_counts_what_components_would_do(tmp_path, capsys):
    coco(tmp_path / "c")
    run("scan", tmp_path / "c", "--out", tmp_path / "out", "--quiet")
    summary = json.loads((tmp_path / "out/scan.json").read_text())
    assert (summary["objects"], summary["objects_are"], summary["masks"]) == (5, "instances", 3)
    assert summary["annotations"] == {"count": 5, "joined_by_components": 2, "split_by_components": 1}
    assert "5 objects (instances)" in capsys.readouterr().out
    assert "5 (components would join 2 and split 1 of them)" in (tmp_path / "out/scan.html").read_text()
    assert "objects (instances)" in (tmp_path / "out/scan.html").read_text()


def test_polygon_and_rle_files_have_the_same_objects(tmp_path):
    make_coco(tmp_path / "p", lambda box: [[box[0], box[1], box[2], box[1], box[2], box[3], box[0], box[3]]])
    make_coco(tmp_path / "r", lambda box: rle_of(box, False))
    tables = [make_objects(build_index(guess_reader(tmp_path / name))) for name in "pr"]
    assert np.array_equal(tables[0].runs, tables[1].runs) and np.array_equal(tables[0].annotation, tables[1].annotation)
