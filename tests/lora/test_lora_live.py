"""The table of adapters on one base: names, nesting, moves of the model, copies, and the time of a switch."""

import copy
import pickle
import time
from statistics import median

import pytest
import torch
from torch import nn

from helpers.stock_models import build
from sam2_lora_ext.lora import Adapter, LayerAdapter, build_lora_model
from sam2_lora_ext.lora.live import (
    active_adapter,
    adapter_names,
    disable_adapters,
    put_adapter,
    remove_adapter,
    set_adapter,
)
from sam2_lora_ext.utils.errors import UserError

X = torch.arange(12.0).reshape(3, 4) / 10


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(4, 4), Head()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.first(x))


def full(model: nn.Module, *modules: str) -> dict[str, torch.Tensor]:
    return {key: value + 0.5 for key, value in model.state_dict().items() if key.startswith(modules)}


def adapters() -> dict[str, Adapter]:
    """Of different layers, kinds and modules, also one inside the other."""
    plain = LayerAdapter(torch.full((1, 4), 0.5), torch.full((4, 1), 0.3), 2.0)
    dora = LayerAdapter(torch.full((2, 4), 0.2), torch.full((2, 2), 0.1), 1.0, magnitude=torch.tensor([1.0, 2.0]))
    return {
        "first": Adapter({"first": plain}),
        "inner": Adapter({"head.out": dora}, full(Model(), "head.norm"), ["head.norm"]),
        "head": Adapter({"first": plain}, full(Model(), "head."), ["head"]),
    }


@pytest.fixture
def model() -> nn.Module:
    made = Model()
    for name, adapter in adapters().items():
        put_adapter(made, name, adapter)
    return made


@pytest.fixture
def expected() -> dict[str | None, torch.Tensor]:
    found = {None: Model()(X)}
    for name, adapter in adapters().items():
        alone = Model()
        put_adapter(alone, name, adapter)
        set_adapter(alone, name)
        found[name] = alone(X)
    assert len({value.sum().item() for value in found.values()}) == 4
    return found


def test_every_switch_leaves_nothing(model, expected):
    for name in ("first", "head", "inner", "first", None, "inner", "head", None, "head", "first"):
        set_adapter(model, name)
        assert torch.equal(model(X), expected[name]) and active_adapter(model) == name
    assert adapter_names(model) == ["first", "inner", "head"]


def test_layers_share_the_bases_weights(model):
    weight = model.first.weight
    set_adapter(model, "first")
    assert model.first.weight is weight and model.first.lora_a.requires_grad == weight.requires_grad
    assert Model().state_dict().keys() < model.state_dict().keys()


def test_disabling_nests_and_survives_errors(model, expected):
    set_adapter(model, "inner")
    with disable_adapters(model) as same:
        assert same is model and torch.equal(model(X), expected[None])
        set_adapter(model, "first")
        with disable_adapters(model):
            assert torch.equal(model(X), expected[None])
        assert torch.equal(model(X), expected["first"])
    assert torch.equal(model(X), expected["inner"])
    with pytest.raises(KeyError), disable_adapters(model):
        raise KeyError
    assert active_adapter(model) == "inner"
    with disable_adapters(Model()) as bare:
        assert torch.equal(bare(X), expected[None])


def test_adding_and_removing_while_one_is_on(model, expected):
    set_adapter(model, "inner")
    remove_adapter(model, "first")
    assert torch.equal(model(X), expected["inner"])
    put_adapter(model, "again", adapters()["first"])
    assert torch.equal(model(X), expected["inner"]) and adapter_names(model) == ["inner", "head", "again"]
    with disable_adapters(model):
        remove_adapter(model, "inner")
    assert active_adapter(model) is None and torch.equal(model(X), expected[None])
    set_adapter(model, "again")
    assert torch.equal(model(X), expected["first"])
    remove_adapter(model, "again")
    assert torch.equal(model(X), expected[None])


@pytest.mark.parametrize("where", [None, "first", "inner", "head"])
def test_a_model_that_was_moved_meanwhile(model, expected, where):
    """To another dtype, as to another device: what was not in the model then follows when it is put in."""
    set_adapter(model, where)
    model.double().eval()
    for name in ("head", "inner", None, "first", where):
        set_adapter(model, name)
        torch.testing.assert_close(model(X.double()).float(), expected[name])
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
        assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_switch_by_themselves(model, expected, duplicate):
    set_adapter(model, "head")
    other = duplicate(model)
    set_adapter(other, "inner")
    assert torch.equal(other(X), expected["inner"]) and torch.equal(model(X), expected["head"])
    set_adapter(model, None)
    assert torch.equal(other(X), expected["inner"]) and active_adapter(other) == "inner"


def test_wrong_names_list_the_choices(model, expected):
    set_adapter(model, "first")
    for action in (set_adapter, remove_adapter):
        with pytest.raises(UserError, match="there is no adapter 'line 9': there are 'first', 'inner', 'head'"):
            action(model, "line 9")
        assert torch.equal(model(X), expected["first"])
    with pytest.raises(UserError, match="there is no adapter 'x': none was added"):
        set_adapter(Model(), "x")
    for name, words in (("first", "there is an adapter 'first' already"), ("", "not empty, got ''"), (3, "got 3")):
        with pytest.raises(UserError, match=words):
            put_adapter(model, name, adapters()["first"])


def test_adapters_that_do_not_fit_change_nothing(model, expected):
    set_adapter(model, "first")
    wide = LayerAdapter(torch.ones(1, 5), torch.ones(4, 1), 1.0)
    embedding = LayerAdapter(torch.ones(1, 4), torch.ones(4, 1), 1.0)
    with pytest.raises(UserError, match=r"changes first.weight of shape \[4, 5\], which is \[4, 4\] in this model"):
        put_adapter(model, "wide", Adapter({"first": wide}))
    assert torch.equal(model(X), expected["first"]) and "wide" not in adapter_names(model)
    other = nn.Sequential(nn.Embedding(4, 4))
    with pytest.raises(UserError, match="changes 0, a Embedding: only nn.Linear can be adapted"):
        put_adapter(other, "x", Adapter({"0": embedding}))


def test_a_model_with_adapters_of_its_own_is_refused():
    model = build_lora_model(Model(), {"targets": ["first"], "rank": 1})
    for action in (disable_adapters(model).__enter__, lambda: put_adapter(model, "x", adapters()["first"])):
        with pytest.raises(UserError, match="first has an adapter that cannot be switched: build the model with"):
            action()


@pytest.mark.slow
def test_a_switch_of_sam2_large_costs_at_most_ten_walks_over_its_modules():
    model = build("configs/sam2.1/sam2.1_hiera_l.yaml")
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(("image_encoder", "sam_mask_decoder"))
    ]
    shapes = {name: model.get_submodule(name).weight.shape for name in names}
    for adapter in ("one", "two"):
        put_adapter(
            model,
            adapter,
            Adapter(
                {
                    name: LayerAdapter(torch.zeros(8, inputs), torch.zeros(outputs, 8), 16)
                    for name, (outputs, inputs) in shapes.items()
                }
            ),
        )
    assert len(names) > 200
    switches, walks = [], []
    for name in ("one", "two", None) * 5:  # in pairs, for the machine may be busy
        start = time.process_time()
        set_adapter(model, name)
        switches.append(time.process_time() - start)
        start = time.process_time()
        assert sum(1 for _ in model.modules()) > len(names)
        walks.append(time.process_time() - start)
    assert median(switches) < 10 * median(walks)
