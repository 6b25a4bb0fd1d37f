"""Names: class numbers by name, file names of other systems, quoted csv fields."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn

from helpers.data_formats import make_coco, rle_of
from helpers.data_sets import STRIPS, reader, write_image, write_kaggle
from helpers.prepare import run
from sam2_lora_ext.data.coco import COCOReader
from sam2_lora_ext.data.guess_format import guess_reader
from sam2_lora_ext.data.index import build_index, collect
from sam2_lora_ext.data.items import read_split
from sam2_lora_ext.data.objects import make_objects
from sam2_lora_ext.data.records import compare_class_tables, compare_datasets
from sam2_lora_ext.utils.errors import UserError


def separate(cases: Path, classes=None):
    """The training and the validation set of `sep`."""
    readers = [
        COCOReader(cases / f"sep/{part}", cases / f"sep/{part}/_annotations.coco.json", classes)
        for part in ("train", "valid")
    ]
    return [SimpleNamespace(index=build_index(one), class_names=one.class_names) for one in readers]


def test_other_class_numbers_in_validation_are_refused(shared_cases):
    train, valid = separate(shared_cases)
    with pytest.raises(UserError) as caught:
        compare_datasets({"training": [train], "validation": [valid]})
    for words in ("1 (steel), 2 (crack), 3 (pit)", "1 (crack), 2 (pit)", "sep/train", "sep/valid", "classes: ["):
        assert words in str(caught.value)
    train, valid = separate(shared_cases, ["crack", "pit"])
    compare_datasets({"training": [train], "validation": [valid]})
    assert train.index.mask_class.tolist() == [1, 2, 1, 2] and valid.index.mask_class.tolist() == [1, 2]


def test_training_and_doctor_compare_the_tables(shared_cases, monkeypatch):
    from sam2_lora_ext.doctor.data import DataSets
    from sam2_lora_ext.doctor.findings import guarded
    from sam2_lora_ext.trainer import LoRATrainer

    train, valid = separate(shared_cases)
    sets = DataSets({})
    sets.built = {"train": [train], "val": [valid]}
    (finding,) = guarded("data", sets.check_classes, "")
    assert finding.level == "red" and "1 (steel), 2 (crack), 3 (pit)" in finding.text
    trainer = object.__new__(LoRATrainer)
    trainer.loss, trainer.meters, trainer.model = {}, None, nn.Module()
    trainer.mode, trainer.data_conf, trainer.max_epochs = "train", SimpleNamespace(train=train, get=lambda *_: valid), 1
    monkeypatch.setattr("training.trainer.instantiate", lambda conf: conf)
    with pytest.raises(UserError, match="is not the same in both"):
        trainer._setup_dataloaders()
    trainer.data_conf.train = valid
    trainer._setup_dataloaders()


def test_class_tables():
    compare_class_tables({1: "a", 2: "b"}, {2: "b", 3: "c"}, "x", "y")
    for other in ({2: "a"}, {1: "b"}, {1: "b", 2: "a"}):
        with pytest.raises(UserError, match="is not the same in both"):
            compare_class_tables({1: "a", 2: "b"}, other, "x", "y")


def with_categories(folder, categories, **reader):
    """The small COCO set with other categories: its annotations use the ids 10 to 40."""
    content = make_coco(folder, lambda box: rle_of(box, True)) if not (folder / "coco.json").exists() else None
    content = content or json.loads((folder / "coco.json").read_text())
    content["categories"] = [{"id": number, "name": name} for number, name in categories]
    (folder / "coco.json").write_text(json.dumps(content))
    return COCOReader(folder / "images", folder / "coco.json", **reader)


FOUR = [(10, "pit"), (20, "slit"), (30, "scratch"), (40, "patch")]


def test_categories_by_name(tmp_path):
    assert with_categories(tmp_path, FOUR).class_names == dict(FOUR)
    assert with_categories(tmp_path, [(0, "steel"), *FOUR]).class_names == dict(
        enumerate(["steel", "pit", "slit", "scratch", "patch"], 1)
    )
    given = {7: "patch", 5: "pit", 3: "slit", 2: "scratch", 9: "unseen"}
    one = with_categories(tmp_path, [(0, "steel"), *reversed(FOUR)], classes=given)
    index = build_index(one)
    assert one.class_names == given
    assert {index.name(i): {n for n, _ in index.masks(i)} for i in range(6)}["a.jpg"] == {5, 2}
    with pytest.raises(
        UserError, match=r"10 \(pit\).*patch is used but.*1 \(pit\), 2 .*--classes pit,slit,scratch,patch"
    ):
        with_categories(tmp_path, FOUR, classes=["pit", "slit", "scratch"])
    with pytest.raises(UserError, match="not one of the given classes"):
        with_categories(tmp_path, FOUR, classes=4)  # defect_1 to defect_4


def test_an_unused_category_with_a_used_ones_name_is_ignored(tmp_path):
    assert with_categories(tmp_path, [(0, "pit"), *FOUR]).class_names == dict(FOUR)
    with pytest.raises(UserError, match=r"two categories with the name 'pit' \(ids 10 and 20\)"):
        with_categories(tmp_path, [(10, "pit"), (20, "pit"), *FOUR[2:]])


@pytest.mark.parametrize("case", ["ls_win", "ls_prefix"])
def test_file_names_of_label_studio(shared_cases, case):
    index = build_index(guess_reader(shared_cases / case / "result.json"))
    assert index.names() == ["8f1c-a.png"] and make_objects(index).areas.tolist() == [900]
    assert index.class_source == {1: 0, 2: 1}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("..\\a.jpg", "leads out of"),
        ("C:\\images\\a.jpg", "leads out of"),
        ("images/../../a.jpg", "leads out of"),
        ("/images/a.jpg", "leads out of"),
        ("images\\b.jpg", "a second time"),
        ("./b.jpg", "a second time"),
        ("A.JPG", "the folder has a.jpg: correct file_name"),
        ("gone.jpg", "does not exist"),
        (None, "the path of an image is expected"),
    ],
)
def test_file_names_that_cannot_be_used(tmp_path, name, words):
    content = make_coco(tmp_path, lambda box: rle_of(box, True))
    content["images"].append({**content["images"][0], "file_name": name})
    del content["images"][0]
    (tmp_path / "coco.json").write_text(json.dumps(content))
    index = collect(COCOReader(tmp_path / "images", tmp_path / "coco.json"))
    assert words in index.problems[-1].sentence and "a.jpg" not in index.names()


@pytest.mark.parametrize("change", [{"area": 899}, {"bbox": [10, 10, 30, 33]}, {"area": "900"}, {"bbox": [1, 2]}])
def test_rle_that_disagrees_with_its_area_or_box(shared_cases, tmp_path, change):
    content = make_coco(tmp_path, lambda box: rle_of(box, True))
    first = content["annotations"][0]
    x0, y0, x1, y1 = STRIPS["a.jpg"][0][1:]
    good = {"area": (x1 - x0) * (y1 - y0), "bbox": [x0, y0 + 1, x1 - x0 - 1, y1 - y0 - 1]}  # within a pixel
    for values, count in ((good, 0), ({**good, **change}, 1)):
        first.update(values)
        (tmp_path / "coco.json").write_text(json.dumps(content))
        index = collect(COCOReader(tmp_path / "images", tmp_path / "coco.json"))
        assert [(p.cause, p.row) for p in index.problems] == [("RLE disagrees", 1)] * count and index.notes == ()


def test_polygons_that_disagree_are_counted(tmp_path):
    content = make_coco(tmp_path, lambda box: [[box[0], box[1], box[2], box[1], box[2], box[3], box[0], box[3]]])
    for entry in content["annotations"]:
        xs, ys = entry["segmentation"][0][::2], entry["segmentation"][0][1::2]
        width, height = max(xs) - min(xs), max(ys) - min(ys)
        entry.update(area=width * height, bbox=[min(xs), min(ys), width, height])
    content["annotations"][2]["area"] *= 2
    content["annotations"][3]["bbox"] = [0, 0, 200, 40]
    (tmp_path / "coco.json").write_text(json.dumps(content))
    index = build_index(COCOReader(tmp_path / "images", tmp_path / "coco.json"))
    assert len(index.notes) == 1 and "2 polygons" in index.notes[0] and "annotation 3" in index.notes[0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"images": [], "images": [], "categories": [], "annotations": []}', "the key 'images' twice"),
        ('{"images": [], "categories": [], "annotations": []} {}', "two files joined"),
        ('{"images": [], "categories": [], "annotations": [', "cut off"),
    ],
)
def test_json_that_hides_or_lacks_something(tmp_path, text, words):
    (tmp_path / "coco.json").write_text(text)
    with pytest.raises(UserError, match=words):
        COCOReader(tmp_path, tmp_path / "coco.json")


COMMA = "coil 7, side A.jpg"


def test_a_name_with_a_comma_survives_every_csv(tmp_path):
    folder = write_kaggle(tmp_path / "k", {"b.jpg": []})
    write_image(folder / "images" / COMMA)
    (folder / "train.csv").write_text(f'ImageId,ClassId,EncodedPixels\n"{COMMA}",3,1 5\n')
    size = ["--size", "200x40", "--quiet"]
    for kind in ("kaggle", "kaggle_old"):
        run("convert", folder, "--to", kind, "--out", tmp_path / kind, *size)
        assert build_index(guess_reader(tmp_path / kind, size=(40, 200))).names() == ["b.jpg", COMMA]
    run("split", folder, "--out", tmp_path / "split.csv", "--folds", 2, *size)
    assert sorted(read_split(tmp_path / "split.csv", ["fold0", "fold1"])) == ["b.jpg", COMMA]
    (folder / "train.csv").write_text(f"ImageId,ClassId,EncodedPixels\n{COMMA},3,1 5\n")  # without quotes
    index = build_index(reader(folder), "skip")
    assert index.unknown == (COMMA,) and index.names() == ["b.jpg"]


def test_submission_with_a_comma_is_read_back(tmp_path):
    from sam2_lora_ext.evaluate.kaggle_score import KaggleTally

    folder = write_kaggle(tmp_path / "k", {COMMA: [], "b.jpg": []})
    index = build_index(reader(folder))
    tally = KaggleTally(index, [0, 1], "1click")
    tally.write(folder / "train.csv", force=True)
    assert build_index(reader(folder)).names() == ["b.jpg", COMMA]


def test_split_files(tmp_path):
    table = tmp_path / "split.csv"
    table.write_text("image, split \na.jpg ,val \n b.jpg,train\n\n")
    assert read_split(table, "val") == ["a.jpg"] and read_split(table, "train") == ["b.jpg"]
    for row in ("c.jpg", "coil 7, side A.jpg,val", ",val", "c.jpg,"):
        table.write_text(f"image,split\na.jpg,val\n{row}\n")
        with pytest.raises(UserError, match="row 3"):
            read_split(table, "val")
