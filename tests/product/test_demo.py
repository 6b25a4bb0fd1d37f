"""`make demo`'s script from end to end, shortened: every stage, file and number, in a path with a space."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from sam2.build_sam import build_sam2

from sam2_lora_ext.adapters.weights import read_weights

ROOT = Path(__file__).resolve().parents[2]
INSPECTION = {"kaggle_dice", "kaggle_dice_empty", "dice_present", "false_alarms", "recall", "ms_per_strip"}
METRICS = {"iou_1click", "iou_8clicks", "iou_box", "dice_1click", "dice_8clicks", "dice_box"}


def demo(out: Path, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools/demo.py"), "--out", str(out), "--strips", "10"]
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, "SAM2_LORA_DEMO_STEPS": "4"}, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    cwd = tmp_path_factory.mktemp("elsewhere")
    out = cwd / "a folder" / "demo"
    done = demo(out, cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done


def test_summary_has_every_number(finished):
    summary = json.loads((finished[0] / "summary.json").read_text())
    assert {name: set(summary[name]) for name in ("base", "lora", "merged")} == dict.fromkeys(
        ("base", "lora", "merged"), METRICS
    )
    assert summary["merge"]["max_abs_weight_diff"] < 1e-6 and summary["merge"]["max_abs_logit_diff"] < 1e-4
    assert 0 < summary["params"]["trained"] < 0.1 * summary["params"]["total"]
    assert set(summary["seconds"]) == {"train", "evaluate", "inspection"}
    assert set(summary["inspection"]) == INSPECTION
    assert 0 <= summary["inspection"]["kaggle_dice"] <= 1 and summary["inspection"]["ms_per_strip"] > 0


def test_the_merged_file_is_the_model_that_was_trained(finished):
    summary = json.loads((finished[0] / "summary.json").read_text())
    assert summary["merged"] == pytest.approx(summary["lora"], abs=1e-3)  # a pixel at the threshold may flip
    build_sam2("configs/sam2_nano.yaml", str(finished[0] / "sam2_nano_steel.pt"), device="cpu")


def test_encoder_and_decoder_changed_and_nothing_else(finished):
    base, merged = read_weights(ROOT / "assets/sam2_nano.pt"), read_weights(finished[0] / "sam2_nano_steel.pt")
    changed = {key for key in base if not torch.equal(base[key].float(), merged[key].float())}
    assert any(key.startswith("image_encoder.trunk") for key in changed)
    assert any(key.startswith("sam_mask_decoder.transformer") for key in changed)
    assert all(key.startswith(("image_encoder.trunk.blocks", "sam_mask_decoder.transformer")) for key in changed)


def test_the_picture_shows_something(finished):
    picture = Image.open(finished[0] / "overlays.png")
    assert picture.width > 4 * 256 and len(picture.convert("RGB").getcolors(2**24)) > 100
    assert len(Image.open(finished[0] / "inspection.png").convert("RGB").getcolors(2**24)) > 100


@pytest.mark.slow
def test_again_starts_from_nothing(finished, tmp_path):
    stale = finished[0] / "train" / "stale.txt"
    stale.touch()
    done = demo(finished[0], tmp_path)
    assert done.returncode == 0, done.stderr
    assert not stale.exists() and (finished[0] / "summary.json").exists()


def test_a_users_folder_is_not_cleared(tmp_path):
    (tmp_path / "mine.txt").touch()
    done = demo(tmp_path, tmp_path)
    assert done.returncode == 2 and "not from an earlier demo" in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "mine.txt").exists()
