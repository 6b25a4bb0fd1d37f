"""One description of the data: from a config, a run or a folder, the same reader and settings for every tool."""

import argparse
import json
from pathlib import Path

import prepare_data
import pytest

from helpers.data_sets import STRIPS, reader, write_kaggle
from helpers.small_runs import environment, rank_environment
from sam2_lora_ext.data.arguments import BITS, classes, colors, number, size
from sam2_lora_ext.data.guess_format import guess_reader, guessed
from sam2_lora_ext.data.index import build_index
from sam2_lora_ext.data.source import Source, from_config, from_run
from sam2_lora_ext.run.paths import find_run
from sam2_lora_ext.utils.errors import UserError


def run(*arguments: object) -> None:
    prepare_data.main([str(argument) for argument in arguments])


# ---- configs and runs -----------------------------------------------------------------------------------------------


@pytest.fixture
def composed(nano_base: Path, strips: Path, tmp_path: Path):
    with rank_environment(environment(nano_base, strips, tmp_path / "run")):
        yield


def test_a_config_gives_what_training_would_instantiate(composed, strips):
    changes = ["dataset.bits=12", "dataset.min_area=20", "dataset.objects=classes", "dataset.on_invalid=skip"]
    source = from_config("demo", [*changes, "scratch.crop_width=320"])
    assert source.bits == 12 and source.min_area == 20 and source.objects == "classes" and source.on_invalid == "skip"
    assert (source.crop, source.resolution, source.stride, source.max_objects) == (320, 128, None, 16)
    assert (source.split_file, source.split) == (str(strips / "split.csv"), "val")
    assert source.make_reader().csv == strips / "train.csv" and source.make_reader() is source.make_reader()
    assert source.exif and not from_config("demo", ["dataset.exif=false"]).exif
    assert source.origin == "the validation data of the config demo"
    train = from_config("demo", phase="train")
    assert train.split == "train" and train.crop == 256 and train.bits == 16  # validation says how a model looks
    names = {Path(path).name for path in source.image_paths()}
    assert len(names) == 4 and not names & {Path(path).name for path in train.image_paths()}
    dataset = source.dataset()
    assert {dataset.index.name(int(image)) for image in dataset.images} == names


def test_strips_as_video_are_seen_window_by_window(composed):
    windows = "dataset.windows={width: 256, stride: 128, num_frames: 4}"
    changes = [windows, "dataset.group_width=null", "scratch.num_frames=4"]
    source = from_config("demo", changes)
    assert (source.crop, source.stride, source.group_width) == (256, 128, None)
    assert len(source.dataset()) > 0  # grouped by the crop


def write_run(folder: Path, readers: list[dict], **block: object) -> Path:
    """A run folder with only a record."""
    sets = [{"video_dataset": {"_target_": "x.SeverstalRawDataset", "reader": one, **block}} for one in readers]
    record = {"trainer": {"data": {"train": {"datasets": sets}, "val": {"datasets": sets}}}}
    for part in ("adapters/best", "checkpoints"):
        (folder / part).mkdir(parents=True)
    (folder / "run_config.yaml").write_text(json.dumps(record))
    return folder


def kaggle(folder: Path) -> dict:
    places = {"image_dir": str(folder / "images"), "csv": str(folder / "train.csv")}
    return {"_target_": "sam2_lora_ext.data.kaggle.KaggleReader", **places, "size": [40, 200]}


def test_a_run_is_found_from_what_lies_in_it(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "r8", [kaggle(tmp_path)])
    for inside in ("checkpoints/checkpoint.pt", "merged_best.pt", "adapters/best/adapter_model.safetensors"):
        (folder / inside).touch()
    files = ["checkpoints/checkpoint.pt", "merged_best.pt", "adapters/best/adapter_model.safetensors"]
    for inside in ["", "adapters", "adapters/best", *files]:
        assert find_run(folder / inside) == folder
    monkeypatch.chdir(tmp_path)
    assert find_run("r8/adapters/best") == Path("r8")
    (folder / "data/images").mkdir(parents=True)
    assert find_run(folder / "data") is None and find_run(folder / "data/images") is None and find_run(tmp_path) is None
    with pytest.raises(UserError, match="is neither a run nor inside one"):
        from_run(tmp_path)


def test_every_tool_reads_a_run_as_the_run_did(tmp_path, capsys):
    """The size and the class names of the run's record; `--size` would be needed for the folder."""
    write_kaggle(tmp_path / "k")
    config = {**kaggle(tmp_path / "k"), "classes": ["a", "b", "c", "d"]}
    folder = write_run(tmp_path / "r8", [config], on_invalid="skip")
    run("scan", folder, "--out", tmp_path / "scan", "--quiet")
    summary = json.loads((tmp_path / "scan/scan.json").read_text())
    assert summary["problems"] == [] and summary["class_names"] == {"1": "a", "2": "b", "3": "c", "4": "d"}
    assert f"(the training data of the run {folder})" in capsys.readouterr().out
    with open(tmp_path / "k/train.csv", "a") as file:
        file.write("gone.jpg,1,1 5\n")
    run("split", folder / "adapters/best", "--out", tmp_path / "split.csv", "--quiet")  # on_invalid is the run's
    with pytest.raises(UserError, match="gone.jpg"):
        run("split", folder, "--on-invalid", "error", "--out", tmp_path / "other.csv", "--quiet")
    run("convert", folder, "--to", "coco", "--out", tmp_path / "coco", "--quiet")
    index = build_index(guess_reader(tmp_path / "coco"))
    assert len(index) == len(STRIPS) and index.class_names == {1: "a", 2: "b", 3: "c", 4: "d"}


def test_a_run_whose_data_cannot_be_read_is_a_sentence(tmp_path):
    source = from_run(write_run(tmp_path / "r8", [kaggle(tmp_path)]))
    with pytest.raises(UserError, match=r"the run .*r8 reads .*train.csv, which is missing \(from"):
        source.make_reader()
    assert source.class_names() == {1: "defect_1", 2: "defect_2", 3: "defect_3", 4: "defect_4"}
    write_kaggle(tmp_path / "k")
    for place, target in enumerate(("os.system", "no.such.Reader", "sam2_lora_ext.data.coco.COCOReader")):
        with pytest.raises(UserError, match="the reader of the run .* cannot be built"):
            from_run(write_run(tmp_path / str(place), [{**kaggle(tmp_path / "k"), "_target_": target}])).make_reader()
    for place, readers in enumerate(([], [kaggle(tmp_path)] * 2)):
        with pytest.raises(UserError, match=f"has {len(readers)} data sets"):
            from_run(write_run(tmp_path / f"other{place}", readers))


def test_relative_paths_are_those_of_the_folder_that_the_run_was_started_in(tmp_path, monkeypatch):
    """Not those of the folder that a tool is started in, which may have a data set of the same name."""
    for place in ("desk", "elsewhere"):
        write_kaggle(tmp_path / place / "data")
    folder = write_run(tmp_path / "desk/runs/r8", [kaggle(Path("data"))], split_file="data/split.csv", split="val")
    record = json.loads((folder / "run_config.yaml").read_text())
    record["trainer"]["run_dir"] = "runs/r8"
    (folder / "run_config.yaml").write_text(json.dumps(record))
    (tmp_path / "desk/data/split.csv").write_text("image,split\na.jpg,val\nb.jpg,train\n")
    monkeypatch.chdir(tmp_path / "elsewhere")
    source = from_run("../desk/runs/r8/adapters/best")
    assert source.make_reader().csv == tmp_path / "desk/data/train.csv" and source.other_data is None
    assert source.image_paths() == {str(tmp_path / "desk/data/images/a.jpg")}
    monkeypatch.chdir(tmp_path / "desk")
    here = from_run("runs/r8")
    assert str(here.make_reader().csv) == "data/train.csv" and here.split_file == "data/split.csv"
    assert here.same_data(source) and not here.same_data(guessed(tmp_path / "elsewhere/data"))
    assert here.same_data(guessed("data"))


def test_the_other_phase_is_named_where_it_reads_other_data(tmp_path, capsys):
    for name in ("k", "v"):
        write_kaggle(tmp_path / name)
    folder = write_run(tmp_path / "r8", [kaggle(tmp_path / "k")])
    record = json.loads((folder / "run_config.yaml").read_text())
    record["trainer"]["data"]["val"]["datasets"][0]["video_dataset"]["reader"] = kaggle(tmp_path / "v")
    (folder / "run_config.yaml").write_text(json.dumps(record))
    run("scan", folder, "--out", tmp_path / "scan", "--quiet")
    assert f"--phase val reads other data: Kaggle's csv {tmp_path}/v/train.csv" in capsys.readouterr().out
    run("scan", folder, "--phase", "val", "--out", tmp_path / "other", "--quiet")
    assert f"reading Kaggle's csv {tmp_path}/v/train.csv" in capsys.readouterr().out


def test_overrides_stand_anywhere(composed, tmp_path, capsys):
    for place, words in enumerate((["-c", "demo", "dataset.bits=12"], ["dataset.bits=12", "-c", "demo"])):
        run("scan", *words, "--out", tmp_path / str(place), "--quiet", "dataset.min_area=3")
    assert capsys.readouterr().out.count("the training data of the config demo") == 2


# ---- folders --------------------------------------------------------------------------------------------------------


def test_other_data_takes_the_run_s_classes_and_settings(tmp_path):
    write_kaggle(tmp_path / "k")
    own = {**kaggle(tmp_path / "gone"), "classes": {"1": "pit", "2": "crack", "3": "scale", "4": "scratch"}}
    like = from_run(write_run(tmp_path / "r8", [own]))
    source = guessed(tmp_path / "k", like=like)
    assert isinstance(source, Source) and source.make_reader().size == (40, 200)
    assert source.make_reader().class_names == {1: "pit", 2: "crack", 3: "scale", 4: "scratch"}
    given = guessed(tmp_path / "k", given={"classes": 4, "size": None}, like=like).make_reader()
    assert given.size is None and given.class_names[1] == "defect_1"


def test_other_data_gets_its_class_numbers_by_name(shared_cases, tmp_path):
    """The run's file numbers 0 steel, 1 crack, 2 pit; the other has 1 crack, 2 pit: crack is one class in both."""
    train = shared_cases / "sep/train"
    places = {"image_dir": str(train), "json": str(train / "_annotations.coco.json")}
    like = from_run(write_run(tmp_path / "r8", [{"_target_": "sam2_lora_ext.data.coco.COCOReader", **places}]))
    other = guessed(shared_cases / "sep/valid", like=like)
    assert like.class_names() == other.class_names()
    numbers = {name: number for number, name in like.class_names().items()}
    index = build_index(other.make_reader())
    content = json.loads((shared_cases / "sep/valid/_annotations.coco.json").read_text())
    names = {entry["id"]: entry["name"] for entry in content["categories"]}
    wanted = sorted(numbers[names[entry["category_id"]]] for entry in content["annotations"])
    assert sorted(index.mask_class.tolist()) == wanted and len(wanted) > 0


def test_texts_of_options():
    assert classes("a, b") == ["a", "b"] and classes("255=defect,7=scale") == {255: "defect", 7: "scale"}
    assert colors("1=250/50/83,2=51/221/255") == {1: [250, 50, 83], 2: [51, 221, 255]}
    assert size("1600x256") == (256, 1600) and size("any") == "any" and number(BITS)("12") == 12
    wrong = {
        classes: ["a,,b", "1=a,b", "0=a", "1=a,1=b"],
        colors: ["1=1/2", "1=1/2/256", "red"],
        size: ["0x5", "5"],
        number(BITS): ["7", "17", "x"],
    }
    for read, texts in wrong.items():
        for text in texts:
            with pytest.raises(argparse.ArgumentTypeError):
                read(text)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "name the data"),
        (["{k}", "a=1"], "is one too many"),
        (["-c", "demo", "{k}"], "the data is the config's"),
        (["{r}", "--classes", "a"], "--classes is only for a data folder"),
        (["{k}", "--colors", "1=1/2/3", "--size", "200x40"], "colors are for label images"),
    ],
)
def test_contradictions_are_sentences(tmp_path, words, said):
    write_kaggle(tmp_path / "k")
    folder = write_run(tmp_path / "r8", [kaggle(tmp_path / "k")])
    filled = [word.format(k=tmp_path / "k", r=folder) for word in words]
    with pytest.raises(UserError, match=said):
        run("scan", *filled, "--out", tmp_path / "out", "--quiet")


def test_force_never_replaces_what_is_split(tmp_path):
    folder = write_kaggle(tmp_path / "k")
    before = (folder / "train.csv").read_bytes()
    with pytest.raises(UserError, match="is read"):
        run("split", folder, "--size", "200x40", "--out", folder / "train.csv", "--force", "--quiet")
    assert (folder / "train.csv").read_bytes() == before and len(build_index(reader(folder))) == len(STRIPS)
