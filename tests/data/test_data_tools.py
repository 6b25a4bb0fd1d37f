"""`tools/prepare_data.py`: scan, split, synth."""

import csv
import json
import re
from collections import Counter

import numpy as np
import prepare_data
import pytest
from PIL import Image

from helpers.browsing import browse, chromium  # noqa: F401
from helpers.data_formats import make_supervisely
from helpers.data_sets import OBJECTS, STRIPS, noise, reader, write_kaggle
from sam2_lora_ext.data.dataset import SeverstalRawDataset
from sam2_lora_ext.data.guess_format import guess_reader
from sam2_lora_ext.data.index import build_index
from sam2_lora_ext.data.items import read_split
from sam2_lora_ext.data.synthetic import write_strips
from sam2_lora_ext.utils.errors import UserError

SIZE = ["--size", "200x40", "--quiet"]


def run(*arguments):
    prepare_data.main([str(argument) for argument in arguments])


def test_scan(tmp_path, capsys):
    folder = write_kaggle(tmp_path / "k")
    noise(0).convert("RGB").save(folder / "images/g.jpg")
    noise(0).convert("RGB").save(folder / "images/h.jpg")
    (folder / "images/bad.jpg").write_bytes(b"")
    with open(folder / "train.csv", "a") as file:
        file.write("gone<b>.jpg,1,1 5\n")
    run("scan", folder, "--out", tmp_path / "out", *SIZE)
    summary = json.loads((tmp_path / "out/scan.json").read_text())
    assert (summary["images"], summary["clean"], summary["masks"], summary["objects"]) == (8, 4, 6, OBJECTS)
    assert summary["masks_per_class"] == {"1": 1, "2": 1, "3": 3, "4": 1}
    assert summary["objects_per_class"] == {"1": 2, "2": 1, "3": 5, "4": 1}
    assert summary["combinations"] == {"1+3": 1, "2+3": 1, "3": 1, "4": 1, "clean": 4}
    assert (
        summary["duplicates"]["exact"] == [["g.jpg", "h.jpg"]] and ["g.jpg", "h.jpg"] in summary["duplicates"]["near"]
    )
    assert summary["object_area"]["3"]["min"] == 1 and summary["object_area"]["2"]["max"] == 400
    assert summary["sizes"] == {"200x40": 8} and summary["modes"] == {"RGB": 8}
    assert [(p["cause"], p["row"]) for p in summary["problems"]] == [("image empty", None), ("image missing", 8)]
    page = (tmp_path / "out/scan.html").read_text()
    assert page.count("<figure>") == 8 and "gone&lt;b&gt;.jpg" in page and "<b>" not in page and 'src="http' not in page
    assert "2 problems" in capsys.readouterr().out
    with pytest.raises(UserError, match="--force"):
        run("scan", folder, "--out", tmp_path / "out", *SIZE)
    run("scan", folder, "--out", tmp_path / "out", "--force", *SIZE)


def test_scan_of_real_strips(real_data, tmp_path):
    run("scan", real_data / "severstal", "--out", tmp_path, "--quiet", "--force")
    summary = json.loads((tmp_path / "scan.json").read_text())
    assert (summary["images"], summary["clean"], summary["masks"], summary["objects"]) == (9, 3, 9, 19)
    assert summary["masks_per_class"] == {"1": 2, "2": 2, "3": 3, "4": 2} and summary["problems"] == []
    assert summary["black_share"]["max"] == 0.85  # 1,360 of 1,600 columns


def test_scan_says_which_copies_have_other_masks(tmp_path):
    folder = write_kaggle(tmp_path / "k", {"a.jpg": STRIPS["a.jpg"], "f.jpg": STRIPS["f.jpg"], "c.jpg": []})
    for copy, original in (("a2", "a"), ("c2", "c"), ("f2", "f"), ("f3", "f")):
        (folder / f"images/{copy}.jpg").write_bytes((folder / f"images/{original}.jpg").read_bytes())
    rows = (folder / "train.csv").read_text()
    f = next(line for line in rows.splitlines() if line.startswith("f.jpg"))
    copies = [f.replace("f.jpg", "f2.jpg"), f.replace("f.jpg,3", "f3.jpg,2")]
    (folder / "train.csv").write_text(rows + "\n".join(copies) + "\n")
    run("scan", folder, "--out", tmp_path / "out", *SIZE)
    duplicates = json.loads((tmp_path / "out/scan.json").read_text())["duplicates"]
    assert duplicates["exact"] == [["a.jpg", "a2.jpg"], ["c.jpg", "c2.jpg"], ["f.jpg", "f2.jpg", "f3.jpg"]]
    assert duplicates["exact_with_other_masks"] == [["a.jpg", "a2.jpg"], ["f.jpg", "f2.jpg", "f3.jpg"]]


def test_scan_finds_damage_inside_a_file(tmp_path):
    folder = write_kaggle(tmp_path / "k", {"a.png": STRIPS["a.jpg"], "b.png": []})
    data = bytearray((folder / "images/b.png").read_bytes())
    data[len(data) // 2] ^= 255
    (folder / "images/b.png").write_bytes(data)
    run("scan", folder, "--out", tmp_path / "out", *SIZE)
    summary = json.loads((tmp_path / "out/scan.json").read_text())
    assert summary["problems_per_cause"] == {"image damaged": 1}
    with pytest.raises(UserError, match="image damaged"):
        build_index(reader(folder, full_check=True))


def test_black_share(tmp_path):
    folder = write_kaggle(tmp_path / "k", {"a.png": [], "b.png": []})
    pixels = np.full((40, 200), 90, np.uint8)
    pixels[:, :50] = 3
    Image.fromarray(pixels).save(folder / "images/a.png")
    run("scan", folder, "--out", tmp_path / "out", *SIZE)
    assert json.loads((tmp_path / "out/scan.json").read_text())["black_share"] == {
        "mean": 0.125,
        "max": 0.25,
        "images_above_10_percent": 1,
    }


def test_split_command(tmp_path, capsys):
    folder = write_kaggle(tmp_path / "k")
    out = tmp_path / "split.csv"
    run("split", folder, "--out", out, "--shares", "train=0.5,val=0.5", *SIZE)
    with open(out, newline="") as file:
        table = {row["image"]: row["split"] for row in csv.DictReader(file)}
    assert sorted(table) == sorted(STRIPS) and Counter(table.values()) == {"train": 3, "val": 3}
    assert "clean" in capsys.readouterr().out
    with pytest.raises(UserError, match="--force"):
        run("split", folder, "--out", out, *SIZE)
    for name in ("x", "y"):  # copies of one image
        (folder / f"images/{name}.jpg").write_bytes((folder / "images/a.jpg").read_bytes())
    run("split", folder, "--out", out, "--folds", 3, "--force", *SIZE)
    folds = [read_split(out, f"fold{number}") for number in range(3)]
    assert sorted(sum(folds, [])) == sorted([*STRIPS, "x.jpg", "y.jpg"])
    assert any({"a.jpg", "x.jpg", "y.jpg"} <= set(fold) for fold in folds)


def test_split_as_given(tmp_path):
    for split in ("train_split", "val_split", "test_split"):
        make_supervisely(tmp_path / "s", split)
    run("split", tmp_path / "s", "--as-given", "--out", tmp_path / "split.csv", *SIZE)
    assert read_split(tmp_path / "split.csv", "val") == [f"val_split/img/{name}" for name in sorted(STRIPS)]
    index = build_index(guess_reader(tmp_path / "s"))
    assert set(read_split(tmp_path / "split.csv", ["train", "val", "test"])) == set(index.names())
    with pytest.raises(UserError, match="several split folders"):
        run("split", tmp_path / "s/val_split", "--as-given", "--out", tmp_path / "other.csv", *SIZE)
    raw = SeverstalRawDataset(guess_reader(tmp_path / "s"), split="val", training=False)  # and without a csv
    names = {raw.get_video(item)[0].video_name for item in range(len(raw))}
    assert names == {f"val_split/img/{name}" for name in STRIPS}
    with pytest.raises(UserError, match="no split 'valid'; it has test, train, val"):
        SeverstalRawDataset(guess_reader(tmp_path / "s"), split="valid")


def test_synth(tmp_path):
    run("synth", "--out", tmp_path / "s", "--count", 3, "--seed", 5, "--quiet")
    index = build_index(guess_reader(tmp_path / "s"))
    assert len(index) == 3 and index.sizes.tolist() == [[256, 1600]] * 3
    for wrong in (["--count", 0], ["--seed", -1], ["--clean-share", "nan"]):
        with pytest.raises(SystemExit):
            run("synth", "--out", tmp_path / "t", *wrong)
    with pytest.raises(UserError, match="--force"):
        run("synth", "--out", tmp_path / "s", "--count", 2, "--quiet")
    run("synth", "--out", tmp_path / "s", "--count", 2, "--seed", 6, "--clean-share", 0, "--force", "--quiet")
    index = build_index(guess_reader(tmp_path / "s"))
    assert len(index) == 2 and not index.clean().any()  # no image of the old set, which would be a clean strip now
    (tmp_path / "s/train.csv").unlink()
    with pytest.raises(UserError, match="exists already"):
        write_strips(tmp_path / "s", 1, progress=False)
    (tmp_path / "empty").mkdir()
    run("synth", "--out", tmp_path / "empty", "--count", 1, "--quiet")


def test_command_line(tmp_path, run_python, repository):
    done = run_python(
        [repository / "tools/prepare_data.py", "scan", tmp_path / "gone", "--out", tmp_path / "o"], cwd=tmp_path
    )
    assert done.returncode == 2 and done.stderr.startswith("error: there is no") and "Traceback" not in done.stderr
    done = run_python([repository / "tools/prepare_data.py", "convert", "--help"], cwd=tmp_path)
    assert done.returncode == 0 and "label_png" in done.stdout


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1200])
def test_scan_page_in_a_browser(chromium, tmp_path, width):
    """No picture missing, nothing wider than the window; 390 is a frame, for no window is so narrow."""
    folder = write_kaggle(tmp_path / ("k" * 60 + "/" + "long_name_" * 12))
    (folder / ("images/" + "bad" * 50 + ".jpg")).write_bytes(b"")
    run("scan", folder, "--out", tmp_path / "out", *SIZE)
    page = (tmp_path / "out/scan.html").read_text()
    probe = """<script>addEventListener("load", () => { parent.document.title = JSON.stringify([
      document.documentElement.scrollWidth - document.documentElement.clientWidth,
      [...document.images].filter(image => !image.naturalWidth).length, document.images.length]) })</script>"""
    (tmp_path / "out/page.html").write_text(page.replace("</body>", probe + "</body>"))
    (tmp_path / "out/frame.html").write_text(
        f'<!doctype html><title></title><iframe src="page.html" width="{width}" height="800"></iframe>'
    )
    done = browse(
        chromium,
        tmp_path / "out/frame.html",
        "--allow-file-access-from-files",
        "--virtual-time-budget=5000",
        "--dump-dom",
    )
    assert json.loads(re.search(r"<title>(.*?)</title>", done.stdout)[1]) == [0, 0, 6]
