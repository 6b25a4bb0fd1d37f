"""LoRA on the real SAM 2 architectures, built by Meta's own configs: the adapted layers, and no other changes."""

import copy
import pickle

import pytest
import torch
from torch import nn
from training.utils.checkpoint_utils import load_state_dict_into_model

from helpers.stock_models import TINY, build
from sam2_lora_ext.deploy.verify import mask_logits, noise_image
from sam2_lora_ext.lora import LoRAConfig, LoRALinear, build_lora_model, lora_layers, report

PLACES = {
    "encoder attention": ["image_encoder.trunk.blocks.*.attn.qkv", "image_encoder.trunk.blocks.*.attn.proj"],
    "encoder mlp": ["image_encoder.trunk.blocks.*.mlp.layers.*"],
    "decoder attention": [f"sam_mask_decoder.transformer.*.{name}_proj" for name in ("q", "k", "v", "out")],
    "decoder mlp": ["sam_mask_decoder.transformer.*.mlp.layers.*"],
}
EVERYWHERE = {"targets": sum(PLACES.values(), []), "rank": 8}
SIZES = [  # config, blocks, adapter parameters in the encoder's attention, and in all of EVERYWHERE
    (TINY, 12, 220_416, 764_672),
    ("configs/sam2.1/sam2.1_hiera_s.yaml", 16, 294_144, 961_280),
    ("configs/sam2.1/sam2.1_hiera_b+.yaml", 24, 509_824, 1_537_920),
    ("configs/sam2.1/sam2.1_hiera_l.yaml", 48, 1_305_216, 3_661_952),
    ("configs/sam2/sam2_hiera_l.yaml", 48, 1_305_216, 3_661_952),
]


def fill(model: nn.Module) -> None:
    """With B = 0 no gradient reaches A, and nothing differs from the base."""
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_b, std=0.05)


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    """SAM 2.1 tiny with adapters everywhere, trained by nobody: copy it before changing it."""
    model = build_lora_model(build(TINY), {**EVERYWHERE, "dropout": 0.1})
    fill(model)
    return model


@pytest.mark.parametrize("config, blocks, in_attention, everywhere", SIZES, ids=[size[0] for size in SIZES])
def test_layers_and_parameters_and_strict_keys_and_step_zero(config, blocks, in_attention, everywhere):
    model = build(config)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    total = sum(value.numel() for value in model.parameters())
    with torch.no_grad():
        before = mask_logits(model, noise_image(128))
    build_lora_model(model, EVERYWHERE)

    facts = report(model)
    hit = {group: row["layers"] for group, row in facts["groups"].items()}
    assert {group: len(names) for group, names in hit.items()} == {
        "encoder attention": 2 * blocks,
        "encoder mlp": 2 * blocks,
        "decoder attention": 28,
        "decoder mlp": 4,
    }
    assert hit["encoder attention"] == [
        f"image_encoder.trunk.blocks.{index}.attn.{name}" for index in range(blocks) for name in ("qkv", "proj")
    ]
    assert facts["groups"]["encoder attention"]["trained"] == in_attention
    assert (facts["trained"], facts["total"]) == (everywhere, total + everywhere)

    assert [key for key in model.state_dict() if key not in state] == [
        f"{name}.{kind}" for name, _ in lora_layers(model) for kind in ("lora_a", "lora_b")
    ]
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.fill_(7)
    load_state_dict_into_model(state, model, strict=True, ignore_missing_keys=["*.lora_a", "*.lora_b"])
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())
    with torch.no_grad():
        assert torch.equal(mask_logits(model, noise_image(128)), before) and before.abs().max() > 0.01


def test_the_default_config_hits_what_the_docs_say():
    facts = report(build_lora_model(build(TINY), LoRAConfig()))
    assert list(facts["groups"]) == ["encoder attention", "decoder attention", "decoder mlp"]
    assert facts["trained"] == 220_416 + 94_208 + 73_728


@pytest.mark.parametrize("parts, parameters", [(["q", "v"], 2 * 8 * (96 + 96)), (["q", "k", "v"], 3 * 8 * (96 + 96))])
def test_parts_of_the_fused_layer_leave_the_other_rows_alone(parts, parameters):
    model = build_lora_model(build(TINY), {"targets": PLACES["encoder attention"], "qkv_parts": parts})
    fill(model)
    layers = {name: layer for name, layer in lora_layers(model) if name.endswith("qkv")}
    first = layers["image_encoder.trunk.blocks.0.attn.qkv"]
    assert first.lora_a.numel() + first.lora_b.numel() == parameters
    for layer in layers.values():  # three of these go from d to 6 d: the parts are thirds of the outputs
        q, k, v = layer.delta_weight().chunk(3)
        assert q.any() and v.any() and bool(k.any()) == ("k" in parts)
    assert {layer.out_features // layer.in_features for layer in layers.values()} == {3, 6}


def test_gradients_reach_every_adapter_and_nothing_else(tiny):
    model = copy.deepcopy(tiny).train()
    mask_logits(model, noise_image(128)).square().mean().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.any(), name
        else:
            assert parameter.grad is None, name


def test_frozen_weights_are_bitwise_unchanged_by_training_and_all_adapters_move(tiny):
    model = copy.deepcopy(tiny).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)  # frozen ones too, as the Trainer does
    losses = []
    for _ in range(3):
        loss = mask_logits(model, noise_image(128)).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) != key.endswith(("lora_a", "lora_b")), key


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_whole_models_can_be_copied_and_pickled(tiny, duplicate):
    other = duplicate(tiny).eval()
    with torch.no_grad():
        assert torch.equal(mask_logits(other, noise_image(128)), mask_logits(tiny.eval(), noise_image(128)))
    assert sum(parameter.requires_grad for parameter in other.parameters()) == 2 * len(list(lora_layers(tiny)))


def test_an_attention_block_with_adapters_compiles_into_one_graph(tiny):
    attention = copy.deepcopy(tiny.image_encoder.trunk.blocks[0].attn).eval()
    assert isinstance(attention.qkv, LoRALinear) and isinstance(attention.proj, LoRALinear)
    x = torch.randn(2, 8, 8, 96)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), attention(x))


def test_autocast_over_the_whole_model(tiny):
    model = copy.deepcopy(tiny).train()
    with torch.autocast("cpu", torch.bfloat16):
        logits = mask_logits(model, noise_image(128))
    logits.float().square().mean().backward()
    with torch.no_grad():
        exact = mask_logits(model.eval(), noise_image(128))
        with torch.autocast("cpu", torch.bfloat16):
            close = mask_logits(model, noise_image(128))
    assert logits.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits, and some fifty layers round one after the other
    assert (close.float() - exact).norm() < 0.1 * exact.norm()
    for _, layer in lora_layers(model):
        assert layer.lora_a.grad.isfinite().all() and layer.lora_b.grad.any()
