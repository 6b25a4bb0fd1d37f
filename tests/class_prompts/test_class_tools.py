"""Fitting and evaluating an inspection from the command line: which files are written, and which strips are used."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import evaluate_inspection
import fit_decision
import numpy as np
import pytest
import torch
from PIL import Image

from helpers.class_models import make_prompts, write_merged
from sam2_lora_ext.adapters.class_prompts import load_class_prompts, save_class_prompts
from sam2_lora_ext.adapters.decision import Decision
from sam2_lora_ext.adapters.weights import write_weights
from sam2_lora_ext.inspection.decision_file import write_decision
from sam2_lora_ext.inspection.demo import figures
from sam2_lora_ext.inspection.segmenter import load_segmenter
from sam2_lora_ext.report.inspection import inspection, read_inspection
from sam2_lora_ext.utils.errors import UserError

NAMES = tuple(f"defect_{number}" for number in range(1, 5))


def steel_prompts():
    """Random tokens for Severstal's four classes."""
    prompts = make_prompts(3, crop=256)
    tokens = torch.randn(4, 2, 64, generator=torch.Generator().manual_seed(0))
    return replace(prompts, tokens=tokens, class_ids=(1, 2, 3, 4), class_names=NAMES, decision=Decision.default(4))


@pytest.fixture
def steel(tmp_path: Path) -> Path:
    return write_merged(tmp_path / "steel.pt", steel_prompts())


def data_of(strips: Path, split: str) -> list[str]:
    return ["--data", str(strips), "--size", "any", "--split-file", str(strips / "split.csv"), "--split", split]


def test_fit_evaluate_and_the_file_between(steel: Path, strips: Path, tmp_path: Path, capsys) -> None:
    before = torch.load(steel, weights_only=True)["model"]
    fit_decision.main(["--checkpoint", str(steel), "--device", "cpu", *data_of(strips, "val")])
    said = capsys.readouterr().out
    assert "fitting to 4 strips" in said and "written" in said
    prompts = load_class_prompts(steel)
    assert prompts.decision.fitted and torch.equal(prompts.tokens, steel_prompts().tokens)
    after = torch.load(steel, weights_only=True)["model"]
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    with pytest.raises(UserError, match="already fitted"):
        fit_decision.main(["--checkpoint", str(steel), *data_of(strips, "val")])

    out = tmp_path / "inspection"
    where = ["--checkpoint", str(steel), "--device", "cpu", "--out", str(out)]
    evaluate_inspection.main([*where, *data_of(strips, "val")])
    record = json.loads((out / "inspection.json").read_text())
    result = record["result"]
    assert result["strips"] == 4 and set(result["classes"]) == set(NAMES)
    value = float(said.split(" fitted")[0].rsplit(" ", 1)[1])
    assert result["kaggle_dice"]["mean"] == pytest.approx(value, abs=2e-3)  # fitted on logits in half precision
    assert result["decision"] == prompts.decision.as_dict()
    assert all((out / entry["file"]).is_file() for entry in record["gallery"])
    assert figures(result)["kaggle_dice"] == result["kaggle_dice"]["mean"]
    section = inspection(read_inspection(out))
    for name, row in result["classes"].items():
        assert f"<th>{name}</th><td class=n>{row['found']}</td><td class=n>{row['missed']}</td>" in section
    assert section.count("<img") == len(record["gallery"])
    with pytest.raises(UserError, match="there is no"):
        read_inspection(tmp_path)
    assert "Kaggle's mean Dice" in (out / "inspection.md").read_text()
    with pytest.raises(UserError, match="exists already"):
        evaluate_inspection.main(["--checkpoint", str(steel), "--out", str(out), *data_of(strips, "val")])


def test_fitting_looks_at_no_other_split(steel: Path, strips: Path, tmp_path: Path) -> None:
    other = shutil.copytree(strips, tmp_path / "other")
    rows = (other / "split.csv").read_text().splitlines()[1:]
    rng = np.random.default_rng(0)
    for name in (row.split(",")[0] for row in rows if row.endswith("train")):
        path = other / "train_images" / name
        size = Image.open(path).size
        Image.fromarray(rng.integers(0, 255, size[::-1], dtype=np.uint8)).save(path)
    fits = []
    for folder in (strips, other):
        fit_decision.main(["--checkpoint", str(steel), "--force", "--device", "cpu", *data_of(folder, "val")])
        fits.append(load_class_prompts(steel).decision)
    assert fits[0] == fits[1]


def test_a_decision_goes_beside_a_safetensors_file_too(tmp_path: Path) -> None:
    from helpers.stock_models import NANO, build

    path = tmp_path / "steel.safetensors"
    write_weights(path, build(NANO).state_dict(), "safetensors")
    with pytest.raises(UserError, match="no class prompts"):
        write_decision(path, Decision.default(4))
    save_class_prompts(steel_prompts(), path)
    fitted = replace(Decision.default(4), threshold=(1.0, 2.0, 3.0, 4.0), fitted=True)
    assert write_decision(path, fitted) == tmp_path / "steel.class_prompts.safetensors"
    assert load_segmenter(None, path, device="cpu").decision == fitted
    save_class_prompts(replace(steel_prompts(), digest="of other weights"), path)
    with pytest.raises(UserError, match="belong to other weights"):
        load_segmenter(None, path, device="cpu")


def test_data_of_other_classes_is_refused(steel: Path, strips: Path) -> None:
    with pytest.raises(UserError, match="use the data that they were trained for"):
        fit_decision.main(["--checkpoint", str(steel), *data_of(strips, "val"), "--classes", "a,b,c,d"])
    with pytest.raises(UserError, match="must not be fitted to --split test"):
        fit_decision.main(["--checkpoint", str(steel), *data_of(strips, "test")])
    with pytest.raises(UserError, match="no strips are named"):
        fit_decision.main(["--checkpoint", str(steel)])
