"""From training with class prompts to inspected strips: the run's adapter is fitted, merged and used by every tool."""

import csv
import json
from pathlib import Path

import evaluate_inspection
import fit_decision
import inspect_strips
import torch

from helpers.small_runs import environment, train_here
from sam2_lora_ext.adapters.class_prompts import load_class_prompts
from sam2_lora_ext.adapters.merge import merge_files
from sam2_lora_ext.data.images import read_rgb
from sam2_lora_ext.deploy.load import load_sam2
from sam2_lora_ext.inspection.segmenter import Segmenter, load_segmenter


def test_a_run_is_fitted_merged_and_inspects(nano_base: Path, strips: Path, run_dir: Path, tmp_path: Path) -> None:
    env = environment(nano_base, strips, run_dir)
    train_here(env, "scratch.steps=2", "scratch.steps_per_phase=2", name="configs/demo_classes.yaml")
    where = ["--device", "cpu", "--base", str(nano_base)]
    fit_decision.main(["--checkpoint", str(run_dir), *where])  # on the strips that the run validates on
    adapter = run_dir / "adapters" / "best"
    prompts = load_class_prompts(adapter)
    assert prompts.decision.fitted and prompts.crop == 256 and prompts.resolution == 128
    merge_files(nano_base, adapter, tmp_path / "steel.pt")
    merged, live = load_segmenter(None, tmp_path / "steel.pt"), load_segmenter(None, adapter, base=nano_base)
    assert merged.prompts.decision == live.prompts.decision == prompts.decision
    images = sorted((strips / "train_images").iterdir())
    first = read_rgb(images[0])
    torch.testing.assert_close(merged(first).scores, live(first).scores, rtol=1e-4, atol=1e-4)
    switched = load_sam2("configs/sam2_nano.yaml", nano_base, adapter, image_size=128, device="cpu")
    torch.testing.assert_close(Segmenter(switched, prompts)(first).scores, live(first).scores)

    evaluate_inspection.main(["--checkpoint", str(run_dir), *where, "--out", str(run_dir / "inspection")])
    record = json.loads((run_dir / "inspection/inspection.json").read_text())
    result, note = record["result"], record["strips"]["note"]
    assert note.startswith("4 of these 4 strips are validation strips of the run")
    assert note in (run_dir / "inspection/inspection.md").read_text()
    assert result["strips"] == 4 and 0 <= result["kaggle_dice"]["mean"] <= 1
    out = tmp_path / "out"
    inspect_strips.main(["--checkpoint", str(tmp_path / "steel.pt"), *map(str, images[:2]), "--out", str(out)])
    with open(out / "inspection.csv", newline="") as file:
        assert [row["image"] for row in csv.DictReader(file)] == [image.name for image in images[:2]]
