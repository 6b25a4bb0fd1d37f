"""Adapters on disk: PEFT reads ours, we read PEFT's, and both compute the same."""

import json
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from helpers.stock_models import TINY, build, train_a_little
from sam2_lora_ext.adapters.merge_state import merge_state_dict
from sam2_lora_ext.adapters.peft import Adapter, attach_adapter, load_adapter, save_adapter
from sam2_lora_ext.deploy.verify import mask_logits, noise_image
from sam2_lora_ext.lora import build_lora_model, lora_layers

HEAD = "sam_mask_decoder.iou_prediction_head"
METADATA = {"base_id": "0" * 64, "model_config": TINY, "step": 7, "metrics": {"iou": 0.5}}
RICH = {
    "rank": 3,
    "alpha": 10,
    "qkv_parts": ["q", "v"],
    "trainable": [HEAD, "*.norm1"],
    "dropout": 0.1,
    "rank_pattern": {"*.blocks.1.*": 5},
    "alpha_pattern": {"*.out_proj": 7},
}
CONFIGS = {
    "plain": {"rank": 4},
    "rich": RICH,
    "rslora": {**RICH, "rslora": True},
    "k": {"qkv_parts": ["k"], "targets": ["*.attn.qkv"]},
    "qkv": {"qkv_parts": ["q", "k", "v"], "rank": 5},
}


def trained(config: dict, stock: str = "configs/sam2_nano.yaml") -> nn.Module:
    model = build_lora_model(build(stock), config)
    train_a_little(model)
    return model.eval()


def saved(model: nn.Module, folder: Path) -> Adapter:
    adapter = Adapter.from_model(model, METADATA)
    save_adapter(adapter, folder)
    return adapter


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return mask_logits(model, noise_image(128))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_peft_computes_bitwise_the_same_from_our_folder(tmp_path, config):
    model = trained(config)
    saved(model, tmp_path)
    other = PeftModel.from_pretrained(build(), tmp_path).eval()
    features = [network.forward_image(noise_image(128))["backbone_fpn"] for network in (model, other.base_model.model)]
    assert all(map(torch.equal, *features))
    assert torch.equal(logits(other.base_model.model), logits(model))
    assert not torch.allclose(logits(model), logits(build()))


def test_peft_on_a_real_architecture(tmp_path):
    model = trained({"qkv_parts": ["q", "v"]}, TINY)
    saved(model, tmp_path)
    other = PeftModel.from_pretrained(build(TINY), tmp_path).eval()
    assert torch.equal(logits(other.base_model.model), logits(model))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_what_is_saved_is_what_is_loaded(tmp_path, config):
    model = trained(config)
    before = saved(model, tmp_path)
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        after = load_adapter(path)
        assert (after.metadata, after.dropout) == (METADATA, before.dropout)
        assert set(after.full_modules) == set(before.full_modules) and after.full.keys() == before.full.keys()
        assert all(torch.equal(value, after.full[key]) for key, value in before.full.items())
        for name, layer in before.layers.items():
            other = after.layers[name]
            assert (other.parts, other.rslora, other.alpha) == (layer.parts, layer.rslora, layer.alpha)
            assert torch.equal(other.lora_a, layer.lora_a) and torch.equal(other.lora_b, layer.lora_b)
    assert torch.equal(logits(attach_adapter(build(), after)), logits(model))


def test_the_files_are_as_documented(tmp_path):
    model = trained(
        {
            "targets": ["*.blocks.0.attn.qkv", "*.blocks.0.attn.proj"],
            "rank": 3,
            "alpha": 6,
            "qkv_parts": ["q", "v"],
            "trainable": [HEAD],
        }
    )
    saved(model, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    qkv, proj = (f"image_encoder.trunk.blocks.0.attn.{name}" for name in ("qkv", "proj"))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["bias"]) == ("LORA", 6, 12, "none")
    assert config["rank_pattern"] == {re.escape(proj): 3} and config["alpha_pattern"] == {re.escape(proj): 6}
    assert config["target_modules"] == [qkv, proj] and config["modules_to_save"] == [HEAD]
    assert set(config) <= set(LoraConfig().to_dict())
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        shapes = {key.removeprefix("base_model.model."): file.get_tensor(key).shape for key in file.keys()}
        metadata = file.metadata()
    assert shapes == {
        f"{qkv}.lora_A.weight": (6, 24),
        f"{qkv}.lora_B.weight": (72, 6),
        f"{proj}.lora_A.weight": (3, 24),
        f"{proj}.lora_B.weight": (24, 3),
        **{f"{HEAD}.{key}": value.shape for key, value in model.get_submodule(HEAD).state_dict().items()},
    }
    assert metadata["format"] == "pt"
    fused = {qkv: {"parts": [True, False, True], "alpha": 6}}
    header = json.loads(metadata["sam2_lora_ext"])
    assert len(header.pop("digest")) == 64 and header == {**METADATA, "fused": fused}


PEFT_CONFIGS = {
    "plain": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
    "regex": {"r": 4, "target_modules": r".*blocks\.\d+\.attn\.(qkv|proj)", "lora_dropout": 0.1},
    "patterns": {
        "r": 4,
        "lora_alpha": 5,
        "target_modules": ["qkv", "attn.proj", "self_attn.out_proj"],
        "exclude_modules": ["image_encoder.trunk.blocks.0.attn.proj"],
        "rank_pattern": {"blocks.1.attn.qkv": 2, r"^sam.*": 7},
        "alpha_pattern": {"out_proj": 3},
    },
    "rslora": {"r": 3, "target_modules": ["qkv"], "use_rslora": True, "rank_pattern": {r"blocks\.[01]\.attn\.qkv": 5}},
    "modules": {"target_modules": ["qkv"], "modules_to_save": ["iou_prediction_head", "norm1"]},
    "gaussian": {"target_modules": ["qkv"], "init_lora_weights": "gaussian"},
    "mica": {"target_modules": ["qkv"], "init_lora_weights": "mica"},
}


@pytest.mark.parametrize("settings", PEFT_CONFIGS.values(), ids=PEFT_CONFIGS)
def test_what_peft_trained_gives_the_same_here_live_and_merged(tmp_path, settings):
    base = build()
    state = {key: value.clone() for key, value in base.state_dict().items()}
    model = get_peft_model(base, LoraConfig(**settings)).eval()
    train_a_little(model)
    model.save_pretrained(tmp_path)
    expected = logits(model.base_model.model)

    adapter = load_adapter(tmp_path)
    assert torch.equal(logits(attach_adapter(build(), adapter)), expected)
    merged = merge_state_dict(state, adapter)
    oracle = model.merge_and_unload().state_dict()
    assert merged.keys() == oracle.keys()
    torch.testing.assert_close(merged, dict(oracle))
    stock = build()
    stock.load_state_dict(merged)
    torch.testing.assert_close(logits(stock), expected)


def test_adapters_saved_by_old_peft_as_a_pickle_of_tensors(tmp_path):
    saved(trained({}), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(tensors, tmp_path / "adapter_model.bin")
    adapter = load_adapter(tmp_path)
    assert torch.equal(logits(attach_adapter(build(), adapter)), logits(trained({}))) and adapter.metadata == {}


def test_modules_without_any_lora_layer(tmp_path):
    """PEFT itself refuses such a folder; we read it."""
    model = trained({"targets": [], "trainable": [HEAD, "*.norm1"]})
    saved(model, tmp_path)
    assert not list(lora_layers(model))
    assert torch.equal(logits(attach_adapter(build(), load_adapter(tmp_path))), logits(model))
