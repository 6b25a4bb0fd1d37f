"""The ONNX graph of all classes under onnxruntime: any number of tiles, with the decision, in float16."""

import json
from dataclasses import replace
from pathlib import Path

import export_onnx
import numpy as np
import onnxruntime
import pytest
import torch

from helpers.class_models import DECISION, class_model, make_prompts, make_strip, write_merged
from sam2_lora_ext.class_prompts.decide import decide
from sam2_lora_ext.deploy.stock import noise_pixels
from sam2_lora_ext.inspection.network import ClassNetwork
from sam2_lora_ext.inspection.onnx_graph import export_classes
from sam2_lora_ext.utils.errors import UserError

SHARP = replace(
    DECISION,
    threshold=(-0.5, 0.5, 0.0),
    scale=(1.0, 2.0, 0.5),
    bias=(0.5, 0.0, -0.5),
    min_area=(0, 0, 0),
    weak_area=(0, 0, 0),
)


def tiles(count: int) -> np.ndarray:
    strips = [make_strip(128, 128, seed) for seed in range(count)]
    return np.float32(np.stack(strips).transpose(0, 3, 1, 2) / 255)


def test_the_graph_is_the_network_for_any_number_of_tiles(tmp_path: Path, capsys) -> None:
    prompts = make_prompts(decision=SHARP)
    steel = write_merged(tmp_path / "steel.pt", prompts)
    command = ["--classes", "--config", "configs/sam2_nano.yaml", "--checkpoint", str(steel)]
    with pytest.raises(UserError, match="trained at 128 pixels"):
        export_onnx.main([*command, "--out", str(tmp_path / "out"), "--image-size", "256"])
    with pytest.raises(UserError, match="leave it out with --classes"):
        export_onnx.main([*command, "--out", str(tmp_path / "out"), "--layout", "samexporter"])
    export_onnx.main([*command, "--decide", "--out", str(tmp_path / "out")])
    assert "class_segmenter.onnx" in capsys.readouterr().out
    network = ClassNetwork(class_model(prompts))
    runner = onnxruntime.InferenceSession(tmp_path / "out/class_segmenter.onnx")
    for count in (1, 2, 5):
        logits, scores, masks = runner.run(None, {"pixels": tiles(count)})
        with torch.no_grad():
            wanted, asked = network(torch.from_numpy(tiles(count)))
        assert logits.shape == (count, 3, 32, 32) and scores.shape == (count, 3) and masks.dtype == np.uint8
        np.testing.assert_allclose(logits, wanted, atol=1e-4 * float(wanted.abs().max()))
        np.testing.assert_allclose(scores, asked, atol=1e-4)
        for tile in range(count):
            own = decide(torch.from_numpy(logits[tile]), torch.from_numpy(scores[tile]), SHARP)
            assert np.array_equal(own.numpy(), masks[tile] > 0)
    notes = json.loads((tmp_path / "out/class_segmenter.json").read_text())
    assert notes["proof"]["max_abs_logit_diff"] <= notes["proof"]["bound"] and notes["proof"]["flipped"] < 1e-4
    assert notes["class_names"] == list(prompts.class_names) and notes["decision_inside"] and notes["crop"] == 128
    with pytest.raises(UserError, match="exists already"):
        export_classes(network, prompts, tmp_path / "out", noise_pixels(128), {})


@pytest.mark.slow
def test_float16_says_what_it_costs(tmp_path: Path) -> None:
    prompts = make_prompts()
    network = ClassNetwork(class_model(prompts))
    proof = export_classes(network, prompts, tmp_path / "out", noise_pixels(128), {}, half=True)
    assert proof.bound is None and 0 < proof.max_abs_logit_diff < 0.05 * proof.max_abs_logit
    assert proof.flipped < 0.01 and proof.mask_iou > 0.98
    logits, scores = onnxruntime.InferenceSession(tmp_path / "out/class_segmenter.onnx").run(None, {"pixels": tiles(2)})
    assert logits.dtype == scores.dtype == np.float32
