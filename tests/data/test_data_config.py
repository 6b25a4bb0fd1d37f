"""The data as the configs build it: natural or balanced, with the split folders as they are, at another depth."""

from collections import Counter

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from training.dataset.vos_dataset import VOSDataset

from helpers.data_formats import assert_same_objects, make_supervisely
from helpers.data_sets import STRIPS, reader, write_kaggle
from helpers.small_runs import rank_environment
from sam2_lora_ext.data.index import build_index
from sam2_lora_ext.data.writers import convert
from sam2_lora_ext.host.compose import compose


@pytest.fixture
def data(tmp_path):
    """`data(phase, overrides)`: what the Trainer would build for a phase."""
    write_kaggle(tmp_path / "k")
    (tmp_path / "k/images").rename(tmp_path / "k/train_images")
    rows = [f"{name},{'val' if name == 'b.jpg' else 'train'}" for name in STRIPS]
    (tmp_path / "k/split.csv").write_text("\n".join(["image,split", *rows]))
    make_supervisely(tmp_path / "s", "train_split")
    make_supervisely(tmp_path / "s", "val_split")

    def build(phase, *overrides, root="k"):
        with rank_environment({"SEVERSTAL_ROOT": str(tmp_path / root)}):
            config = compose("configs/demo.yaml", ["dataset.readers.kaggle.size=[40,200]", *overrides])
            return instantiate(OmegaConf.to_container(config.trainer.data[phase], resolve=True), _convert_="all")

    return build


def test_natural_sampling_shows_each_sample_once_a_pass(data):
    phased = data("train", "scratch.clean_share=0.4", "scratch.steps_per_phase=50")
    raw = phased.datasets[0].dataset.video_dataset
    assert len(raw) == 5 and phased.steps_per_epoch == 1  # three defective strips, two clean slots; a batch is 8
    ids = phased.sample_ids(0)
    assert len(ids) == 400 and set(Counter(ids[:395]).values()) == {79}


def test_rare_classes_come_more_often(data):
    phased = data("train", "scratch.clean_share=0", "scratch.steps_per_phase=50", "dataset.class_threshold=1.0")
    raw = phased.datasets[0].dataset.video_dataset
    assert [raw.classes_of(item) for item in range(3)] == [{1, 3}, {2, 3}, {3}]
    factors = [3**0.5, 3**0.5, 1.0]  # 1 and 2 are on a third of the strips, 3 on all
    assert phased.datasets[0].dataset.repeat_factors.tolist() == pytest.approx(factors)
    counts = Counter(phased.sample_ids(0))
    assert all(abs(counts[item] / 400 - factors[item] / sum(factors)) < 0.04 for item in range(3))  # over 89 passes


def test_clean_parts_from_the_config(data):
    raw = data("train", "dataset.clean_part_width=50").datasets[0].dataset.video_dataset
    assert len(raw._clean_pool) == 2 + 3  # whole clean strips, and a part of each other one


def test_split_folders_as_they_are(data):
    overrides = "dataset.reader=${dataset.readers.supervisely}", "dataset.split_file=null", "scratch.clean_share=null"
    for phase in ("train", "val"):
        dataset = data(phase, *overrides, root="s").datasets[0]
        raw = (dataset if isinstance(dataset, VOSDataset) else dataset.dataset).video_dataset
        names = {raw.get_video(item)[0].video_name for item in range(len(raw))}
        assert names == {f"{phase}_split/img/{name}" for name in STRIPS}


def test_depth_reaches_both_phases(data):
    for phase in ("train", "val"):
        dataset = data(phase, "dataset.bits=12").datasets[0]
        assert (dataset if isinstance(dataset, VOSDataset) else dataset.dataset).video_dataset.bits == 12


@pytest.mark.parametrize("kind", ["kaggle", "label_png", "supervisely", "coco"])
def test_readers_take_what_the_config_names(kind, tmp_path):
    write_kaggle(tmp_path / "k")
    convert(build_index(reader(tmp_path / "k")), kind, tmp_path / "data", progress=False)
    with rank_environment({"SEVERSTAL_ROOT": str(tmp_path / "data")}):
        overrides = [f"dataset.reader=${{dataset.readers.{kind}}}", "dataset.readers.kaggle.size=null"]
        settings = compose("configs/severstal_lora.yaml", [*overrides, "dataset.full_check=true"]).dataset.reader
        found = instantiate(settings, _convert_="all")
    assert found.full_check
    assert_same_objects(build_index(found), build_index(reader(tmp_path / "k")), STRIPS)
