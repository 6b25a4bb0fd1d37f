"""Unreadable images are unknown, never clean or complete; unread files are listed."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.data_formats import make_coco, make_labels, make_supervisely, rle_of
from helpers.data_sets import STRIPS, reader, rows_of, write_image, write_kaggle
from helpers.prepare import run
from sam2_lora_ext.data.coco import COCOReader
from sam2_lora_ext.data.guess_format import guess_reader
from sam2_lora_ext.data.index import build_index, collect, remarks
from sam2_lora_ext.data.kaggle import KaggleReader
from sam2_lora_ext.data.label_png import LabelPNGReader
from sam2_lora_ext.data.supervisely import SuperviselyReader
from sam2_lora_ext.utils.errors import UserError

SIZE = ["--size", "200x40", "--quiet"]


def strips_for(table, folder, count):
    """The table beside images k0.jpg ... of 1600x256."""
    (folder / "images").mkdir(parents=True)
    for number in range(count):
        write_image(folder / f"images/k{number}.jpg", size=(1600, 256))
    shutil.copy(table, folder / "train.csv")
    return KaggleReader(folder / "images", folder / "train.csv")


def state(index):
    """name -> "clean", "whole" or "part"."""
    clean = index.clean()
    return {
        index.name(image): "clean" if clean[image] else "whole" if index.complete[image] else "part"
        for image in range(len(index))
    }


def test_a_short_and_a_long_row(shared_cases, tmp_path):
    index = build_index(strips_for(shared_cases / "short/train.csv", tmp_path, 4), "skip")
    assert state(index) == {"k0.jpg": "whole", "k3.jpg": "clean"} and index.unknown == ("k1.jpg", "k2.jpg")
    assert [number for number, _ in index.masks(0)] == [1]
    assert "2 images are unknown" in remarks(index)[0]


def test_rows_of_one_image_and_class_are_united(shared_cases, tmp_path):
    index = build_index(strips_for(shared_cases / "multirow/train.csv", tmp_path, 2))
    assert state(index) == {"k0.jpg": "whole", "k1.jpg": "whole"}
    ((number, runs),) = index.masks(0)
    assert number == 3 and runs.tolist() == [[999, 50], [1255, 50], [89999, 40], [90255, 40]]
    assert "1 masks are the union of several rows" in index.notes[0]
    table = tmp_path / "train.csv"
    table.write_text(table.read_text() + "k0.jpg,3,1040 5\n")
    (problem,) = collect(KaggleReader(tmp_path / "images", table)).problems
    assert problem.row == 5 and "overlaps that of row 2" in problem.sentence


@pytest.mark.parametrize("named", ["K1.JPG", "k1.png", "k1", "images/k1.jpg", "images\\k1.jpg", "k1.jpg.png"])
def test_an_id_that_nearly_names_an_image(tmp_path, named):
    folder = write_kaggle(tmp_path / "k", {"k0.jpg": [], "k1.jpg": [], "k2.jpg": []})
    (folder / "train.csv").write_text(f"ImageId,ClassId,EncodedPixels\n{named},3,1 5\n")
    index = build_index(reader(folder), "skip")
    assert state(index) == {"k0.jpg": "clean", "k2.jpg": "clean"} and index.unknown == ("k1.jpg",)
    assert f"the row names {named}, but the folder has k1.jpg: correct the id" in index.problems[0].sentence


def old_table(folder, rows, absent=""):
    lines = [f"{name}_{number},{rows.get((name, str(number)), absent)}" for name in STRIPS for number in range(1, 5)]
    (folder / "train.csv").write_text("\n".join(["ImageId_ClassId,EncodedPixels", *lines, ""]))
    return lines


def test_an_old_table_that_states_absence_must_have_all_rows(tmp_path):
    folder = write_kaggle(tmp_path / "k")
    rows = {tuple(line.split(",")[:2]): line.split(",")[2] for line in rows_of(STRIPS)}
    lines = old_table(folder, rows)
    text = "\n".join(["ImageId_ClassId,EncodedPixels", *lines[:-6], ""])  # f.jpg is gone, two rows of e.jpg
    (folder / "train.csv").write_text(text)
    index = build_index(reader(folder), "skip")
    assert index.unknown == ("e.jpg", "f.jpg") and state(index)["c.jpg"] == "clean"
    assert [problem.cause for problem in index.problems] == ["row missing"] * 2
    assert "class 3, 4" in index.problems[0].sentence
    masks = [line for line in lines if not line.endswith(",")]  # rows without masks were left out on purpose
    (folder / "train.csv").write_text("\n".join(["ImageId_ClassId,EncodedPixels", *masks, ""]))
    assert state(build_index(reader(folder)))["e.jpg"] == "clean"


def test_an_old_table_keeps_what_its_own_rows_say_after_damage(tmp_path):
    folder = write_kaggle(tmp_path / "k")
    rows = {tuple(line.split(",")[:2]): line.split(",")[2] for line in rows_of(STRIPS)}
    lines = old_table(folder, rows)
    text = "\n".join(["ImageId_ClassId,EncodedPixels", *lines[:13], '"', *lines[13:], ""])
    (folder / "train.csv").write_text(text)
    index = build_index(reader(folder), "skip")
    assert index.unknown == ("d.jpg", "e.jpg", "f.jpg")
    assert state(index) == {"a.jpg": "whole", "b.jpg": "whole", "c.jpg": "clean"}


def test_two_rows_in_one_line_leave_no_image_clean(tmp_path):
    folder = write_kaggle(tmp_path / "k")
    text = (folder / "train.csv").read_text()
    (folder / "train.csv").write_text(text.replace("\nf.jpg", "f.jpg"))
    index = build_index(reader(folder), "skip")
    assert {"c.jpg", "e.jpg", "f.jpg"} <= set(index.unknown) and not index.clean().any()


def test_annotations_whose_image_cannot_be_known(tmp_path):
    content = make_coco(tmp_path, lambda box: rle_of(box, True))
    source = lambda: COCOReader(tmp_path / "images", tmp_path / "coco.json")

    def write(number, image_id):
        changed = json.loads(json.dumps(content))
        changed["annotations"][number]["image_id"] = image_id
        (tmp_path / "coco.json").write_text(json.dumps(changed))

    write(3, "11")  # b.jpg's only annotation
    index = build_index(source(), "skip")
    assert index.unknown == ("b.jpg",) and state(index)["c.jpg"] == "clean" and index.problems[0].cause == "image id"
    for strange in (None, 99, [], True):
        write(3, strange)
        index = build_index(source(), "skip")
        assert index.unknown == ("b.jpg", "c.jpg", "e.jpg") and not index.complete.any(), strange


def test_coco_images_that_share_an_id_or_a_file(tmp_path):
    content = make_coco(tmp_path, lambda box: rle_of(box, True))
    for change, lost in (({"id": 10}, ("a.jpg", "b.jpg")), ({"file_name": "a.jpg"}, ())):
        changed = json.loads(json.dumps(content))
        changed["images"][1].update(change)
        (tmp_path / "coco.json").write_text(json.dumps(changed))
        index = build_index(COCOReader(tmp_path / "images", tmp_path / "coco.json"), "skip")
        assert set(lost) <= set(index.unknown) and state(index).get("a.jpg", "part") == "part"


def test_supervisely_siblings(tmp_path):
    make_supervisely(tmp_path)
    (tmp_path / "train/ann/c.jpg.json").rename(tmp_path / "train/ann/C.jpg.json")
    (tmp_path / "train/ann/e.jpg.json").write_text('{"objects": [], "objects": []}')
    index = build_index(SuperviselyReader(tmp_path), "skip")
    assert index.unknown == ("c.jpg", "e.jpg") and not index.clean().any()
    causes = {problem.cause: problem.sentence for problem in index.problems}
    assert set(causes) == {"annotation missing", "key twice", "image missing"}
    assert "it has c.jpg: name the file c.jpg.json" in causes["image missing"]


def test_label_siblings(tmp_path):
    make_labels(tmp_path, lambda label, path: Image.fromarray(label).save(path))
    labels = tmp_path / "annotations"
    (labels / "c.png").rename(labels / "C.png")
    Image.fromarray(np.zeros((40, 200), np.uint8)).save(labels / "e.bmp")  # a second label of e
    write_image(tmp_path / "images/a.png")  # a second image of a's label
    index = build_index(LabelPNGReader(tmp_path / "images", labels), "skip")
    assert set(index.unknown) == {"a.jpg", "a.png", "c.jpg", "e.jpg"} and not index.clean().any()
    assert any("it has C.png" in problem.sentence for problem in index.problems)


def test_scan_split_and_convert_say_it(tmp_path, capsys, caplog):
    folder = write_kaggle(tmp_path / "k")
    (folder / "train.csv").write_text((folder / "train.csv").read_text().replace("f.jpg,3,", "f.jpg,3 "))
    (folder / "images/notes.txt").write_text("")
    run("scan", folder, "--out", tmp_path / "scan", *SIZE)
    out = capsys.readouterr().out
    summary = json.loads((tmp_path / "scan/scan.json").read_text())
    assert (summary["images"], summary["clean"], summary["unknown"]) == (5, 2, 1)
    assert summary["unknown_images"] == ["f.jpg"] and "2 clean, 1 unknown" in out and "notes.txt" in out
    assert summary["unread"] == [str(folder / "images/notes.txt")]
    assert "notes.txt" in (tmp_path / "scan/scan.html").read_text()
    run("split", folder, "--out", tmp_path / "split.csv", "--on-invalid", "skip", "--folds", 2, *SIZE)
    assert "1 images are unknown and in no split: f.jpg" in capsys.readouterr().out
    assert "f.jpg" not in (tmp_path / "split.csv").read_text()
    run("convert", folder, "--to", "coco", "--out", tmp_path / "c", "--on-invalid", "skip", *SIZE)
    assert "1 left out as unknown" in capsys.readouterr().out
    assert len(build_index(guess_reader(tmp_path / "c"))) == 5 and "1 image is unknown" in caplog.text


def test_nothing_whole_is_nothing_to_convert(tmp_path):
    folder = write_kaggle(tmp_path / "k")
    with open(folder / "train.csv", "a") as table:
        table.write('"')
    with pytest.raises(UserError, match="every image of .* may lack masks"):
        run("convert", folder, "--to", "coco", "--out", tmp_path / "c", "--on-invalid", "skip", *SIZE)


def litter(folder: Path) -> None:
    for name in (".DS_Store", "._a.jpg", "Thumbs.db", "desktop.ini"):
        (folder / name).write_text("")
    (folder / "more").mkdir()
    (folder / "read me.txt").write_text("")


@pytest.mark.parametrize("kind", ["kaggle", "coco", "labels", "supervisely"])
def test_what_was_not_read_is_named(tmp_path, kind):
    if kind == "kaggle":
        folders = [write_kaggle(tmp_path) / "images"]
        source = reader(tmp_path)
    elif kind == "coco":
        make_coco(tmp_path, lambda box: rle_of(box, True))
        folders = [tmp_path / "images"]
        write_image(tmp_path / "images/unlisted.jpg")
        source = COCOReader(tmp_path / "images", tmp_path / "coco.json")
    elif kind == "labels":
        make_labels(tmp_path, lambda label, path: Image.fromarray(label).save(path))
        folders = [tmp_path / "annotations", tmp_path / "images"]
        source = LabelPNGReader(tmp_path / "images", tmp_path / "annotations")
    else:
        make_supervisely(tmp_path)
        folders = [tmp_path / "train/img", tmp_path / "train/ann", tmp_path]
        source = SuperviselyReader(tmp_path)
    for folder in folders:
        litter(folder)
    index = build_index(source)
    expected = [f"{folder}/{name}" for folder in folders for name in ("more/", "read me.txt")]
    expected += [f"{tmp_path}/images/unlisted.jpg"] if kind == "coco" else []
    assert sorted(index.unread) == sorted(expected)
    assert any(f"{len(expected)} files and folders were not read" in sentence for sentence in remarks(index))
