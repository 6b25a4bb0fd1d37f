"""Adapter folders that are refused, in one sentence: other kinds than plain LoRA, damage, and what does not fit."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoHaConfig, LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from helpers.stock_models import build, train_a_little
from sam2_lora_ext.adapters.peft import Adapter, load_adapter, save_adapter
from sam2_lora_ext.adapters.peft_config import HARMLESS
from sam2_lora_ext.lora import build_lora_model
from sam2_lora_ext.utils.errors import UserError

HEAD = "sam_mask_decoder.iou_prediction_head"
QKV = "image_encoder.trunk.blocks.0.attn.qkv"
KEY = f"base_model.model.{QKV}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter of ours with fused parts and a head."""
    config = {"targets": ["*.attn.qkv"], "rank": 3, "qkv_parts": ["q", "v"], "trainable": [HEAD]}
    model = build_lora_model(build(), config)
    train_a_little(model)
    save_adapter(Adapter.from_model(model), tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "variant, words",
    [
        (
            {"init_lora_weights": "pissa"},
            "sets init_lora_weights to 'pissa', which changed the base's weights: save it as",
        ),
        ({"init_lora_weights": "olora"}, "sets init_lora_weights to 'olora'"),
        ({"lora_bias": True}, "sets lora_bias to True"),
        ({"bias": "all"}, "sets bias to 'all'"),
        ({"bias": "lora_only"}, "sets bias to 'lora_only'"),
    ],
)
def test_other_kinds_that_peft_really_writes_are_refused(tmp_path, variant, words):
    get_peft_model(build(), LoraConfig(target_modules=["qkv"], **variant)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=words):
        load_adapter(tmp_path)


def test_another_peft_method_is_refused(tmp_path):
    get_peft_model(build(), LoHaConfig(target_modules=["qkv"])).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="of the kind LOHA: only LORA"):
        load_adapter(tmp_path)


def test_layers_that_are_not_linear_are_refused(tmp_path):
    get_peft_model(build(), LoraConfig(target_modules=["patch_embed.proj"])).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="patch_embed.proj.lora_A.weight' is not the A or B of a linear layer"):
        load_adapter(tmp_path)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"peft_type": "IA3"}, "of the kind IA3: only LORA"),
        ({"peft_type": None}, "of the kind None"),
        ({"something_new": {"a": 1}}, "sets something_new to {'a': 1}: only LoRA and DoRA"),
        ({"fan_in_fan_out": True}, "sets fan_in_fan_out to True"),
        ({"r": 4}, "its config has rank 4"),
        ({"target_parameters": ["x"]}, "sets target_parameters"),
        ({"layer_replication": [[0, 1]]}, "sets layer_replication"),
        ({"rank_pattern": [1]}, r"sets rank_pattern to \[1\], which PEFT never does"),
        ({"rank_pattern": {"(": 3}}, "is not a regular expression"),
        ({"lora_alpha": None}, "alpha None: they do not belong together"),
        ({"lora_dropout": "x"}, "sets lora_dropout to 'x'"),
        ({"lora_alpha": 5}, f"adapter of {QKV} is damaged: its header does not fit its tensors and its config"),
        ({"modules_to_save": None}, "layers.0.bias' is neither LoRA nor in a module of the config's modules_to_save"),
    ],
)
def test_configs_that_do_not_fit(folder, change, words):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=words):
        load_adapter(folder)


def test_every_other_setting_of_pefts_is_refused_by_name(folder):
    path = folder / "adapter_config.json"
    content = json.loads(path.read_text())
    others = set(LoraConfig().to_dict()) - HARMLESS - {"bias", "init_lora_weights"}
    assert {"layer_replication", "alora_invocation_tokens", "target_parameters", "arrow_config"} <= others
    for key in others:
        path.write_text(json.dumps({**content, key: True}))
        with pytest.raises(UserError, match=f"sets {key} to True: only LoRA and DoRA can be used"):
            load_adapter(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "\xff"])
def test_a_config_that_is_no_json_object(folder, content):
    (folder / "adapter_config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match="adapter_config.json (is damaged|describes an adapter of the kind None)"):
        load_adapter(folder)


@pytest.mark.parametrize(
    "change, words",
    [
        ({f"{KEY}.lora_A.weight": None}, f"{QKV} has lora_B but no lora_A"),
        ({f"{KEY}.lora_B.weight": None}, f"{QKV} has lora_A but no lora_B"),
        ({f"{KEY}.lora_B.weight": torch.ones(72, 6)}, "its header does not fit"),  # where k is, it must be zero
        ({f"{KEY}.lora_B.weight": torch.ones(70, 6)}, "its header does not fit"),
        ({f"{KEY}.lora_B.weight": torch.ones(72, 5)}, r"has A \[6, 24\] and B \[72, 5\], its config has rank 6"),
        ({f"{KEY}.lora_A.weight": torch.full((6, 24), float("nan"))}, f"adapter of {QKV} holds NaN"),
        ({f"{KEY}.lora_magnitude_vector": torch.ones(72)}, "lora_magnitude_vector' is DoRA's, but its config"),
        ({f"{KEY}.lora_magnitude_vector": torch.ones(72, 1)}, "lora_magnitude_vector' is not the A or B"),
        ({f"{KEY}.lora_B.bias": torch.ones(72)}, "lora_B.bias' is not the A or B"),
        ({f"{KEY}.bias": torch.ones(72)}, "qkv.bias' is neither LoRA nor in a module"),
        ({"model.x.lora_A.weight": torch.ones(6, 24)}, "does not begin with 'base_model.model.'"),
        (
            {
                "base_model.model.../x.lora_A.weight": torch.ones(6, 1),
                "base_model.model.../x.lora_B.weight": torch.ones(1, 6),
            },
            r"names '\.\./x', which cannot be a part of a model",
        ),
        (
            {f"base_model.model.{HEAD}.layers.0.bias": torch.tensor([float("inf")])},
            "layers.0.bias holds NaN or infinity",
        ),
    ],
)
def test_tensors_that_do_not_fit(folder, change, words):
    path = folder / "adapter_model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = {**{key: value.clone() for key, value in load_file(path).items()}, **change}
    save_file({key: value for key, value in tensors.items() if value is not None}, path, metadata)
    with pytest.raises(UserError, match=words):
        load_adapter(folder)


@pytest.mark.parametrize(
    "header",
    [
        "{",
        "[1]",
        '{"fused": []}',
        f'{{"fused": {{"{QKV}": {{"parts": [true]}}}}}}',
        f'{{"fused": {{"{QKV}": {{"parts": [], "alpha": 1}}}}}}',
    ],
)
def test_a_damaged_header(folder, header):
    path = folder / "adapter_model.safetensors"
    save_file({key: value.clone() for key, value in load_file(path).items()}, path, {"sam2_lora_ext": header})
    with pytest.raises(UserError, match="is damaged: its header"):
        load_adapter(folder)


def test_files_that_are_missing_or_truncated(folder):
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(UserError, match="adapter_model.safetensors is damaged"):
        load_adapter(folder)
    weights.unlink()
    with pytest.raises(UserError, match="there is no file .*adapter_model.safetensors"):
        load_adapter(folder)
    with pytest.raises(UserError, match="there is no .*adapter_config.json: an adapter folder holds"):
        load_adapter(folder.parent / "nowhere" / "adapter_model.safetensors")


def test_replacing_an_adapter(folder):
    before = (folder / "adapter_model.safetensors").read_bytes()
    other = Adapter.from_model(build_lora_model(build(), {}))
    with pytest.raises(UserError, match="exists already"):
        save_adapter(other, folder, force=False)
    assert (folder / "adapter_model.safetensors").read_bytes() == before
    save_adapter(other, folder)
    assert load_adapter(folder).config().qkv_parts is None
    assert len(list(folder.iterdir())) == 2
