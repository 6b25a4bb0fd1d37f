"""tools/inspect_strips.py as a user runs it: its files are read back equal, and it resumes where it stopped."""

import csv
import json
import shutil
import threading
import time
from pathlib import Path

import inspect_strips
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_utils

from helpers.class_models import DECISION, make_prompts, make_strip, write_merged
from sam2_lora_ext.adapters.decision import Decision
from sam2_lora_ext.data.coco import COCOReader
from sam2_lora_ext.data.index import AnnotationIndex, collect
from sam2_lora_ext.data.kaggle import KaggleReader
from sam2_lora_ext.data.label_png import LabelPNGReader
from sam2_lora_ext.data.rle import decode_runs
from sam2_lora_ext.data.supervisely import SuperviselyReader
from sam2_lora_ext.inspection.journal import Journal
from sam2_lora_ext.inspection.segmenter import load_segmenter
from sam2_lora_ext.utils.errors import UserError


@pytest.fixture(scope="module")
def steel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Merged weights with class prompts."""
    return write_merged(tmp_path_factory.mktemp("merged") / "steel.pt", make_prompts(decision=DECISION))


@pytest.fixture(scope="module")
def strip_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five strips of two sizes, and a damaged one."""
    folder = tmp_path_factory.mktemp("strips")
    for number in range(5):
        Image.fromarray(make_strip(64, 200 if number % 2 else 300, number)).save(folder / f"strip {number}.png")
    return folder


def inspect(steel: Path, *args: object) -> None:
    inspect_strips.main(["--checkpoint", str(steel), "--device", "cpu", *map(str, args)])


def rows_of(out: Path) -> list[dict[str, str]]:
    with open(out / "inspection.csv", newline="") as file:
        return list(csv.DictReader(file))


def class_masks(index: AnnotationIndex, class_ids: tuple[int, ...]) -> dict[str, np.ndarray]:
    """name -> bool [C, H, W], the union of all objects of a class."""
    found = {}
    for image in range(len(index)):
        height, width = index.sizes[image].tolist()
        masks = np.zeros((len(class_ids), height, width), dtype=bool)
        for number, runs in index.masks(image):
            masks[class_ids.index(number)] |= decode_runs(runs, height, width) > 0
        found[Path(index.name(image)).name] = masks
    return found


def test_every_format_reads_back_equal(steel: Path, strip_files: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    inspect(steel, strip_files, "--out", out, "--formats", "all")
    said = capsys.readouterr().out
    assert "5 strips inspected" in said and "not fitted" not in said
    segmenter = load_segmenter(None, steel, device="cpu")
    names, ids = dict(enumerate(segmenter.prompts.class_names, 1)), segmenter.prompts.class_ids
    wanted, objects = {}, {}
    for path in sorted(strip_files.iterdir()):
        found = segmenter(np.array(Image.open(path)))
        wanted[path.name], objects[path.name] = found.masks.numpy(), found.objects
    assert sum(map(len, objects.values())) > 5
    readers = {
        "label_png": LabelPNGReader(strip_files, out / "label_png/annotations", classes=names),
        "coco": COCOReader(strip_files, out / "coco/annotations.json"),
        "supervisely": SuperviselyReader(out / "supervisely", classes=names),
        "kaggle": KaggleReader(strip_files, out / "submission.csv", classes=names, size=None),
    }
    for name, reader in readers.items():
        index = collect(reader)
        assert not index.problems and bool(index.complete.all()), name
        assert index.class_names == names, name
        found = class_masks(index, ids)
        assert found.keys() == wanted.keys() and all(np.array_equal(found[key], wanted[key]) for key in wanted), name

    content = json.loads((out / "coco/annotations.json").read_text())
    files = {image["id"]: image["file_name"] for image in content["images"]}
    entries = [(files[a["image_id"]], a["category_id"], a["area"], a["score"]) for a in content["annotations"]]
    assert sorted(entries) == sorted(
        (name, row.class_id, row.area, round(row.score, 6)) for name, rows in objects.items() for row in rows
    )
    assert all(mask_utils.area(a["segmentation"]) == a["area"] for a in content["annotations"])  # the reference's own
    polygons = json.loads((out / "coco/polygons.json").read_text())["annotations"]
    assert polygons and all(len(part) >= 6 for a in polygons for part in a["segmentation"])

    for row in rows_of(out):
        own = objects[row["image"]]
        assert row["decision"] == ("+".join(dict.fromkeys(names[o.class_id] for o in own)) or "clean")
        assert [int(row[f"{name}_objects"]) for name in names.values()] == [
            sum(o.class_id == number for o in own) for number in names
        ]
        assert (out / "overlays" / f"{Path(row['image']).stem}.jpg").exists() == bool(own)


def test_it_goes_on_where_it_was_stopped(steel: Path, strip_files: Path, tmp_path: Path, capsys) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    inspect(steel, strip_files, "--out", whole)
    files = sorted(strip_files.iterdir())
    inspect(steel, *files[:2], "--out", parts)
    with open(parts / "records.jsonl", "ab") as file:  # an incomplete line, as after a kill
        file.write(b'{"name": "strip 3.png", "pa')
    capsys.readouterr()
    inspect(steel, strip_files, "--out", parts)
    said = capsys.readouterr().out
    assert "3 strips inspected" in said and "2 strips were already in" in said
    for name in ("submission.csv", "coco/annotations.json", "coco/polygons.json"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes()
    strip = [{key: value for key, value in row.items() if key != "milliseconds"} for row in rows_of(whole)]
    assert strip == [{key: value for key, value in row.items() if key != "milliseconds"} for row in rows_of(parts)]
    inspect(steel, strip_files, "--out", parts)
    assert "strips inspected" not in capsys.readouterr().out  # nothing is left to do


def test_one_bad_image_never_ends_it(steel: Path, strip_files: Path, tmp_path: Path, capsys) -> None:
    folder, out = tmp_path / "mixed", tmp_path / "out"
    shutil.copytree(strip_files, folder)
    bad = folder / "strip 1.png"
    good = bad.read_bytes()
    bad.write_bytes(good[: len(good) // 2])
    (folder / "strip 2.png").write_bytes(b"")
    inspect(steel, folder, "--out", out)
    said = capsys.readouterr().out
    assert "3 strips inspected" in said and "2 could not be inspected" in said
    by_name = {row["image"]: row for row in rows_of(out)}
    assert by_name["strip 1.png"]["decision"] == "unknown" and by_name["strip 1.png"]["error"]
    assert "strip 1.png" not in (out / "submission.csv").read_text()
    bad.write_bytes(good)
    inspect(steel, folder, "--out", out)
    assert "1 strips inspected" in capsys.readouterr().out
    assert {row["image"]: row["decision"] for row in rows_of(out)}["strip 1.png"] != "unknown"

    with pytest.raises(UserError, match="none of 1 images"):
        inspect(steel, folder / "strip 2.png", "--out", tmp_path / "other")


def test_a_line_that_drops_files(steel: Path, strip_files: Path, tmp_path: Path, capsys) -> None:
    folder, out = tmp_path / "line", tmp_path / "out"
    folder.mkdir()
    files = sorted(strip_files.iterdir())
    shutil.copy(files[0], folder)

    def drop() -> None:
        time.sleep(1)
        content = files[1].read_bytes()
        with open(folder / files[1].name, "wb") as file:  # written slowly, as over a network
            for part in range(3):
                file.write(content[part * len(content) // 3 : (part + 1) * len(content) // 3])
                file.flush()
                time.sleep(0.3)
        (folder / "notes.txt").write_text("no image")

    thread = threading.Thread(target=drop)
    thread.start()
    inspect(steel, "--watch", folder, "--idle", 4, "--out", out)
    thread.join()
    assert {row["image"]: row["error"] for row in rows_of(out)} == {file.name: "" for file in files[:2]}
    assert "2 strips inspected" in capsys.readouterr().out
    assert len(json.loads((out / "coco/annotations.json").read_text())["images"]) == 2


def test_mistakes_are_sentences(steel: Path, strip_files: Path, tmp_path: Path) -> None:
    first = sorted(strip_files.iterdir())[0]
    out = tmp_path / "out"
    for args, match in (
        (["--out", out], "give either image files or folders"),
        ([first, "--watch", strip_files, "--out", out], "give either image files"),
        ([first, "--idle", 3, "--out", out], "--idle is only for --watch"),
        ([tmp_path / "none.png", "--out", out], "there is no"),
        ([strip_files, "--out", strip_files], "choose another folder"),
        ([first, "--out", out, "--formats", "png"], "--formats must be"),
        ([first, "--out", out, "--device", "tpu"], "--device"),
        ([first, "--out", out, "--overlap", 128], "cannot share"),
    ):
        with pytest.raises(UserError, match=match):
            inspect(steel, *args)
    other = tmp_path / "other" / first.name
    other.parent.mkdir()
    shutil.copy(first, other)
    with pytest.raises(UserError, match="would have the same names"):
        inspect(steel, first, other, "--out", out)
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "thesis.doc").write_text("precious")
    with pytest.raises(UserError, match="is not empty"):
        inspect(steel, first, "--out", stranger, "--force")
    inspect(steel, first, "--out", out)
    with pytest.raises(UserError, match="another overlap"):
        inspect(steel, first, "--out", out, "--overlap", 8)
    inspect(steel, first, "--out", out, "--overlap", 8, "--force")
    held = Journal(tmp_path / "held", {}, False)
    with pytest.raises(UserError, match="another inspection writes"):
        Journal(tmp_path / "held", {}, False)
    held.file.close()
    own = (out / "records.jsonl").read_text().splitlines()
    for lines, match in (
        (["[1]"], "not a journal of an inspection"),
        (["my notes", "precious"], "not a journal of an inspection"),
        ([own[0], own[1].replace('"objects": [', '"objects": [7, ')], "not a record"),
        ([own[0], own[1].replace('"width": ', '"width": 0.')], "invalid values"),
    ):
        text = "\n".join(lines) + "\n"
        (tmp_path / "hostile").mkdir(exist_ok=True)
        (tmp_path / "hostile/records.jsonl").write_text(text)
        with pytest.raises(UserError, match=match):
            inspect(steel, first, "--out", tmp_path / "hostile", "--overlap", 8)
        assert (tmp_path / "hostile/records.jsonl").read_text() == text


def test_unfitted_and_overlapping_classes_are_said(tmp_path: Path, strip_files: Path, capsys) -> None:
    first = sorted(strip_files.iterdir())[0]
    mixed = write_merged(tmp_path / "mixed.pt", make_prompts(decision=Decision.default(3, exclusive=False)))
    inspect(mixed, first, "--out", tmp_path / "out")
    assert "thresholds are not fitted" in capsys.readouterr().out and not (tmp_path / "out/label_png").exists()
    with pytest.raises(UserError, match="overlapping classes"):
        inspect(mixed, first, "--out", tmp_path / "other", "--formats", "label_png")
