"""The folder that transformers loads as users make it: the tool, its mistakes, the model card, the pipeline."""

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from helpers.missing_packages import run_without
from helpers.small_runs import environment, train_here
from helpers.stock_models import TINY
from helpers.transformers_models import adapted, their_model
from sam2_lora_ext.adapters.peft import load_adapter
from sam2_lora_ext.run.config import write_run_config
from sam2_lora_ext.utils.command_line import run_cli
from sam2_lora_ext.utils.errors import UserError

transformers = pytest.importorskip("transformers")
from sam2_lora_ext.deploy.transformers_folder import trained_size, write_model_folder  # noqa: E402


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base and adapter of the small model, and `model`: the folder of their merge."""
    folder = adapted(tmp_path_factory.mktemp("nano") / "a folder")
    write_model_folder(folder / "base.pt", [folder / "adapter"], folder / "model")
    return folder


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No connection can be opened."""

    def refuse(*_: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_the_card_and_the_size_are_those_of_the_run(nano_base, strips, run_dir, tmp_path):
    """A real run at another size than its config's: base, data, metrics, and no path of this machine."""
    train_here(environment(nano_base, strips, run_dir), "scratch.resolution=96")
    merged = write_model_folder(nano_base, [run_dir], tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    summary = json.loads((run_dir / "training_summary.json").read_text())
    best = load_adapter(run_dir / "adapters" / "best").metadata["metrics"]
    assert f"# {summary['name']}" in card and f"`{merged.base_id}`" in card and "configs/sam2_nano.yaml" in card
    assert "training: Kaggle's csv, `train.csv`, `train_images`, split train of `split.csv`, SHA-256" in card
    assert "at 96 x 96 pixels" in card and "6 steps, learning rate 0.003, seed 42, 1 process" in card
    assert f"| iou_1click | {best['iou_1click']:.4f} |" in card and "| loss" not in card
    assert "license: apache-2.0" in card and "The terms of use of the data are not recorded" in " ".join(card.split())
    assert str(run_dir) not in card and str(strips) not in card and str(tmp_path) not in card
    assert their_model("Sam2Model", tmp_path / "model").config.prompt_encoder_config.image_size == 96
    processor = transformers.Sam2Processor.from_pretrained(tmp_path / "model")
    assert processor.target_size == 96 and processor.image_processor.size["height"] == 96


def test_the_card_of_a_run_on_data_of_another_kind_says_so(nano, tmp_path):
    """A run whose record has a data set that no tool reads: the card says that, and the rest of what it knows."""
    write_run_config(tmp_path / "run", {"trainer": {"data": {"train": {"_target_": "mine.Data"}}}})
    shutil.copytree(nano / "adapter", tmp_path / "run" / "adapters" / "best")
    write_model_folder(nano / "base.pt", [tmp_path / "run"], tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    assert "- training: unknown, since the run's record names no data set" in card and "- validation: unknown" in card
    assert "model input" not in card and "## Licence" in card


def test_the_card_without_a_run_says_that_nothing_is_known(nano):
    card = (nano / "model" / "README.md").read_text()
    assert "# model\n" in card and "its training data is unknown" in card and "records no validation" in card
    assert "architecture: `configs/sam2_nano.yaml`\n" in card  # a config of ours, not of SAM 2's repository
    assert str(nano) not in card and "Sam2VideoModel` and" not in card and "base_model" not in card


def test_runs_at_different_sizes_need_a_word(tmp_path):
    for size in (64, 96):
        (tmp_path / str(size)).mkdir()
        write_run_config(tmp_path / str(size), {"trainer": {"model": {"image_size": size}}})
    assert trained_size([tmp_path / "96", tmp_path / "none"]) == 96 and trained_size([tmp_path / "none"]) is None
    with pytest.raises(UserError, match="at 64, .* at 96.*--image-size"):
        trained_size([tmp_path / "64", tmp_path / "96"])


def test_without_transformers_it_is_a_sentence(nano, tmp_path, repository, run_python):
    words = ["--base", nano / "base.pt", "--adapter", nano / "adapter", "--out", tmp_path / "model"]
    tool = repository / "tools" / "merge_lora.py"
    done = run_without(run_python, ["transformers"], tool, *words, "--format", "transformers")
    assert done.returncode == 2 and "No module named 'transformers'" in done.stderr and "pip install" in done.stderr
    assert not (tmp_path / "model").exists()


def test_the_mask_generation_pipeline_takes_the_folder(nano, offline):
    generate = transformers.pipeline("mask-generation", model=str(nano / "model"), points_per_batch=16)
    found = generate(
        Image.new("RGB", (90, 60), (90, 120, 30)), points_per_crop=4, pred_iou_thresh=0.0, stability_score_thresh=0.0
    )
    assert found["masks"] and all(mask.shape == (60, 90) for mask in found["masks"])


@pytest.mark.parametrize(
    "options, words",
    [
        (["--format", "pt", "--image-size", "64"], "--image-size is only for a folder"),
        (["--out", "{nano}/model"], "model exists already: choose another name, or give --force"),
        (["--out", "{nano}", "--force"], "holds"),
        (["--out", "{out}/full", "--force"], "replaces a transformers model"),
        (["--image-size", "100"], "must be"),
        (["--verify", TINY], "look like configs/sam2_nano.yaml"),
    ],
)
def test_mistakes_are_one_sentence(nano, tmp_path, monkeypatch, capsys, repository, options, words):
    monkeypatch.syspath_prepend(repository / "tools")
    import merge_lora

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("kept")
    options = [option.format(nano=nano, out=tmp_path) for option in options]
    out = [] if "--out" in options else ["--out", str(tmp_path / "model")]
    given = ["--base", str(nano / "base.pt"), "--adapter", str(nano / "adapter"), *out]
    with pytest.raises(SystemExit) as caught:
        run_cli(merge_lora.main, [*given, *([] if "--format" in options else ["--format", "transformers"]), *options])
    message = capsys.readouterr().err
    assert caught.value.code == 2 and words in message and "Traceback" not in message
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]


def test_force_replaces_the_model_and_nothing_else(nano, tmp_path, monkeypatch, capsys, repository):
    monkeypatch.syspath_prepend(repository / "tools")
    import merge_lora

    command = [
        "--base",
        str(nano / "base.pt"),
        "--adapter",
        str(nano / "adapter"),
        "--out",
        str(tmp_path / "model"),
        "--format",
        "transformers",
    ]
    merge_lora.main(command)
    (tmp_path / "model" / "notes.txt").write_text("mine")
    merge_lora.main([*command, "--force", "--dtype", "bfloat16"])
    assert (tmp_path / "model" / "notes.txt").read_text() == "mine"
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    assert their_model("Sam2Model", tmp_path / "model").dtype == torch.bfloat16
    record = json.loads((tmp_path / "model.json").read_text())
    assert record["result"]["path"].endswith("model.safetensors") and record["result"]["dtypes"] == ["bfloat16"]
    assert "note     left out: mask_downsample" in capsys.readouterr().out
