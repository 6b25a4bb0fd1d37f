"""Malicious or unusual files: one sentence, never a crash, a hang or exhausted memory."""

import base64
import io
import json
import os
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from helpers.data_formats import make_coco, make_supervisely, rle_of
from helpers.data_sets import STRIPS, reader, write_image, write_kaggle
from sam2_lora_ext.data.guess_format import guess_reader
from sam2_lora_ext.data.index import build_index, collect
from sam2_lora_ext.data.records import MOST_CLASSES, class_table
from sam2_lora_ext.data.supervisely import SuperviselyReader
from sam2_lora_ext.utils.errors import UserError


def causes(reader_):
    return [problem.cause for problem in collect(reader_).problems]


def test_a_pipe_and_a_device_are_not_waited_for(tmp_path):
    folder = write_kaggle(tmp_path / "k")
    os.mkfifo(folder / "images/pipe.jpg")
    (folder / "images/zero.png").symlink_to("/dev/zero")
    assert causes(reader(folder)) == ["not a file", "not a file"]


def test_a_name_that_is_no_text_is_said_and_left_out(tmp_path, run_python, repository):
    folder = write_kaggle(tmp_path / "k")
    os.rename(folder / "images/c.jpg", os.fsencode(folder / "images") + b"/\xff\xfe.jpg")
    assert causes(reader(folder)) == ["file name"]
    tool = [repository / "tools/prepare_data.py"]
    more = ["--size", "200x40", "--quiet", "--out"]
    run_python([*tool, "scan", folder, *more, tmp_path / "scan"], check=True)
    assert "udcff" in (tmp_path / "scan/scan.html").read_text() and "udcff" in (tmp_path / "scan/scan.json").read_text()
    done = run_python([*tool, "split", folder, *more, tmp_path / "split.csv"])
    assert done.returncode == 2 and "not UTF-8" in done.stderr and "Traceback" not in done.stderr
    run_python([*tool, "split", folder, "--on-invalid", "skip", *more, tmp_path / "split.csv"], check=True)
    assert (tmp_path / "split.csv").read_text().count("\n") == len(STRIPS)


def test_a_bitmap_that_unpacks_to_gigabytes(tmp_path):
    make_supervisely(tmp_path)
    path = tmp_path / "train/ann/a.jpg.json"
    annotation = json.loads(path.read_text())
    packer, data = zlib.compressobj(9), io.BytesIO()
    for _ in range(64):
        data.write(packer.compress(bytes(1 << 22)))
    data.write(packer.flush())
    annotation["objects"][0]["bitmap"]["data"] = base64.b64encode(data.getvalue()).decode()
    path.write_text(json.dumps(annotation))
    tracemalloc.start()
    found = causes(SuperviselyReader(tmp_path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == ["bitmap damaged"] and peak < 160e6  # of 268e6: the PNG's first 67e6, and a copy of them


def test_class_numbers_have_an_end(tmp_path):
    assert max(class_table({MOST_CLASSES: "x"})) == MOST_CLASSES
    for wrong in ({MOST_CLASSES + 1: "x"}, {0: "x"}, {"a": "x"}, {1: "\ud800"}, []):
        with pytest.raises(UserError, match="class"):
            class_table(wrong)
    content = make_coco(tmp_path / "c", lambda box: rle_of(box, True))
    for key, items in (("id", content["categories"]), ("category_id", content["annotations"])):
        for item in items:
            item[key] *= 10**9
    (tmp_path / "c/coco.json").write_text(json.dumps(content))
    index = build_index(guess_reader(tmp_path / "c"))  # too large for numbers of classes: their order instead
    assert index.class_names == {number: f"defect_{number}" for number in range(1, 5)}
    make_supervisely(tmp_path / "s")
    for path in (tmp_path / "s/train/ann").iterdir():
        path.write_text(path.read_text().replace('"defect_', '"defect_0'))
    titles = [f"defect_0{number}" for number in (4, 3, 2, 1)]
    (tmp_path / "s/meta.json").write_text(json.dumps({"classes": [{"title": title} for title in titles]}))
    assert SuperviselyReader(tmp_path / "s").class_names == {4: titles[0], 3: titles[1], 2: titles[2], 1: titles[3]}
    (tmp_path / "s/meta.json").write_text(json.dumps({"classes": [{"title": "a" + "9" * 5000}, {"title": "b2"}]}))
    assert list(SuperviselyReader(tmp_path / "s").class_names) == [1, 2]


def test_a_table_that_is_none_is_named(tmp_path):
    folder = write_kaggle(tmp_path / "k")
    (folder / "train.csv").write_bytes(b"")
    (folder / "deep.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="no annotations.*what is wrong with train.csv"):
        guess_reader(folder)
    make_supervisely(tmp_path / "s")
    with pytest.raises(UserError, match="its own images"):
        guess_reader(tmp_path / "s", images=folder / "images")


def test_deep_images_are_scanned_as_they_are_seen(tmp_path, run_python, repository):
    """A 12 bit image and the same image in 8 bits: the same black share, and a near duplicate."""
    folder = write_kaggle(tmp_path / "k", {"a.png": [], "b.png": []})
    write_image(folder / "images/a.png")
    grey = np.asarray(Image.open(folder / "images/a.png").convert("L")).copy()
    grey[:, :50] = 0
    Image.fromarray(grey).save(folder / "images/a.png")
    Image.fromarray(grey.astype(np.uint16) << 4).save(folder / "images/b.png")
    command = [repository / "tools/prepare_data.py", "scan", folder, "--size", "200x40", "--out", tmp_path / "o"]
    run_python([*command, "--bits", 12], check=True)
    summary = json.loads((tmp_path / "o/scan.json").read_text())
    assert summary["modes"] == {"L": 1, "I;16": 1} and summary["duplicates"]["near"] == [["a.png", "b.png"]]
    assert summary["black_share"] == {"mean": 0.25, "max": 0.25, "images_above_10_percent": 2}
    done = run_python([*command, "--force", "--bits", 7])
    assert done.returncode == 2 and "from 8 to 16" in done.stderr
