"""A run is evaluated under its own conditions, and all differences are reported; a real small run."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import evaluate as tool
import pytest
import yaml

from helpers.small_runs import environment, launch, write_config
from sam2_lora_ext.evaluate.arguments import parse
from sam2_lora_ext.evaluate.conditions import Conditions, images_among, settle
from sam2_lora_ext.evaluate.models import candidates
from sam2_lora_ext.evaluate.text import describe
from sam2_lora_ext.report.collect import read_evaluation
from sam2_lora_ext.report.numbers import tables
from sam2_lora_ext.run.config import NAME, OLD_NAME
from sam2_lora_ext.utils.errors import UserError

QUICK = ["--max-clicks", "1", "--clean-clicks", "1", "--pictures", "1"]
OWN = ("scratch.crop_width=320", "dataset.objects=classes", "dataset.min_area=20", "dataset.bits=12")


@pytest.fixture(scope="module")
def run(nano_base: Path, strips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run by SAM 2's own launcher with a crop, objects, min_area and bits that are nobody's default."""
    folder = tmp_path_factory.mktemp("conditions") / "r8"
    config = write_config(tmp_path_factory.mktemp("config"), OWN)
    process = launch(config, environment(nano_base, strips, folder))
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output[-3000:]
    return folder


@pytest.fixture(scope="module")
def evaluated(run: Path) -> dict[str, Any]:
    """The run's evaluation without options for data or conditions."""
    tool.main(["--adapter", str(run), *QUICK, "--out", str(run.parent / "plain")])
    return json.loads((run.parent / "plain/evaluation.json").read_text())


def copy_of(run: Path, folder: Path, **changes: Any) -> Path:
    """Another run with the same adapter, whose record says otherwise: `crop`, `train_split`, `val_split`, ... ."""
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("evaluation", "checkpoints"))
    for file in (folder / NAME, folder / OLD_NAME):
        if not file.is_file():
            continue
        record = yaml.safe_load(file.read_text())
        data = record["trainer"]["data"]
        wrapper = data["val"]["datasets"][0]
        train = data["train"]["datasets"][0]["dataset"]["video_dataset"]
        if "crop" in changes:
            wrapper["transforms"][0]["width"] = wrapper["video_dataset"]["group_width"] = changes["crop"]
        for key, value in changes.items():
            phase, _, field = key.partition("_")
            if field:
                {"train": train, "val": wrapper["video_dataset"]}[phase][field] = value
        file.write_text(yaml.safe_dump(record))
    return folder


def conditions(*words: object, models: list[object]) -> Conditions:
    """The conditions of a command line, without an evaluation."""
    compared = [*map(str, models)]
    return settle(parse("", [*map(str, words), "--compare", *compared]), candidates(compared))


def said(found: Conditions) -> list[str]:
    return found.record(found.source.dataset())["sentences"]


def test_a_run_is_evaluated_as_it_was_validated(run, evaluated, strips, tmp_path):
    used = evaluated["conditions"]["used"]
    wanted = {"crop": 320, "resolution": 128, "bits": 12, "objects": "classes", "min_area": 20, "tile": None}
    wanted |= {"split": "val", "split_file": str(strips / "split.csv"), "exif": True}
    assert {key: used[key] for key in wanted} == wanted
    assert evaluated["conditions"]["sentences"] == [] and evaluated["protocol"]["crop"] == 320
    assert evaluated["models"][0]["image_size"] == 128 and evaluated["data"]["split"] == "val"
    data = ["--data", str(strips), "--split-file", str(strips / "split.csv"), "--split", "val"]
    options = ["--crop", "320", "--image-size", "128", "--objects", "classes", "--min-area", "20", "--bits", "12"]
    tool.main(["--adapter", str(run), *data, *options, *QUICK, "--out", str(tmp_path / "out")])
    again = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert again["models"][0]["objects"] == evaluated["models"][0]["objects"]
    assert again["models"][0]["metrics"] == evaluated["models"][0]["metrics"]


def test_the_conditions_stand_in_table_and_report(run, evaluated):
    line = "conditions, from the validation data of the run"
    folder = run.parent / "plain"
    for text in ((folder / "evaluation.md").read_text(), tables(read_evaluation(folder))):
        assert line in text and "crop 320, 128 px, 12 bits" in text and "objects classes of at least 20 px" in text


def test_other_conditions_are_said_everywhere(run, tmp_path, capsys):
    tool.main(["--adapter", str(run / "adapters/best"), "--crop", "none", *QUICK, "--out", str(tmp_path / "out")])
    sentence = "r8: trained at crop 320, evaluated whole"
    record = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert record["conditions"]["sentences"] == [sentence] and record["protocol"]["crop"] is None
    assert capsys.readouterr().out.count(sentence) == 2  # before the evaluation starts, and with the tables
    assert sentence in (tmp_path / "out/evaluation.md").read_text()
    assert sentence in tables(read_evaluation(tmp_path / "out"))
    assert record["models"][0]["kaggle"] is not None  # whole images have a score


@pytest.mark.parametrize(
    ("words", "sentences"),
    [
        (["--crop", "320"], []),
        (["--crop", "256"], ["trained at crop 320, evaluated at crop 256"]),
        (["--tile", "320", "--overlap", "64"], ["trained at crop 320, evaluated in tiles of 320 columns"]),
        (["--image-size", "192"], ["trained at 128 px, evaluated at 192 px"]),
        (["--bits", "16"], ["bits was 12 in its validation, evaluated with 16"]),
        (["--objects", "components"], ["objects was classes in its validation, evaluated with components"]),
        (["--min-area", "16"], ["min_area was 20 in its validation, evaluated with 16"]),
        (["--as-stored"], ["trained on images upright, evaluated on images as stored"]),
    ],
)
def test_each_condition_can_be_another_and_is_said(run, words, sentences):
    assert said(conditions(*words, models=[run])) == [f"r8: {sentence}" for sentence in sentences]


def test_a_run_is_found_from_its_parts(run):
    for inside in ("adapters/latest", "checkpoints/checkpoint.pt", "adapters/best/adapter_model.safetensors"):
        assert conditions(models=[run / inside]).source.crop == 320


def test_of_two_runs_the_first_one_s_conditions_hold(run, nano_base, tmp_path):
    other = copy_of(run, tmp_path / "other", crop=200, val_bits=16)
    found = conditions(models=[f"base={nano_base}", run, other])
    assert found.source.crop == 320 and found.source.bits == 12
    sentences = ["trained at crop 200, evaluated at crop 320", "bits was 16 in its validation, evaluated with 12"]
    assert said(found) == [f"other: {sentence}" for sentence in sentences]
    found = conditions(models=[other, run])
    assert found.source.crop == 200 and "r8: trained at crop 320, evaluated at crop 200" in said(found)
    found = conditions("--data", other, models=[run])  # the other's data, looked at as the first
    assert found.source.crop == 320 and found.source.bits == 16
    tool.main(["--compare", str(run), str(other), *QUICK, "--limit", "2", "--out", str(tmp_path / "out")])
    record = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert "other: trained at crop 200, evaluated at crop 320" in record["conditions"]["sentences"]
    assert record["conditions"]["own"]["other"]["crop"] == 200


def test_training_images_need_the_words(run, strips, tmp_path):
    found = conditions("--split", "train", models=[run])
    assert found.source.split == "train" and found.source.crop == 320
    assert "r8: trained on 8 of these 8 images" in said(found)
    assert "r8: validated on split val of" in said(found)[0]
    folder = ["--data", strips, "--crop", "320"]
    with pytest.raises(UserError, match="r8 was trained on 8 of these 12 images: .* or give --split train"):
        said(conditions(*folder, models=[run]))
    splits = [*folder, "--split-file", strips / "split.csv"]
    assert len(said(conditions(*splits, "--split", "train", models=[run]))) > 0
    assert "trained on 8 of these 12" in str(said(conditions(*splits, "--split", "train,val", models=[run])))
    with pytest.raises(UserError, match="r8 was trained on 8 of these 8 images"):
        said(conditions(*splits, "--split", "!val", models=[run]))
    assert "trained on" not in str(said(conditions(*splits, "--split", "val", models=[run])))
    with pytest.raises(UserError, match="--split train"):  # the tool refuses before any model is evaluated
        tool.main(["--adapter", str(run), "--data", str(strips), *QUICK, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_copy_of_the_training_images_is_recognised(run, strips, tmp_path):
    """By name and content; an image of the same name alone is another one."""
    copied = Path(shutil.copytree(strips, tmp_path / "copied"))
    with pytest.raises(UserError, match="r8 was trained on 8 of these 12 images: .* or give --split train"):
        said(conditions("--data", copied, models=[run]))
    train = {row["image"] for row in csv.DictReader((strips / "split.csv").open()) if row["split"] == "train"}
    changed = copied / "train_images" / min(train)
    changed.write_bytes(changed.read_bytes()[:-2] + b"\0\0")
    others = {str(path) for path in (strips / "train_images").iterdir() if path.name in train}
    assert len(images_among({str(path) for path in changed.parent.iterdir()}, others)) == 7


def test_a_run_that_validates_on_its_training_images_says_so(run, tmp_path):
    both = {f"{phase}_{key}": None for phase in ("train", "val") for key in ("split", "split_file")}
    other = copy_of(run, tmp_path / "other", **both)
    sentences = said(conditions(models=[other]))
    assert "other: trained on 12 of these 12 images, which are in both its training data" in sentences[0]
    sentences = said(conditions(models=[run, other]))  # the images of the first are the other's training images
    assert any("other: trained on 4 of these 4 images" in sentence for sentence in sentences)


def test_data_that_moved_does_not_end_a_comparison(run, tmp_path):
    moved = copy_of(run, tmp_path / "moved", train_reader={"_target_": "a.KaggleReader", "csv": "/gone/train.csv"})
    assert "moved: it is unknown whether it was trained on these images" in said(conditions(models=[moved]))[0]


def test_a_config_says_how_models_are_asked(run, nano_base, strips, tmp_path, monkeypatch):
    for name, value in environment(nano_base, strips, tmp_path / "run").items():
        monkeypatch.setenv(name, value)
    found = conditions("-c", "demo", "dataset.bits=12", models=[nano_base])
    assert (found.source.crop, found.source.resolution, found.source.bits) == (256, 128, 12) and said(found) == []
    assert conditions("-c", "demo", "--split", "train", models=[nano_base]).source.split == "train"
    with_run = said(conditions("-c", "demo", models=[nano_base, run]))
    assert "r8: trained at crop 320, evaluated at crop 256" in with_run and len(with_run) == 4
    with pytest.raises(UserError, match="name the data"):
        conditions(models=[nano_base])


def test_an_evaluation_of_the_version_before_is_still_shown(evaluated, tmp_path):
    old = {key: value for key, value in evaluated.items() if key != "conditions"}
    assert "conditions" not in describe(old) and "IoU" in describe(old)
    (tmp_path / "evaluation.json").write_text(json.dumps(old))
    assert "conditions" not in tables(read_evaluation(tmp_path))
