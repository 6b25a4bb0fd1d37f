"""The baseline for LoRA: every parameter trained; it resumes, leaves weights that stock loads, and has nothing to
merge."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from helpers.small_runs import environment, train_here
from sam2_lora_ext.adapters.sources import read_adapter
from sam2_lora_ext.adapters.weights import read_weights
from sam2_lora_ext.run.folder import short_number
from sam2_lora_ext.run.summary import launched_config
from sam2_lora_ext.utils.errors import UserError

FULL = (
    "lora=null",
    "scratch.lr=1e-4",
    "trainer.distributed.find_unused_parameters=true",
    "trainer.checkpoint.model_weight_initializer.ignore_missing_keys=null",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory, nano_base, strips) -> Path:
    folder = tmp_path_factory.mktemp("full") / "run"
    train_here(environment(nano_base, strips, folder), *FULL, "scratch.steps=4")
    return folder


def test_its_weights_load_in_stock_sam2_and_changed(run, nano_base):
    from sam2.build_sam import build_sam2

    build_sam2("configs/sam2_nano.yaml", str(run / "weights/final.pt"), device="cpu")
    base, final = read_weights(nano_base), read_weights(run / "weights/final.pt")
    assert any(not torch.equal(base[key], final[key]) for key in base if key.startswith("image_encoder"))
    assert not (run / "adapters").exists()


def test_a_finished_run_started_again_does_nothing(run, nano_base, strips):
    before = {
        path: path.read_bytes()
        for path in (run / "validations.json", run / "logs/metrics.csv", run / "weights/final.pt")
    }
    train_here(environment(nano_base, strips, run), *FULL, "scratch.steps=4")
    assert {path: path.read_bytes() for path in before} == before


def test_a_stopped_run_goes_on(run, nano_base, strips, tmp_path):
    """The state after the first phase, made by cutting off the record of the second, ends as the whole run did."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    checkpoint = torch.load(folder / "checkpoints/checkpoint.pt", weights_only=True)
    assert checkpoint["epoch"] == 2
    history = json.loads((folder / "validations.json").read_text())
    (folder / "validations.json").write_text(json.dumps(history[:1]))  # killed before the last validation was noted
    (folder / "training_summary.json").unlink()
    train_here(environment(nano_base, strips, folder), *FULL, "scratch.steps=4")
    assert json.loads((folder / "validations.json").read_text()) == history


def test_there_is_nothing_to_merge(run):
    with pytest.raises(UserError, match="trained the whole model.*weights/best.pt"):
        read_adapter(run)
    with pytest.raises(UserError, match="holds no LoRA adapter.*folder weights"):
        read_adapter(run / "checkpoints/checkpoint.pt")


@pytest.mark.parametrize(
    ("value", "text"), [(1e-3, "1e-3"), (1.5e-3, "1.5e-3"), (2.5e-4, "2.5e-4"), (0.01, "1e-2"), (0, "0")]
)
def test_a_learning_rate_is_named_as_it_is(value, text):
    assert short_number(value) == text


@pytest.mark.parametrize(
    ("command", "config"),
    [
        (["train.py", "-c", "configs/severstal_lora.yaml", "--num-gpus", "2"], "configs/severstal_lora.yaml"),
        (["train.py", "lora.rank=4", "--config=demo"], "demo"),
        (["-m", "pytest"], None),
        (["x", "-c"], None),
    ],
)
def test_the_config_of_a_command(command, config):
    assert launched_config(command) == config


@pytest.mark.parametrize(
    "setting", ["trainer.metrics_every=0", "+trainer.export.mergd=true", "+trainer.early_stop.patiense=3"]
)
def test_wrong_settings_are_sentences(setting, nano_base, strips, tmp_path):
    with pytest.raises(UserError, match=setting.partition("=")[0].rpartition(".")[2]):
        train_here(environment(nano_base, strips, tmp_path / "run"), setting)
