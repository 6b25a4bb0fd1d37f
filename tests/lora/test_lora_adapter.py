"""Adapters in memory: extracted from models and checkpoints, attached to models, and the message of every mismatch."""

import dataclasses

import pytest
import torch
from torch import nn

from helpers.stock_models import build, train_a_little
from sam2_lora_ext.lora import (
    Adapter,
    LayerAdapter,
    LoRAConfig,
    adapter_from_state,
    apply_adapter,
    attach_adapter,
    build_lora_model,
    inject,
    lora_layers,
)
from sam2_lora_ext.utils.errors import UserError

HEAD = "sam_mask_decoder.iou_prediction_head"
CONFIG = {
    "rank": 3,
    "qkv_parts": ["q", "v"],
    "trainable": [HEAD, "*.norm1"],
    "rslora": True,
    "dropout": 0.1,
    "rank_pattern": {"*.blocks.1.*": 5},
    "alpha_pattern": {"*.out_proj": 7},
}


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """The small SAM 2 with adapters of several ranks and kinds, and modules trained in full; not to be changed."""
    model = build_lora_model(build(), CONFIG)
    train_a_little(model)
    return model


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in ours.items())


def test_taken_from_a_model_and_attached_to_a_bare_one(trained):
    adapter = Adapter.from_model(trained, {"step": 3})
    other = build()
    assert attach_adapter(other, adapter) is other and same(values(other), values(trained))
    for (name, ours), (_, theirs) in zip(lora_layers(trained), lora_layers(other), strict=True):
        assert repr(ours) == repr(theirs), name
        assert torch.equal(adapter.layers[name].delta_weight(), ours.delta_weight(torch.float64))
    assert {name for name, parameter in other.named_parameters() if parameter.requires_grad} == {
        name for name, parameter in trained.named_parameters() if parameter.requires_grad
    }
    assert adapter.metadata == {"step": 3} and adapter.full_modules[-1] == HEAD


def test_it_is_a_copy(trained):
    adapter = Adapter.from_model(trained)
    before = values(trained)
    for layer in adapter.layers.values():
        layer.lora_a.add_(1)
    for value in adapter.full.values():
        value.add_(1)
    assert same(values(trained), before)


def test_the_config_says_what_was_injected(trained):
    config = Adapter.from_model(trained).config()
    assert config.targets == [name for name, _ in lora_layers(trained)]
    assert (config.rslora, config.dropout, config.qkv_parts) == (True, 0.1, ["q", "v"])
    for name, layer in lora_layers(trained):
        assert (config.rank_of(name), config.alpha_of(name)) == (layer.rank, layer.alpha)
        assert config.parts_of(name) == layer.parts


@pytest.mark.parametrize("whole_model", [False, True])
def test_taken_from_a_checkpoint_with_its_config(trained, whole_model):
    """The Trainer saves what is trainable, or with stock settings everything."""
    kept = {name for name, parameter in trained.named_parameters() if parameter.requires_grad or whole_model}
    state = {key: value for key, value in trained.state_dict().items() if key in kept}
    found, expected = adapter_from_state(state, LoRAConfig.of(CONFIG)), Adapter.from_model(trained)
    assert same(found.full, expected.full) and found.full_modules == expected.full_modules
    assert found.config() == expected.config()
    for name, layer in expected.layers.items():
        assert torch.equal(found.layers[name].delta_weight(), layer.delta_weight())


@pytest.mark.parametrize("whole_model", [False, True])
def test_taken_from_a_checkpoint_without_a_config(whole_model):
    model = build()
    base = values(model)
    build_lora_model(model, {"rank": 3, "alpha": 5, "trainable": [HEAD]})
    train_a_little(model)
    kept = {name for name, parameter in model.named_parameters() if parameter.requires_grad or whole_model}
    state = {key: value for key, value in model.state_dict().items() if key in kept}
    with pytest.raises(UserError, match="does not hold alpha.* give --alpha"):
        adapter_from_state(state)
    if whole_model:
        with pytest.raises(UserError, match="holds the whole model, .* give --base"):
            adapter_from_state(state, alpha=5)
    found, expected = adapter_from_state(state, alpha=5, base=base), Adapter.from_model(model)
    assert same(found.full, expected.full) and found.layers.keys() == expected.layers.keys()
    assert all(
        torch.equal(layer.delta_weight(), expected.layers[name].delta_weight()) for name, layer in found.layers.items()
    )


def test_alpha_can_be_given_instead_of_the_configs(trained):
    found = adapter_from_state(trained.state_dict(), LoRAConfig.of(CONFIG), alpha=2)
    assert {layer.alpha for layer in found.layers.values()} == {2}


def test_checkpoints_that_are_not_whole(trained):
    state, config = trained.state_dict(), LoRAConfig.of(CONFIG)
    name, _ = next(lora_layers(trained))
    with pytest.raises(UserError, match=f"{name}.lora_a without its lora_b"):
        adapter_from_state({key: value for key, value in state.items() if key != f"{name}.lora_b"}, config)
    with pytest.raises(UserError, match=f"nothing that lora.trainable's '{HEAD}' matches"):
        adapter_from_state({key: value for key, value in state.items() if not key.startswith(HEAD)}, config)
    with pytest.raises(UserError, match="for 1 adapted part"):
        adapter_from_state({key: value for key, value in state.items() if "lora_" in key}, alpha=1)  # fused q and v
    with pytest.raises(UserError, match="no_mem_embed was trained, but is in no module"):
        adapter_from_state({"no_mem_embed": torch.zeros(1)}, alpha=1)


def test_what_an_adapter_cannot_hold():
    model = build()
    with pytest.raises(UserError, match="every parameter of the model is trained"):
        Adapter.from_model(model)
    build_lora_model(model, {"rank": 2})
    model.no_mem_embed.requires_grad_()
    with pytest.raises(UserError, match="no_mem_embed is trained, but not the whole of its module"):
        Adapter.from_model(model)
    with pytest.raises(UserError, match="the adapter is empty"):
        Adapter.from_model(build().requires_grad_(False))


def layer(a: torch.Tensor | None = None, b: torch.Tensor | None = None, **kwargs) -> LayerAdapter:
    return LayerAdapter(torch.ones(2, 3) if a is None else a, torch.ones(4, 2) if b is None else b, 4.0, **kwargs)


@pytest.mark.parametrize(
    "name, broken, words",
    [
        ("../x", layer(), r"names '../x', which cannot be a part of a model"),
        ("a/b", layer(), "cannot be a part"),
        ("", layer(), "cannot be a part"),
        ("a..b", layer(), "cannot be a part"),
        ("a.*", layer(), "cannot be a part"),
        ("a", layer(torch.ones(3, 3)), r"adapter of a has A \[3, 3\] and B \[4, 2\] for 1 adapted part"),
        ("a", layer(parts=(True, False, True)), "for 2 adapted part"),
        ("a", layer(torch.ones(2)), "adapter of a has A"),
        ("a", layer(b=torch.ones(4, 2, 1)), "adapter of a has A"),
        ("a", layer(torch.ones(0, 3), torch.ones(4, 0)), "adapter of a has A"),
        ("a", layer(torch.ones(2, 3, dtype=torch.int64)), "not of floating point"),
        ("a", layer(torch.full((2, 3), float("nan"))), "holds NaN or infinity"),
        ("a", layer(b=torch.full((4, 2), float("inf"))), "holds NaN or infinity"),
    ],
)
def test_impossible_tensors_and_names(name, broken, words):
    with pytest.raises(UserError, match=words):
        Adapter({name: broken})


def test_full_modules_are_checked_too():
    with pytest.raises(UserError, match="holds b.weight, which is in none of its modules"):
        Adapter({}, {"b.weight": torch.ones(1)}, ["a"])
    with pytest.raises(UserError, match="a.weight holds NaN"):
        Adapter({}, {"a.weight": torch.tensor([float("nan")])}, ["a"])
    alone = Adapter({}, {"a.weight": torch.ones(1)}, ["a"])
    assert alone.config() == LoRAConfig(targets=[], trainable=["a"], dropout=0.0)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"targets": LoRAConfig().targets[:-1]}, "mlp.layers.0 is adapted in the adapter only"),
        (
            {"targets": [*LoRAConfig().targets, "obj_ptr_proj.layers.0"]},
            "obj_ptr_proj.layers.0 is adapted in the model ",
        ),
        ({"rank": 2}, "the adapter has rank 3, scaling .* the model 2"),
        ({"alpha": 3}, "the adapter has rank 3, scaling .* inject with the adapter's own config"),
        ({"rslora": False}, "the adapter has rank 3, scaling"),
        ({"qkv_parts": None}, "and parts"),
    ],
)
def test_an_adapter_that_does_not_fit_leaves_the_model_alone(trained, change, words):
    other = build()
    inject(other, {**CONFIG, **change})
    before = values(other)
    with pytest.raises(UserError, match=words):
        apply_adapter(other, Adapter.from_model(trained))
    assert same(values(other), before)


def test_shapes_and_modules_of_another_model(trained):
    adapter = Adapter.from_model(trained)
    name, part = next(iter(adapter.layers.items()))
    wide = dataclasses.replace(part, lora_a=torch.ones(part.lora_a.shape[0], 5))
    other = build()
    before = values(other)
    for layers, full, words in (
        ({**adapter.layers, name: wide}, adapter.full, rf"{name}.weight of shape \[72, 5\], which is \[72, 24\] i"),
        ({"nowhere": layer()}, adapter.full, r"changes nowhere.weight of shape \[4, 3\], which does not exist"),
        (adapter.layers, {f"{HEAD}.new": torch.ones(1)}, rf"changes {HEAD}.new of shape \[1\], which does not exist"),
    ):
        changed = dataclasses.replace(adapter, layers=layers, full=full)
        with pytest.raises(UserError, match=words):
            attach_adapter(other, changed)
        assert same(values(other), before) and not list(lora_layers(other))
    with pytest.raises(UserError, match="does not exist in this model: the adapter belongs to another model"):
        apply_adapter(trained, changed)


def test_fused_layers_that_differ_have_no_config():
    mixed = Adapter({"a.qkv": layer(parts=(False, True, False)), "b.qkv": layer(b=torch.ones(6, 2))})
    with pytest.raises(UserError, match=r"is adapted in the parts .*, unlike other layers"):
        mixed.config()


def test_kinds_of_scaling_can_be_mixed():
    adapter = Adapter({"a": layer(rslora=True), "b": layer()})
    config = adapter.config()
    assert config.rslora
    for name in "ab":
        alpha = config.alpha_of(name)
        assert alpha / config.rank_of(name) ** 0.5 == pytest.approx(adapter.layers[name].scaling, rel=1e-15)
