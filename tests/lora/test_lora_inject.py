"""The layers selected by a LoRAConfig, every wrong config with its message, freezing, and the summary."""

import copy
import json
import re

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from sam2_lora_ext.lora import (
    LoRAConfig,
    LoRALinear,
    build_lora_model,
    find_targets,
    find_trainable,
    format_report,
    freeze,
    full_modules,
    inject,
    lora_layers,
    report,
)
from sam2_lora_ext.utils.errors import UserError

QKV, PROJ = "image_encoder.trunk.blocks.*.attn.qkv", "image_encoder.trunk.blocks.*.attn.proj"


def module(**children: nn.Module) -> nn.Module:
    parent = nn.Module()
    for name, child in children.items():
        parent.add_module(name, child)
    return parent


def block(width: int) -> nn.Module:
    layers = nn.ModuleList([nn.Linear(width, 2 * width), nn.Linear(2 * width, width)])
    attention = module(qkv=nn.Linear(width, 3 * width), proj=nn.Linear(width, width))
    return module(norm1=nn.LayerNorm(width), attn=attention, mlp=module(layers=layers, act=nn.GELU()))


@pytest.fixture
def model() -> nn.Module:
    """Modules with the names of SAM 2's, four values wide."""
    attention = module(**{name: nn.Linear(4, 4) for name in ("q_proj", "k_proj", "v_proj", "out_proj")})
    whole = module(
        image_encoder=module(
            trunk=module(patch_embed=module(proj=nn.Conv2d(3, 4, 1)), blocks=nn.ModuleList([block(4), block(4)]))
        ),
        memory_attention=module(layers=nn.ModuleList([module(self_attn=copy.deepcopy(attention))])),
        sam_mask_decoder=module(
            transformer=module(layers=nn.ModuleList([module(self_attn=attention, mlp=block(4).mlp)])),
            iou_prediction_head=module(layers=nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 1)]), act=nn.ReLU()),
        ),
        obj_ptr_proj=nn.Linear(4, 4),
    )
    whole.no_mem_embed = nn.Parameter(torch.zeros(4))
    return whole


def names(model: nn.Module, **config) -> list[str]:
    return [target.name for target in find_targets(model, config)]


def test_default_targets_are_encoder_attention_and_the_decoders_transformer(model):
    found = names(model)
    assert found == sorted(found, key=[name for name, _ in model.named_modules()].index)
    assert set(found) == {
        *(f"image_encoder.trunk.blocks.{index}.attn.{name}" for index in (0, 1) for name in ("qkv", "proj")),
        *(
            f"sam_mask_decoder.transformer.layers.0.{name}"
            for name in (
                "self_attn.q_proj",
                "self_attn.k_proj",
                "self_attn.v_proj",
                "self_attn.out_proj",
                "mlp.layers.0",
                "mlp.layers.1",
            )
        ),
    }


def test_finding_changes_nothing(model):
    before = copy.deepcopy(model).state_dict()
    find_targets(model, {"targets": [QKV], "trainable": ["*.norm1"]})
    assert not list(lora_layers(model)) and all(map(torch.equal, before.values(), model.state_dict().values()))


def test_numbers_per_layer_the_last_pattern_wins(model):
    targets = {
        target.name.split(".", 2)[2]: (target.rank, target.alpha)
        for target in find_targets(
            model,
            {
                "targets": [QKV, PROJ],
                "rank": 4,
                "rank_pattern": {"*.blocks.1.*": 2, "*.1.attn.proj": 6},
                "alpha_pattern": {"*.qkv": 32.5},
            },
        )
    }
    assert targets == {
        "blocks.0.attn.qkv": (4, 32.5),
        "blocks.0.attn.proj": (4, 16),
        "blocks.1.attn.qkv": (2, 32.5),
        "blocks.1.attn.proj": (6, 16),
    }


@pytest.mark.parametrize(
    "parts, flags",
    [
        (None, (True,)),
        (["k"], (False, True, False)),
        (["q", "v"], (True, False, True)),
        (["v", "q"], (True, False, True)),
    ],
)
def test_parts_of_fused_layers(model, parts, flags):
    targets = find_targets(model, {"targets": [QKV, PROJ], "qkv_parts": parts})
    assert {target.parts for target in targets if target.name.endswith("qkv")} == {flags}
    assert {target.parts for target in targets if target.name.endswith("proj")} == {(True,)}


def test_injection_keeps_parameters_keys_and_outputs(model):
    linear = model.obj_ptr_proj
    before = dict(model.named_parameters())
    inject(model, {"targets": ["obj_ptr_proj", QKV], "qkv_parts": ["q", "v"]})
    assert isinstance(model.obj_ptr_proj, LoRALinear) and model.obj_ptr_proj.weight is linear.weight
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert [name for name in after if name not in before] == [
        f"{name}.{kind}" for name, _ in lora_layers(model) for kind in ("lora_a", "lora_b")
    ]
    x = torch.randn(3, 4)
    assert torch.equal(model.obj_ptr_proj(x), linear(x))


def test_only_adapters_and_trainable_modules_keep_gradients(model):
    head = "sam_mask_decoder.iou_prediction_head"
    assert build_lora_model(model, {"targets": [QKV], "trainable": [head, "*.norm1"]}) is model
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {
        name
        for name in dict(model.named_parameters())
        if name.endswith(("lora_a", "lora_b")) or name.startswith(head) or ".norm1." in name
    }
    assert full_modules(model) == ["image_encoder.trunk.blocks.0.norm1", "image_encoder.trunk.blocks.1.norm1", head]


def test_trainable_means_the_outermost_modules(model):
    head = "sam_mask_decoder.iou_prediction_head"
    assert find_trainable(model, {"trainable": [f"{head}*"]}) == [head]  # not the ReLU in it, which has no parameters
    assert find_trainable(model, {"trainable": []}) == []


def test_modules_alone_can_be_trained(model):
    facts = inject(model, config := {"targets": [], "trainable": ["*.norm1"]})
    freeze(model, config)
    assert facts == report(model) and facts["trained"] == 2 * 2 * 4 and list(facts["groups"]) == ["full modules"]


def test_a_second_injection_is_refused_and_a_failed_one_leaves_the_model_alone(model):
    build_lora_model(model, {"targets": [QKV]})
    for targets in ([QKV], [PROJ]):
        with pytest.raises(UserError, match="image_encoder.trunk.blocks.0.attn.qkv has a LoRA adapter already"):
            inject(model, {"targets": targets})
    assert len(list(lora_layers(model))) == 2


class OwnLinear(nn.Linear):
    pass


@pytest.mark.parametrize(
    "config, words",
    [
        ({"targets": ["image_encoder.trunk.blok.*"]}, r"trunk.blok.*' matches nothing; the closest name is image_"),
        ({"targets": ["image_encoder.*proj"]}, "matches image_encoder.trunk.patch_embed.proj, which is a Conv2d"),
        ({"targets": ["*layers.0"]}, "which is a Module; only nn.Linear"),
        ({"targets": ["own"]}, "matches own, which is a OwnLinear"),
        ({"targets": [QKV], "trainable": ["nothing"]}, "lora.trainable: 'nothing' matches nothing"),
        ({"targets": [QKV], "trainable": ["*.act"]}, "image_encoder.trunk.blocks.0.mlp.act, a GELU without parameters"),
        (
            {"targets": [QKV], "trainable": ["image_encoder"]},
            "0.attn.qkv cannot have an adapter, since image_encoder is",
        ),
        ({"targets": [QKV], "trainable": [QKV]}, "blocks.0.attn.qkv cannot have an adapter"),
        ({"targets": [QKV], "rank_pattern": {"*.q_proj": 4}}, r"rank_pattern: '\*.q_proj' matches nothing"),
        ({"targets": [QKV], "alpha_pattern": {"*.proj": 4}}, r"alpha_pattern: '\*.proj' matches nothing"),
        ({"targets": [PROJ], "qkv_parts": ["q"]}, "no target is named qkv"),
        ({"targets": ["odd.qkv"], "qkv_parts": ["q"]}, "odd.qkv has 10 outputs, which do not divide into q, k and v"),
    ],
)
def test_what_matches_nothing_or_the_wrong_thing_is_named(model, config, words):
    model.own, model.odd = OwnLinear(4, 4), module(qkv=nn.Linear(4, 10))
    for action in (find_targets, inject, build_lora_model):
        with pytest.raises(UserError, match=words):
            action(model, config)
    assert not list(lora_layers(model)) and all(parameter.requires_grad for parameter in model.parameters())


def test_freezing_a_model_without_adapters_is_refused(model):
    with pytest.raises(UserError, match="inject adapters before freezing"):
        freeze(model, LoRAConfig())


@pytest.mark.parametrize(
    "config, words",
    [
        ({"rnak": 4}, r"no setting 'rnak', did you mean 'rank'\? Choose from targets, rank, alpha"),
        ({"rank": 0}, "lora.rank must be a whole number of at least 1, got 0"),
        ({"rank": 4.0}, "lora.rank"),
        ({"rank": True}, "lora.rank"),
        ({"rank": "8"}, "lora.rank"),
        ({"rank": None}, "lora.rank"),
        ({"rank_pattern": {"*": 0}}, r"lora.rank_pattern\['\*'\] must be a whole number"),
        ({"rank_pattern": ["*"]}, "lora.rank_pattern must be a mapping"),
        ({"alpha": 0}, "lora.alpha must be a number above 0"),
        ({"alpha": float("nan")}, "lora.alpha"),
        ({"alpha_pattern": {"*": "x"}}, r"lora.alpha_pattern\['\*'\]"),
        ({"dropout": 1}, "lora.dropout must be a number from 0 to below 1, got 1"),
        ({"dropout": -0.1}, "lora.dropout"),
        ({"rslora": "yes"}, "lora.rslora must be true or false"),
        ({"qkv_parts": ["q", "x"]}, r"lora.qkv_parts must be null or some of \['q', 'k', 'v'\]"),
        ({"qkv_parts": []}, "lora.qkv_parts"),
        ({"qkv_parts": ["q", "q"]}, "lora.qkv_parts"),
        ({"qkv_parts": "qv"}, "lora.qkv_parts must be a list"),
        ({"targets": "*.qkv"}, r"lora.targets must be a list of names, got '\*.qkv'"),
        ({"targets": [1]}, "lora.targets"),
        ({"targets": [], "trainable": []}, "nothing to train"),
        ({"implementation": "fast"}, r"lora.implementation must be one of .*'plain'.*, got 'fast'"),
    ],
)
def test_wrong_settings_are_explained(config, words):
    with pytest.raises(UserError, match=words):
        LoRAConfig.of(config)


def test_a_config_is_a_mapping():
    with pytest.raises(UserError, match="lora must be a mapping of settings, got 8"):
        LoRAConfig.of(8)


def test_hydras_containers_become_plain_values(model):
    text = """
    rank: 4
    lora: {rank: "${rank}", targets: [obj_ptr_proj], rank_pattern: {obj_*: 2}, qkv_parts: null}
    """
    config = LoRAConfig.of(OmegaConf.create(text).lora)
    assert config == LoRAConfig(rank=4, targets=["obj_ptr_proj"], rank_pattern={"obj_*": 2})
    assert LoRAConfig.of(json.loads(json.dumps(config.to_dict()))) == config
    assert find_targets(model, config)[0].rank == 2


def test_the_report_counts_by_hand(model):
    memory = "memory_attention.layers.0.self_attn.q_proj"
    config = {
        "targets": [QKV, PROJ, memory, "obj_ptr_proj", "*.mlp.layers.0"],
        "rank": 3,
        "rank_pattern": {PROJ: 2},
        "trainable": ["sam_mask_decoder.iou_prediction_head"],
    }
    planned = inject(model, config)
    freeze(model, config)
    facts = report(model)
    assert planned == facts == json.loads(json.dumps(facts))
    groups = facts["groups"]
    assert " ".join(groups) == "encoder attention encoder mlp decoder mlp memory attention other full modules"
    qkv, proj = 3 * 4 + 12 * 3, 2 * 4 + 4 * 2
    attention = groups["encoder attention"]
    assert (len(attention["layers"]), attention["ranks"], attention["trained"]) == (4, [2, 3], 2 * (qkv + proj))
    assert attention["total"] == 2 * (qkv + 4 * 12 + 12 + proj + 4 * 4 + 4)
    assert attention["share"] == attention["trained"] / attention["total"]
    assert groups["full modules"] == {
        "layers": ["sam_mask_decoder.iou_prediction_head"],
        "ranks": [],
        "trained": 25,
        "total": 25,
        "share": 1.0,
    }
    assert groups["memory attention"]["layers"] == [memory] and groups["other"]["layers"] == ["obj_ptr_proj"]
    assert facts["trained"] == sum(group["trained"] for group in groups.values())
    assert facts["total"] == sum(parameter.numel() for parameter in model.parameters())
    lines = format_report(facts).splitlines()
    assert len(lines) == 8 and len(set(map(len, lines))) == 1
    assert re.fullmatch(r"encoder attention +4 +2,3 +128 +288 +44\.44%", lines[1])
    assert lines[-1].split()[:3] == ["whole", "model", f"{facts['trained']}"]


def test_the_report_of_a_fully_trained_and_of_a_frozen_model(model):
    facts = report(model)
    assert facts["groups"]["full modules"]["layers"] == [""] and facts["share"] == 1.0
    facts = report(model.requires_grad_(False))
    assert facts["groups"] == {} and facts["trained"] == 0 and "whole model" in format_report(facts)
