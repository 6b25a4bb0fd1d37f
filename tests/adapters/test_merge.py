"""Merging state dicts: merged equals unmerged, dtypes are as documented, mismatches are refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.stock_models import build, train_a_little
from sam2_lora_ext.adapters.merge_state import merge_state_dict
from sam2_lora_ext.deploy.verify import mask_logits, noise_image
from sam2_lora_ext.lora import Adapter, LayerAdapter, LoRALinear, build_lora_model
from sam2_lora_ext.utils.errors import UserError

HEAD = "sam_mask_decoder.iou_prediction_head"
CONFIG = {"rank": 4, "qkv_parts": ["q", "v"], "trainable": [HEAD], "rslora": True}


@pytest.fixture(scope="module")
def base() -> dict[str, Tensor]:
    """The small SAM 2's weights; not to be changed."""
    return {key: value.clone() for key, value in build().state_dict().items()}


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """The same with adapters and a head that have moved; not to be changed."""
    model = build_lora_model(build(), CONFIG)
    train_a_little(model)
    return model.eval()


def adapter_of(**layers: LayerAdapter) -> Adapter:
    return Adapter(layers)


def test_closed_form_on_two_by_two():
    state = {"a.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "a.bias": torch.ones(2), "b": torch.ones(1)}
    layer = LayerAdapter(torch.tensor([[1.0, -1.0]]), torch.tensor([[2.0], [5.0]]), alpha=3.0)
    merged = merge_state_dict(state, adapter_of(a=layer))
    assert merged["a.weight"].tolist() == [[7.0, -4.0], [18.0, -11.0]]
    assert merged["a.bias"] is state["a.bias"] and merged["b"] is state["b"] and list(merged) == list(state)
    assert state["a.weight"].tolist() == [[1.0, 2.0], [3.0, 4.0]]


@given(
    inputs=st.integers(1, 12),
    part=st.integers(1, 8),
    rank=st.integers(1, 6),
    rslora=st.booleans(),
    parts=st.sampled_from([(True,), (True, False, True), (False, True, False)]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=50, deadline=None)
def test_merged_equals_unmerged_in_float64(inputs, part, rank, rslora, parts, seed):
    torch.manual_seed(seed)
    linear = nn.Linear(inputs, part * len(parts)).double()
    layer = LoRALinear(linear, rank, 16, 0.0, parts, rslora)
    nn.init.normal_(layer.lora_b)
    adapter = adapter_of(m=LayerAdapter(layer.lora_a.detach(), layer.lora_b.detach(), 16, rslora, parts))
    merged = merge_state_dict({"m.weight": linear.weight.detach(), "m.bias": linear.bias.detach()}, adapter)
    x = torch.randn(5, inputs, dtype=torch.float64)
    torch.testing.assert_close(F.linear(x, merged["m.weight"], merged["m.bias"]), layer(x), rtol=1e-12, atol=1e-12)


def test_the_merged_model_is_the_adapted_model(base, trained):
    stock = build()
    stock.load_state_dict(merge_state_dict(base, Adapter.from_model(trained)))  # strict: Meta's keys, all of them
    with torch.no_grad():
        merged, live, before = (mask_logits(model, noise_image(128)) for model in (stock, trained, build()))
    assert (merged - live).abs().max() <= 1e-4 < 0.01 < (merged - before).abs().max()


def test_only_what_was_trained_changes(base, trained):
    adapter = Adapter.from_model(trained)
    merged = merge_state_dict(base, adapter)
    changed = {key for key in base if merged[key] is not base[key]}
    assert changed == {f"{name}.weight" for name in adapter.layers} | set(adapter.full)
    assert all(torch.equal(merged[key], value) for key, value in adapter.full.items())


@pytest.mark.parametrize(
    "stored, wanted, expected",
    [
        (torch.float32, None, torch.float32),
        (torch.float64, None, torch.float64),
        (torch.float16, None, torch.float32),
        (torch.bfloat16, None, torch.float32),
        (torch.float32, torch.float16, torch.float16),
        (torch.float16, torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16, torch.float16),
    ],
)
def test_dtypes_and_one_rounding_only(stored, wanted, expected):
    torch.manual_seed(0)
    state = {"a.weight": torch.randn(40, 30).to(stored), "a.bias": torch.randn(40).to(stored), "n": torch.tensor([3])}
    layer = LayerAdapter(torch.randn(4, 30), torch.randn(40, 4), alpha=1.0)
    merged = merge_state_dict(state, adapter_of(a=layer), wanted)
    exact = state["a.weight"].double() + 0.25 * layer.lora_b.double() @ layer.lora_a.double()
    assert torch.equal(merged["a.weight"], exact.to(expected))
    assert torch.equal(merged["a.bias"], state["a.bias"].to(expected)) and merged["n"].dtype == torch.int64


def test_what_does_not_fit_the_base_is_named():
    layer = LayerAdapter(torch.ones(1, 2), torch.ones(3, 1), alpha=1.0)
    fits = {"a.weight": torch.zeros(3, 2)}
    for state, adapter, words in (
        ({"b.weight": torch.zeros(3, 2)}, adapter_of(a=layer), r"a.weight of shape \[3, 2\], which does not exist in"),
        ({"a.weight": torch.zeros(2, 3)}, adapter_of(a=layer), r"a.weight of shape \[3, 2\], which is \[2, 3\] in the"),
        (fits, Adapter({}, {"a.bias": torch.ones(3)}, ["a"]), r"a.bias of shape \[3\], which does not exist"),
        ({**fits, "a.lora_a": torch.ones(1, 2)}, adapter_of(a=layer), "the base itself has adapters"),
        ({"a.weight": torch.full((3, 2), float("nan"))}, adapter_of(a=layer), "a.weight would not be finite"),
        ({**fits, "c": torch.tensor([float("inf")])}, adapter_of(a=layer), "c would not be finite"),
    ):
        with pytest.raises(UserError, match=words):
            merge_state_dict(state, adapter)
    with pytest.raises(UserError, match="a.weight would not be finite .* its values are too large for torch.float16"):
        merge_state_dict({"a.weight": torch.full((3, 2), 1e6)}, adapter_of(a=layer), torch.float16)


def test_large_finite_values_are_no_false_alarm():
    state = {"a.weight": torch.full((3, 2), 3e38)}  # their float32 sum is infinite
    layer = LayerAdapter(torch.ones(1, 2), torch.ones(3, 1), alpha=1.0)
    assert merge_state_dict(state, adapter_of(a=layer))["a.weight"].isfinite().all()
