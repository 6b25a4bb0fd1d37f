"""The doctor finds errors planted in the checkpoint, the data and the step."""

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from helpers.doctor_cases import find, only, place  # noqa: F401
from sam2_lora_ext.adapters.weights import read_weights, write_weights
from sam2_lora_ext.doctor.findings import Finding

# ---- planted in the checkpoint --------------------------------------------------------------------------------------


def checkpoint_faults(monkeypatch: pytest.MonkeyPatch, path: Path, step: bool = False) -> list[Finding]:
    monkeypatch.setenv("SAM2_LORA_NANO", str(path))
    return find(step=step)


def test_a_damaged_checkpoint(place, nano_base, tmp_path, monkeypatch):
    (tmp_path / "cut.pt").write_bytes(nano_base.read_bytes()[:100_000])
    only(checkpoint_faults(monkeypatch, tmp_path / "cut.pt"), "damaged")


def test_a_checkpoint_of_another_model(place, nano_base, tmp_path, monkeypatch):
    state = read_weights(nano_base)
    write_weights(tmp_path / "2.0.pt", {key: value for key, value in state.items() if key != "no_obj_embed_spatial"})
    only(checkpoint_faults(monkeypatch, tmp_path / "2.0.pt"), "no_obj_embed_spatial", "use the config")


def test_a_training_checkpoint_instead_of_the_base(place, nano_base, tmp_path, monkeypatch):
    state = read_weights(nano_base) | {"image_encoder.trunk.blocks.0.attn.qkv.lora_a": torch.zeros(8, 24)}
    write_weights(tmp_path / "checkpoint.pt", state)
    only(checkpoint_faults(monkeypatch, tmp_path / "checkpoint.pt"), "with adapters, not a base", "merge")


def test_weights_that_are_not_finite(place, nano_base, tmp_path, monkeypatch):
    state = {key: value.clone() for key, value in read_weights(nano_base).items()}
    state["sam_mask_decoder.iou_token.weight"][0, 0] = float("nan")
    write_weights(tmp_path / "nan.pt", state)
    only(checkpoint_faults(monkeypatch, tmp_path / "nan.pt"), "NaN", "sam_mask_decoder.iou_token.weight")


def test_a_base_that_is_not_there_is_said_once(place, monkeypatch):
    only(checkpoint_faults(monkeypatch, Path("/nowhere/base.pt"), step=True), "/nowhere/base.pt", "does not exist")


def test_a_glob_of_the_initializer_that_hits_nothing(place):
    """A model without adapters lacks no key of theirs; stock's loading stops at such a glob."""
    only(find("lora.targets=[]", "lora.trainable=[image_encoder.trunk.blocks.*.norm1]"), "lora_", "set it to null")
    nothing = "trainer.checkpoint.model_weight_initializer.ignore_missing_keys=null"
    assert not find("lora.targets=[]", "lora.trainable=[image_encoder.trunk.blocks.*.norm1]", nothing, step=True)


# ---- planted in the settings ----------------------------------------------------------------------------------------


def test_a_setting_out_of_its_range(place):
    """By the table of settings, before anything is built."""
    only(find("scratch.lr=-1e-3"), "scratch.lr must be a number above 0")
    only(find("trainer.loss.severstal.class_weights={9: 2.0}"), "has a weight for class 9, but the data only has")


# ---- planted in the data --------------------------------------------------------------------------------------------


@pytest.fixture
def own_strips(place: Path, strips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the strips that may be spoilt."""
    copy = tmp_path / "strips"
    shutil.copytree(strips, copy)
    monkeypatch.setenv("SEVERSTAL_ROOT", str(copy))
    monkeypatch.setenv("SEVERSTAL_SPLIT", str(copy / "split.csv"))
    return copy


def test_broken_annotations_are_named_with_their_row(own_strips):
    table = (own_strips / "train.csv").read_text().splitlines()
    name = table[1].split(",")[0]
    (own_strips / "train.csv").write_text("\n".join([table[0], f"{name},3,1 2 3", *table[2:], ""]))
    only(find(), "row 2", "pairs of start and length")


def test_a_missing_image(own_strips):
    name = (own_strips / "train.csv").read_text().splitlines()[1].split(",")[0]
    (own_strips / "train_images" / name).unlink()
    only(find(), name, "is not in")


def test_a_damaged_image(own_strips):
    """Its header and end are whole, so the data set takes it; a bit of its pixels is wrong."""
    rows = (own_strips / "split.csv").read_text().splitlines()
    name = next(row.split(",")[0] for row in rows if row.endswith("train"))
    file = own_strips / "train_images" / name
    with Image.open(file) as image:
        image.save(file, format="PNG")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    only(find(), name, "1 of 8 decoded images are damaged", "prepare_data.py scan")


def test_validation_on_what_is_trained_on(own_strips):
    found = [finding for finding in find("trainer.data.val.datasets.0.video_dataset.split=train", level="yellow")]
    assert any("8 of 8 validation images are also in training" in finding.text for finding in found)
    assert not any("also in training" in finding.text for finding in find(level="yellow"))


def test_a_split_that_does_not_fit(own_strips):
    (own_strips / "split.csv").write_text("image,split\nnothing.jpg,train\nnothing_else.jpg,val\n")
    found = find()
    assert len(found) == 2 and "'nothing.jpg'" in found[0].text and "'nothing_else.jpg'" in found[1].text  # train, val
    (own_strips / "split.csv").write_text(
        "image,split\n" + (own_strips / "train.csv").read_text().splitlines()[1].split(",")[0] + ",train\n"
    )
    assert any("has no split" in finding.text for finding in find())


def test_absent_classes_are_worth_a_look(own_strips):
    assert any("no sample of" in finding.text for finding in find(level="yellow"))


# ---- planted in the step --------------------------------------------------------------------------------------------


def test_an_adapter_without_gradient(place):
    """One frame has no memory to attend to, so adapters there learn nothing."""
    only(
        find("lora.targets=[memory_attention.layers.*.linear1,sam_mask_decoder.transformer.*.q_proj]", step=True),
        "get no gradient",
        "memory_attention",
    )


def test_a_loss_that_is_not_finite(place, monkeypatch):
    nothing = {"core_loss": torch.tensor(float("nan"), requires_grad=True)}
    monkeypatch.setattr("sam2_lora_ext.losses.SeverstalLoss.forward", lambda self, *batch: nothing)
    only(find(step=True), "the loss of one sample is nan")


def test_nothing_is_trained(place):
    only(find("lora.targets=[]"), "target")
