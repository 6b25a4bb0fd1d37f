"""Frozen weights in autocast's dtype leave a training step bitwise the same; only weights that it casts change."""

import pytest
import torch
from torch import nn

from benchmarks.methods import build, make_batch
from helpers.small_runs import make_batch as make_small_batch
from helpers.small_runs import make_model
from sam2_lora_ext.activations.cast import CAST, cast_frozen
from sam2_lora_ext.lora import build_lora_model
from sam2_lora_ext.lora.layer import LoRALinear
from sam2_lora_ext.utils.errors import UserError

CHOICE = {"encoder": 0.5, "decoder": 1, "pool": True, "conv": True}


def two_steps(activations, autocast):
    setup = build("lean", "nano", 128, activations=activations)
    torch.manual_seed(2)
    with torch.no_grad():
        for _, layer in filter(lambda pair: isinstance(pair[1], LoRALinear), setup.model.named_modules()):
            layer.lora_b.normal_(std=0.02)
    values, batch = [], make_batch(128)
    for _ in range(2):
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = setup.step_loss(batch)
        loss.backward()
        values += [loss.detach(), *[p.grad.clone() for p in setup.model.parameters() if p.grad is not None]]
        setup.optimizer.step()
        setup.optimizer.zero_grad()
    return setup.model, values


def test_not_a_bit_changes_under_autocast():
    model, values = two_steps({**CHOICE, "weights": True}, autocast=True)
    _, expected = two_steps(CHOICE, autocast=True)
    assert len(values) == len(expected) > 40 and all(map(torch.equal, values, expected))
    types = {name: p.dtype for name, p in model.named_parameters()}
    assert all(dtype == torch.float32 for name, dtype in types.items() if "lora_" in name or "norm" in name)
    assert types["image_encoder.trunk.blocks.0.attn.qkv.weight"] == torch.bfloat16
    cast = [module for module in model.modules() if isinstance(module, CAST)]
    assert len(cast) > 50 and all(module.weight.dtype == torch.bfloat16 for module in cast)


def test_nothing_is_cast_without_autocast():
    model, _ = two_steps({**CHOICE, "weights": True}, autocast=False)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("lora", "dtype"), [({"variant": "lora"}, torch.bfloat16), ({"variant": "dora"}, torch.float32)]
)
def test_what_is_trained_or_measured_stays(lora, dtype):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8))
    build_lora_model(model, {"targets": ["0"], "trainable": ["1"], **lora})
    cast_frozen(model, torch.bfloat16)
    assert [model[0].weight.dtype, model[1].weight.dtype, model[2].weight.dtype] == [
        dtype,
        torch.float32,
        torch.float32,
    ]


def test_a_model_without_adapters_stays_as_it_is_for_it_is_what_a_run_exports():
    model = make_model(lora={"targets": [], "trainable": ["*.norm1"]}, activations="default")
    with torch.autocast("cpu", torch.bfloat16):
        model(make_small_batch([[1_000_000]]))
    assert {p.dtype for p in model.parameters()} == {torch.float32} and model.weights_dtype is None


def test_a_later_step_without_autocast_is_a_sentence():
    model, batch = make_model(activations="default"), make_small_batch([[1_000_000]])
    model(batch)
    with torch.autocast("cpu", torch.bfloat16):
        model(batch)
    with pytest.raises(
        UserError, match="bfloat16 in an earlier step under autocast, but this step runs without.*activations.weights"
    ):
        model(batch)
