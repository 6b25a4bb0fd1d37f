"""DoRA and PiSSA from a trained model to disk, to PEFT and back, and into stock keys."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from helpers.stock_models import build, train_a_little
from sam2_lora_ext.adapters.merge_state import merge_state_dict
from sam2_lora_ext.adapters.peft import Adapter, attach_adapter, load_adapter, save_adapter
from sam2_lora_ext.adapters.weights import weights_id
from sam2_lora_ext.deploy.verify import mask_logits, noise_image
from sam2_lora_ext.lora import (
    LayerAdapter,
    LoRAConfig,
    adapter_from_state,
    apply_adapter,
    build_lora_model,
    lora_layers,
)
from sam2_lora_ext.utils.errors import UserError

HEAD = "sam_mask_decoder.iou_prediction_head"
DORA = {"variant": "dora", "rank": 3, "trainable": [HEAD], "alpha_pattern": {"*.out_proj": 7}}
PISSA = {"variant": "pissa", "rank": 3, "rank_pattern": {"*.blocks.1.*": 5}}
CONFIGS = {
    "dora": DORA,
    "dora rslora": {**DORA, "rslora": True},
    "pissa": PISSA,
    "pissa rslora": {**PISSA, "rslora": True},
    "pissa qv": {**PISSA, "qkv_parts": ["q", "v"]},
}
all_configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def trained(config: dict) -> nn.Module:
    model = build_lora_model(build(), config)
    train_a_little(model)
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return mask_logits(model, noise_image(128))


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)  # sums in another order, some twenty layers deep


@all_configs
def test_saved_loaded_attached_and_merged(tmp_path, config):
    model, base = trained(config), build()
    expected = logits(model)
    assert (expected - logits(base)).abs().max() > 0.1
    save_adapter(Adapter.from_model(model, {"step": 3}), tmp_path)
    adapter = load_adapter(tmp_path)
    assert torch.equal(logits(attach_adapter(build(), adapter)), expected)
    assert adapter.config().variant == ("dora" if config["variant"] == "dora" else "lora")
    merged = merge_state_dict(base.state_dict(), adapter)
    assert merged.keys() == base.state_dict().keys()
    for name, layer in lora_layers(model):
        torch.testing.assert_close(merged[f"{name}.weight"].double(), layer.merged_weight(torch.float64).detach())
    base.load_state_dict(merged)
    close(logits(base), expected)


@all_configs
def test_peft_computes_the_same_from_our_folder(tmp_path, config):
    model = trained(config)
    save_adapter(Adapter.from_model(model), tmp_path)
    other = PeftModel.from_pretrained(build(), tmp_path).eval()
    if config["variant"] == "dora":  # PEFT adds the parts of its sum in another order
        close(logits(other.base_model.model), logits(model))
    else:
        assert torch.equal(logits(other.base_model.model), logits(model))


def test_what_peft_trained_as_dora_gives_the_same_here_live_and_merged(tmp_path):
    settings = LoraConfig(
        r=3,
        target_modules=["qkv", "q_proj", "mlp.layers.0"],
        use_dora=True,
        rank_pattern={"q_proj": 2},
        modules_to_save=["norm1"],
    )
    model = get_peft_model(build(), settings).eval()
    train_a_little(model)
    model.save_pretrained(tmp_path)
    adapter = load_adapter(tmp_path)
    assert adapter.is_dora
    close(logits(attach_adapter(build(), adapter)), logits(model.base_model.model))
    oracle = model.merge_and_unload().state_dict()
    torch.testing.assert_close(merge_state_dict(build().state_dict(), adapter), dict(oracle))


def test_pissa_is_exported_as_pefts_own_conversion_writes_it(tmp_path):
    """Both trained to the same results, PEFT on the residual of the base's weights."""
    settings = LoraConfig(r=3, lora_alpha=6, target_modules=["qkv"], init_lora_weights="pissa")
    model = build_lora_model(build(), {"variant": "pissa", "rank": 3, "alpha": 6, "targets": ["*.attn.qkv"]})
    other = get_peft_model(build(), settings)
    begin = str(tmp_path / "pissa_begin")
    other.save_pretrained(begin)
    train_a_little(model)
    with torch.no_grad():
        for name, layer in lora_layers(model):
            theirs = other.base_model.model.get_submodule(name)
            assert torch.equal(layer.lora_a0, theirs.lora_A["default"].weight)
            theirs.lora_A["default"].weight.copy_(layer.lora_a)
            theirs.lora_B["default"].weight.copy_(layer.lora_b)
    other.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=begin)
    save_adapter(Adapter.from_model(model), tmp_path / "ours")
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "converted"))
    assert ours.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in ours.items())
    assert torch.equal(logits(attach_adapter(build(), load_adapter(tmp_path / "converted"))), logits(model.eval()))


@all_configs
def test_taken_from_a_checkpoint(config):
    """The Trainer's checkpoint, with and without lora.json."""
    model = trained(config)
    expected = Adapter.from_model(model)
    kept = {key for key, value in model.named_parameters() if value.requires_grad}
    state = {key: value for key, value in model.state_dict().items() if key in kept or ".lora_" in key}
    found = [adapter_from_state(state, LoRAConfig.of(config))]
    if "qkv_parts" not in config and not config.get("rslora") and "alpha_pattern" not in config:
        found.append(adapter_from_state(state, alpha=16))
    for adapter in found:
        assert adapter.layers.keys() == expected.layers.keys() and adapter.full.keys() == expected.full.keys()
        for name, layer in expected.layers.items():
            assert adapter.layers[name].scaling == layer.scaling
            assert all(torch.equal(value, adapter.layers[name].tensors[key]) for key, value in layer.tensors.items())
    mark = {"dora": "lora_m", "pissa": "lora_a0"}[config["variant"]]
    with pytest.raises(UserError, match=f"without its {mark}: it is incomplete"):
        without = {key: value for key, value in state.items() if not key.endswith(mark)}
        adapter_from_state(without, LoRAConfig.of(config))


@pytest.mark.parametrize("config", [DORA, PISSA], ids=["dora", "pissa"])
def test_the_base_stays_itself(config):
    base = build()
    identity, state = weights_id(base.state_dict()), {key: value.clone() for key, value in base.state_dict().items()}
    model = build_lora_model(base, config)
    train_a_little(model)
    kept = [key for key in state if not key.startswith(HEAD)]
    assert all(torch.equal(model.state_dict()[key], state[key]) for key in kept)
    assert weights_id({key: state.get(key, value) for key, value in model.state_dict().items()}) == identity


def test_the_files_of_dora_are_as_documented(tmp_path):
    model = trained({"variant": "dora", "targets": ["*.blocks.0.attn.proj"], "rank": 3})
    save_adapter(Adapter.from_model(model), tmp_path)
    name = "base_model.model.image_encoder.trunk.blocks.0.attn.proj"
    shapes = {key: list(value.shape) for key, value in load_file(tmp_path / "adapter_model.safetensors").items()}
    assert shapes == {
        f"{name}.lora_A.weight": [3, 24],
        f"{name}.lora_B.weight": [24, 3],
        f"{name}.lora_magnitude_vector": [24],
    }
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["use_dora"] is True and set(config) <= set(LoraConfig().to_dict())


def folder_of(tmp_path: Path, config: dict) -> Path:
    save_adapter(Adapter.from_model(trained(config)), tmp_path)
    return tmp_path


def test_files_that_do_not_fit(tmp_path):
    path = folder_of(tmp_path, DORA) / "adapter_config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "use_dora": False}))
    with pytest.raises(UserError, match="lora_magnitude_vector' is DoRA's, but its config does not set use_dora"):
        load_adapter(tmp_path)
    folder_of(tmp_path, {"rank": 3})
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_dora": True}))
    with pytest.raises(UserError, match="has lora_A but no lora_magnitude_vector: the file is incomplete"):
        load_adapter(tmp_path)


def test_models_and_adapters_that_do_not_fit():
    a, b, m = torch.ones(2, 3), torch.ones(4, 2), torch.ones(4)
    for broken, words in (
        (LayerAdapter(a, b, 1, magnitude=torch.ones(3)), r"magnitude \[3\] for parts \(True,\) of B \[4, 2\]"),
        (LayerAdapter(a, b, 1, magnitude=torch.full((4,), float("nan"))), "holds NaN"),
        (LayerAdapter(torch.ones(4, 3), b, 1, parts=(True, True), magnitude=m), "expected one number for each output"),
    ):
        with pytest.raises(UserError, match=words):
            Adapter({"x": broken})
    with pytest.raises(UserError, match="y has a magnitude .*, x has none: all layers or none must"):
        Adapter({"x": LayerAdapter(a, b, 1), "y": LayerAdapter(a, b, 1, magnitude=m)})
    dora = Adapter.from_model(trained({"variant": "dora", "rank": 3}))
    with pytest.raises(UserError, match="the adapter is DoRA, the model has a LoRALinear"):
        apply_adapter(build_lora_model(build(), {"rank": 3}), dora)


@pytest.mark.parametrize(
    "config, words",
    [
        ({"variant": "lorra"}, r"lora.variant must be one of \['lora', 'dora', 'pissa'\], got 'lorra'"),
        ({"variant": "dora", "qkv_parts": ["q"]}, "every row of a fused qkv a magnitude: set lora.qkv_parts to null"),
        ({"variant": "pissa", "rank": 30}, "blocks.0.attn.qkv has 24 singular values, fewer than its rank 30"),
        (
            {"variant": "pissa", "rank": 9, "qkv_parts": ["q"], "targets": ["*.attn.qkv"], "rank_pattern": {"*": 25}},
            "has 24 singular values, fewer than its rank 25",
        ),
    ],
)
def test_configs_that_cannot_be(config, words):
    with pytest.raises(UserError, match=words):
        build_lora_model(build(), config)
