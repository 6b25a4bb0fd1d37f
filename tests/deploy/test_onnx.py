"""The ONNX export of a merged file: the stock predictor's masks under onnxruntime, for any number of prompts."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from sam2.sam2_image_predictor import SAM2ImagePredictor

from helpers.stock_models import NANO, build, train_a_little
from sam2_lora_ext.adapters.merge import merge_files
from sam2_lora_ext.adapters.peft import Adapter, save_adapter
from sam2_lora_ext.adapters.weights import read_weights, weights_id, write_weights
from sam2_lora_ext.deploy.onnx_export import export, prove
from sam2_lora_ext.deploy.onnx_layouts import FEATURES, PAIR
from sam2_lora_ext.deploy.stock import build_stock, noise_pixels
from sam2_lora_ext.lora import build_lora_model
from sam2_lora_ext.utils.command_line import run_cli
from sam2_lora_ext.utils.errors import UserError

SIZE = 128


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, repository: Path, run_python) -> Path:
    """`merged.pt` with a trained adapter in it, and `onnx files`, as the command line exports them."""
    folder = tmp_path_factory.mktemp("onnx")
    write_weights(folder / "base.pt", build(NANO).state_dict())
    model = build_lora_model(build(NANO), {"rank": 4})
    train_a_little(model)
    save_adapter(Adapter.from_model(model), folder / "adapter")
    merge_files(folder / "base.pt", folder / "adapter", folder / "merged.pt")
    done = run_python(
        [
            repository / "tools/export_onnx.py",
            "--config",
            NANO,
            "--checkpoint",
            folder / "merged.pt",
            "--out",
            folder / "onnx files",
        ],
        check=True,
    )
    (folder / "printed.txt").write_text(done.stdout)
    return folder


@pytest.fixture(scope="module")
def sessions(folder: Path) -> list[onnxruntime.InferenceSession]:
    """Encoder and decoder, as a user starts them."""
    return [onnxruntime.InferenceSession(folder / "onnx files" / f"{name}.onnx") for name in PAIR]


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    """An image (H, W, 3) of the input's own size, for resizing is not in the files."""
    return (noise_pixels(SIZE)[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)


@pytest.fixture(scope="module")
def features(sessions, image) -> dict[str, np.ndarray]:
    pixels = np.float32(image.transpose(2, 0, 1)[None]) / 255
    return dict(zip(FEATURES, sessions[0].run(None, {"pixels": pixels})))


@pytest.fixture(scope="module")
def predictor(folder, image) -> SAM2ImagePredictor:
    """The stock predictor on the merged file."""
    predictor = SAM2ImagePredictor(build_stock(NANO, folder / "merged.pt"))
    predictor._bb_feat_sizes = [(SIZE // 4,) * 2, (SIZE // 8,) * 2, (SIZE // 16,) * 2]  # it knows those of 1024 px only
    predictor.set_image(image)
    return predictor


def close(found: np.ndarray, expected: np.ndarray) -> None:
    largest = np.abs(expected).max()
    assert largest > 0.1
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * largest)  # other kernels add in another order


@pytest.mark.parametrize("prompts, points", [(1, 1), (1, 4), (2, 1), (3, 2), (7, 5)])
def test_points_give_the_stock_predictors_masks(sessions, features, predictor, prompts, points):
    generator = np.random.default_rng(prompts + points)
    coords = np.float32(generator.random((prompts, points, 2)) * SIZE)
    labels = generator.integers(0, 2, (prompts, points))
    masks, iou, score = sessions[1].run(None, {**features, "point_coords": coords, "point_labels": labels})
    assert [array.shape for array in (masks, iou, score)] == [
        (prompts, 4, SIZE // 4, SIZE // 4),
        (prompts, 4),
        (prompts, 1),
    ]
    for multimask, outputs in ((False, slice(0, 1)), (True, slice(1, 4))):
        _, expected_iou, expected = predictor._predict(
            torch.from_numpy(coords), torch.from_numpy(labels), multimask_output=multimask, return_logits=True
        )
        close(masks[:, outputs], expected.numpy())
        close(iou[:, outputs], expected_iou.numpy())


def test_boxes_are_two_points(sessions, features, predictor):
    boxes = np.float32([[10, 20, 100, 110], [50, 5, 90, 60]])
    inputs = {"point_coords": boxes.reshape(-1, 2, 2), "point_labels": np.int64([[2, 3], [2, 3]])}
    masks, iou, _ = sessions[1].run(None, {**features, **inputs})
    _, expected_iou, expected = predictor.predict(box=boxes, multimask_output=False, return_logits=True)
    close(masks[:, :1], expected)
    close(iou[:, :1], expected_iou)


def test_what_is_written_and_printed(folder):
    out = folder / "onnx files"
    assert {path.name for path in out.iterdir()} == {"image_encoder.onnx", "mask_decoder.onnx", "export.json"}
    facts, printed = json.loads((out / "export.json").read_text()), (folder / "printed.txt").read_text()
    assert facts["image_size"] == SIZE and facts["weights_id"] == weights_id(read_weights(folder / "merged.pt"))
    proof = facts["proof"]
    assert 0 < proof["max_abs_logit_diff"] <= proof["bound"] < 1e-3 * proof["max_abs_logit"] and proof["flipped"] < 1e-3
    assert {name: set(times) for name, times in proof["seconds"].items()} == {
        name: {"pytorch", "onnxruntime"} for name in PAIR
    }
    assert all(seconds > 0 for times in proof["seconds"].values() for seconds in times.values())
    assert "logits differ by at most" in printed and printed.count("onnxruntime ") == 2


def test_files_of_another_model_fail_the_proof(folder):
    other = build_stock(NANO, folder / "base.pt").requires_grad_(False)
    assert not prove(other, folder / "onnx files", noise_pixels(SIZE)).passed


@pytest.mark.slow
def test_nothing_is_written_when_the_proof_fails(tmp_path, monkeypatch):
    monkeypatch.setattr("sam2_lora_ext.deploy.onnx_export.BOUND", 0.0)
    with pytest.raises(UserError, match="the ONNX files differ from the model: .* nothing was written"):
        export(build(NANO), tmp_path / "onnx", noise_pixels(SIZE), {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options, words",
    [
        ({}, "image_encoder.onnx exists already: choose another name, or give --force"),
        ({"--out": "merged.pt"}, "merged.pt is a file: give --out the folder"),
        ({"--out": "new", "--config": "configs/nothing.yaml"}, "there is no config 'configs/nothing.yaml'"),
        ({"--out": "new", "--config": "configs/demo.yaml"}, "configs/demo.yaml is not an inference config"),
        ({"--out": "new", "--checkpoint": "nothing.pt"}, "there is no file nothing.pt"),
        ({"--out": "new", "--checkpoint": "adapter/adapter_model.safetensors"}, "the weights do not fit the model"),
        ({"--out": "new", "--config": "configs/sam2/sam2_hiera_t.yaml"}, "look like configs/sam2_nano.yaml, the model"),
        ({"--out": "new", "--image": "merged.pt"}, "cannot read the image merged.pt"),
        ({"--out": "new", "--name": "steel"}, "--name is only for labelling tools"),
        ({"--out": "new", "--classes": None, "--layout": "samexporter"}, "leave it out with --classes"),
        ({"--out": "new", "--classes": None, "--name": "steel"}, "--name is only for labelling tools"),
        ({"--out": "new", "--image-size": "100"}, "--image-size: must be a multiple of 32 from 32 to 8192, got 100"),
    ],
)
def test_mistakes_are_one_sentence(folder, monkeypatch, capsys, repository, options, words):
    monkeypatch.syspath_prepend(repository / "tools")
    monkeypatch.chdir(folder)
    import export_onnx

    given = {"--config": NANO, "--checkpoint": "merged.pt", "--out": "onnx files", **options}
    with pytest.raises(SystemExit) as caught:
        run_cli(export_onnx.main, [word for pair in given.items() for word in pair if word is not None])
    assert caught.value.code == 2 and words in capsys.readouterr().err and not Path("new").exists()


def test_a_missing_package_says_what_to_install(folder, repository, run_python):
    """In a Python where onnxruntime cannot be imported."""
    argv = [str(repository / "tools/export_onnx.py"), "--config", NANO, "--checkpoint", "merged.pt", "--out", "new"]
    code = (
        f"import sys, runpy; sys.modules['onnxruntime'] = None; sys.argv = {argv}; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = run_python(["-c", code], cwd=folder)
    assert done.returncode == 2 and done.stderr.startswith("error: the export needs onnx, onnxscript, onnxruntime (")
    assert "pip install -e '.[onnx]'" in done.stderr
