"""Inputs that earlier versions could not read: labels of 0 and 255 or in colour, 16-bit images; now in every tool."""

import json

import evaluate
import numpy as np
import prepare_data
import pytest
import track_strip
from PIL import Image

from sam2_lora_ext.data.guess_format import guess_reader
from sam2_lora_ext.data.index import build_index

CASES = {  # folder: arguments of a tool for it, image, areas by class
    "deep1": (["--bits", "16"], "a.png", {1: 10_000}),
    "bin255": (["--classes", "255=defect"], "000.png", {255: 900}),
    "cvat": (["--colors", "1=250/50/83,2=51/221/255", "--classes", "pit,crack"], "a.png", {1: 900, 2: 1_200}),
}


def run(*arguments: object) -> None:
    prepare_data.main([str(argument) for argument in arguments])


def areas(index) -> dict[int, int]:
    return {number: int(runs[:, 1].sum()) for number, runs in index.masks(0)}


@pytest.mark.parametrize("name", CASES)
def test_scan_split_and_convert_read_the_case(shared_cases, tmp_path, name):
    options, image, wanted = CASES[name]
    given = [shared_cases / name, *options, "--quiet"]
    run("scan", *given, "--out", tmp_path / "scan")
    summary = json.loads((tmp_path / "scan/scan.json").read_text())
    assert summary["images"] == 1 and summary["problems"] == [] and summary["objects"] == len(wanted)
    assert {int(key): value["max"] for key, value in summary["object_area"].items() if value} == wanted
    run("split", *given, "--shares", "train=1", "--out", tmp_path / "split.csv")
    assert (tmp_path / "split.csv").read_text() == f"image,split\n{image},train\n"
    run("convert", *given, "--to", "coco", "--out", tmp_path / "coco")
    assert areas(build_index(guess_reader(tmp_path / "coco"))) == wanted


@pytest.mark.parametrize("name", CASES)
def test_evaluate_and_track_strip_read_the_case(shared_cases, nano_base, tmp_path, name, capsys):
    options, image, wanted = CASES[name]
    how = ["--max-clicks", "1", "--pictures", "1", "--out", str(tmp_path / "out")]
    evaluate.main(["--checkpoint", str(nano_base), "--data", str(shared_cases / name), *options, *how])
    record = json.loads((tmp_path / "out/evaluation.json").read_text())
    rows = record["models"][0]["objects"]
    assert [row["areas"]["1click"][2] for row in rows] == list(wanted.values())
    file = shared_cases / name / "images" / image
    extra = options if name == "deep1" else []
    where = ["--image", str(file), "--click", "30,30", "--out", str(tmp_path / "strip.png")]
    track_strip.main(["--checkpoint", str(nano_base), *where, "--device", "cpu", *extra])
    shown = np.asarray(Image.open(tmp_path / "strip.png"))
    stored = np.asarray(Image.open(file))
    wide = stored >> 8 if stored.dtype == np.uint16 else stored
    assert (shown[0, 0] == wide[0, 0]).all()


def test_deep_images_give_the_numbers_of_their_8_bit_twins(shared_cases, nano_base, tmp_path):
    twin = tmp_path / "twin"
    for part in ("images", "masks"):
        (twin / part).mkdir(parents=True)
    deep = np.asarray(Image.open(shared_cases / "deep1/images/a.png"))
    Image.fromarray((deep >> 8).astype(np.uint8)).save(twin / "images/a.png")
    (twin / "masks/a.png").write_bytes((shared_cases / "deep1/masks/a.png").read_bytes())
    found = []
    for number, folder in enumerate((shared_cases / "deep1", twin)):
        how = ["--max-clicks", "2", "--pictures", "0", "--out", str(tmp_path / str(number))]
        evaluate.main(["--checkpoint", str(nano_base), "--data", str(folder), *how])
        record = json.loads((tmp_path / str(number) / "evaluation.json").read_text())
        found.append([row["areas"] for row in record["models"][0]["objects"]])
    assert found[0] == found[1] and len(found[0]) == 1
