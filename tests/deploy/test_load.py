"""Switchable adapters in SAM 2's own three predictors: each gives its adapter's masks, and no effect remains."""

import inspect
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sam2.automatic_mask_generator import SAM2AutomaticMaskGenerator
from sam2.build_sam import build_sam2, build_sam2_video_predictor
from sam2.sam2_image_predictor import SAM2ImagePredictor
from torch import nn

import sam2_lora_ext
from helpers.stock_models import NANO, train_a_little
from sam2_lora_ext import add_adapter, disable_adapters, fit_predictor, load_sam2, set_adapter
from sam2_lora_ext.adapters.peft import Adapter, attach_adapter, load_adapter, save_adapter
from sam2_lora_ext.adapters.weights import read_weights, weights_id, write_weights
from sam2_lora_ext.deploy.stock import build_stock, noise_pixels
from sam2_lora_ext.lora import build_lora_model
from sam2_lora_ext.utils.errors import UserError

BASE = Path(__file__).resolve().parents[2] / "assets/sam2_nano.pt"
HEAD = "sam_mask_decoder.iou_prediction_head"
KINDS = {
    "line 1": {"rank": 4},
    "line 2": {"rank": 2, "variant": "dora", "targets": ["*.attn.proj", "*.v_proj"], "trainable": [HEAD, "*.norm1"]},
    "line 3": {"rank": 3, "rslora": True, "targets": ["*.attn.qkv", f"{HEAD}.layers.0"], "qkv_parts": ["q", "v"]},
}
PIXELS = (noise_pixels(96)[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)[:64]  # H W 3
Answers = list[torch.Tensor]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An adapter folder of each kind, trained by nobody."""
    found = {}
    for seed, (name, config) in enumerate(KINDS.items()):
        model = build_lora_model(build_stock(NANO, BASE), config)
        train_a_little(model, seed=seed)
        found[name] = tmp_path_factory.mktemp("adapters") / name
        save_adapter(Adapter.from_model(model, {"base_id": weights_id(read_weights(BASE))}), found[name])
    return found


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three frames of a moving picture."""
    folder = tmp_path_factory.mktemp("frames")
    for number in range(3):
        Image.fromarray(np.roll(PIXELS, 4 * number, 1)).save(folder / f"{number}.jpg")
    return folder


@torch.inference_mode()
def by_image(model: nn.Module) -> Answers:
    predictor = fit_predictor(SAM2ImagePredictor(model))
    predictor.set_image(PIXELS)
    clicks = {"point_coords": np.array([[30.0, 20.0]]), "point_labels": np.array([1])}
    box = np.array([10.0, 8.0, 60.0, 50.0])
    found = [*predictor.predict(**clicks, return_logits=True), *predictor.predict(box=box)]
    return [torch.from_numpy(value) for value in found]


@torch.inference_mode()
def automatic(model: nn.Module) -> Answers:
    generator = SAM2AutomaticMaskGenerator(model, points_per_side=3, pred_iou_thresh=-9.0, stability_score_thresh=-1.0)
    records = fit_predictor(generator).generate(PIXELS)
    assert records
    return [torch.tensor(record[key]) for record in records for key in ("segmentation", "predicted_iou", "bbox")]


def by_video(frames: Path) -> Callable[[nn.Module], Answers]:
    def answers(model: nn.Module) -> Answers:
        state = model.init_state(str(frames))
        model.add_new_points_or_box(state, frame_idx=0, obj_id=1, points=[[30.0, 20.0]], labels=[1])
        return [logits.clone() for _, _, logits in model.propagate_in_video(state)]

    return answers


def same(ours: Answers, theirs: Answers) -> bool:
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize(
    "which, image_size",
    [
        ("image", None),
        ("image", 256),
        ("automatic", None),
        ("automatic", 256),
        ("video", None),
        ("video", 256),
    ],
)
def test_each_adapter_answers_as_if_alone_and_leaves_nothing(which, image_size, folders, frames):
    answers = {"image": by_image, "automatic": automatic, "video": by_video(frames)}[which]
    video, sizes = which == "video", [f"++model.image_size={image_size}"] if image_size else []
    build = build_sam2_video_predictor if video else build_sam2
    expected = {None: answers(build(NANO, str(BASE), device="cpu", hydra_overrides_extra=sizes))}
    for name, folder in folders.items():
        alone = build(NANO, str(BASE), device="cpu", hydra_overrides_extra=sizes)
        # as build_sam2 leaves it: torch.matmul rounds otherwise when a weight has no gradient
        expected[name] = answers(attach_adapter(alone, load_adapter(folder)).requires_grad_().eval())
    assert not any(same(expected[None], expected[name]) for name in folders)

    model = load_sam2(NANO, BASE, folders, video=video, image_size=image_size, device="cpu")
    assert same(answers(model), expected["line 1"])
    for name in ("line 2", None, "line 3", "line 1"):
        set_adapter(model, name)
        assert same(answers(model), expected[name]), name
        with disable_adapters(model):
            assert same(answers(model), expected[None])
        assert sam2_lora_ext.active_adapter(model) == name


def test_at_1024_pixels_the_stock_predictor_needs_no_fitting(folders):
    sizes = ["++model.image_size=1024"]
    alone = build_sam2(NANO, str(BASE), device="cpu", hydra_overrides_extra=sizes)
    attach_adapter(alone, load_adapter(folders["line 1"]))
    model = load_sam2(NANO, BASE, folders["line 1"], image_size=1024, device="cpu")
    found = []
    for predictor in SAM2ImagePredictor(alone.requires_grad_().eval()), SAM2ImagePredictor(model):
        predictor.set_image(PIXELS)
        found.append(torch.from_numpy(predictor.predict(box=np.array([10.0, 8.0, 60.0, 50.0]), return_logits=True)[0]))
    assert torch.equal(*found)


def test_at_other_sizes_it_does(folders):
    model = load_sam2(NANO, BASE, folders["line 1"], device="cpu")
    with pytest.raises(RuntimeError, match="shape"):
        SAM2ImagePredictor(model).set_image(PIXELS)
    with pytest.raises(UserError, match="a SAM2Base has no feature sizes to set: give a SAM2ImagePredictor"):
        fit_predictor(model)


def test_the_base_is_the_stock_model(folders):
    """Without an active adapter the model has only stock modules; with one, it has the base's keys."""
    model, stock = load_sam2(NANO, BASE, folders, device="cpu"), build_sam2(NANO, str(BASE), device="cpu")
    assert not model.training
    assert set(model.state_dict()) > set(stock.state_dict())
    with disable_adapters(model):
        assert [(name, type(module)) for name, module in model.named_modules()] == [
            (name, type(module)) for name, module in stock.named_modules()
        ]
        assert model.state_dict().keys() == stock.state_dict().keys()
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in stock.state_dict().items())


def test_what_an_adapter_may_be_given_as(folders, tmp_path):
    """A folder, an `Adapter`, or one without any fact about its base, as PEFT saves it; added later too."""
    adapter = load_adapter(folders["line 1"])
    expected = by_image(load_sam2(NANO, BASE, folders["line 1"], device="cpu"))
    adapter.metadata.clear()
    model = load_sam2(NANO, str(BASE), adapter, device="cpu")
    assert sam2_lora_ext.adapter_names(model) == ["default"] and same(by_image(model), expected)
    write_weights(tmp_path / "base.safetensors", read_weights(BASE), "safetensors")
    model = load_sam2(NANO, tmp_path / "base.safetensors", device="cpu")
    add_adapter(model, "late", folders["line 1"])
    assert sam2_lora_ext.active_adapter(model) is None
    set_adapter(model, "late")
    assert same(by_image(model), expected)
    add_adapter(load_sam2(NANO, BASE, device="cpu").bfloat16(), "to a model that was cast", folders["line 1"])
    model = build_sam2(NANO, str(BASE), device="cpu")
    add_adapter(model, "on a model of one's own", folders["line 1"])
    set_adapter(model, "on a model of one's own")
    assert same(by_image(model), expected)


def test_the_package_lists_its_functions_and_names_what_it_lacks():
    names = [name for name in dir(sam2_lora_ext) if not name.startswith("_")]
    functions = {name for name in names if inspect.isfunction(getattr(sam2_lora_ext, name))}
    assert functions >= {"load_sam2", "add_adapter", "set_adapter", "remove_adapter", "fit_predictor"}
    with pytest.raises(AttributeError, match="has no attribute 'load_sam3'"):
        sam2_lora_ext.load_sam3


def test_importing_is_cheap(run_python):
    """The package alone brings no torch, its functions no SAM 2."""
    check = (
        "import sys, sam2_lora_ext; assert 'torch' not in sys.modules\n"
        "from sam2_lora_ext import load_sam2; assert not {'sam2', 'hydra'} & set(sys.modules)"
    )
    run_python(["-c", check], check=True)


def test_refusals(folders, tmp_path):
    other = tmp_path / "other.pt"
    write_weights(other, {key: value + 0.01 for key, value in read_weights(BASE).items()})
    with pytest.raises(UserError, match=f"trained on another file .* but the base is {other}"):
        load_sam2(NANO, other, folders["line 1"], device="cpu")
    model = load_sam2(NANO, other, device="cpu")
    with pytest.raises(UserError, match="trained on another file .* but the base is the model's"):
        add_adapter(model, "x", folders["line 1"])
    for config, base, words in (
        ("configs/sam2.1/sam2.1_hiera_t.yaml", BASE, "look like configs/sam2_nano.yaml, the model like configs/sam2.1"),
        ("configs/nowhere.yaml", BASE, "there is no config 'configs/nowhere.yaml': give a stock name such as"),
        (NANO, tmp_path / "no.pt", "there is no file"),
    ):
        with pytest.raises(UserError, match=words):
            load_sam2(config, base, device="cpu")
    with pytest.raises(UserError, match="image_size must be a multiple of 32 pixels, got 100"):
        load_sam2(NANO, BASE, image_size=100)
    with pytest.raises(UserError, match="there is no .*nowhere: give a run folder"):
        load_sam2(NANO, BASE, tmp_path / "nowhere")
