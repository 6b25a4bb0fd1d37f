"""Several adapters on one resident base, switched by exchanging modules of the model. Needs torch only.

The layers of every adapter are built in advance and share the base's weights, so a switch copies nothing. While no
adapter is active, the model holds only the base's own modules, so no effect of an adapter can remain.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import nn

from sam2_lora_ext.lora.adapter_state import Adapter
from sam2_lora_ext.lora.inject import lora_layers
from sam2_lora_ext.lora.layer import LoRALinear
from sam2_lora_ext.lora.layer_state import LayerAdapter
from sam2_lora_ext.lora.variants import DoRALinear
from sam2_lora_ext.utils.errors import UserError

TABLE = "sam2_lora_adapters"  # the attribute of a model that holds its table
Model = TypeVar("Model", bound=nn.Module)


@dataclass
class Table:
    """The adapters of one model.

    Attributes:
        base: module name -> the base's module, for every module that an adapter replaces.
        parents: module name -> the base's module that contains it.
        adapters: adapter's name -> module name -> the module used there while the adapter is active.
        active: the name of the active adapter, or None.
        base_id: `weights_id` of the base, when it is known.
    """

    base: dict[str, nn.Module] = field(default_factory=dict)
    parents: dict[str, nn.Module] = field(default_factory=dict)
    adapters: dict[str, dict[str, nn.Module]] = field(default_factory=dict)
    active: str | None = None
    base_id: str | None = None

    def find(self, name: str) -> dict[str, nn.Module]:
        """The modules of an adapter; for an unknown name a `UserError` lists the known ones."""
        if name not in self.adapters:
            names = ", ".join(map(repr, self.adapters))
            raise UserError(f"there is no adapter {name!r}: {f'there are {names}' if names else 'none was added'}")
        return self.adapters[name]


def table_of(model: nn.Module) -> Table:
    """The model's table of adapters, created empty on first use.

    Raises:
        UserError: the model has adapters that are not in a table, from training or from `attach_adapter`.
    """
    if not hasattr(model, TABLE):
        if fixed := next(lora_layers(model), None):
            raise UserError(
                f"{fixed[0]} has an adapter that cannot be switched: build the model with load_sam2, or "
                "add adapters to a model that has none"
            )
        setattr(model, TABLE, Table())
    return getattr(model, TABLE)


def put_adapter(model: nn.Module, name: str, adapter: Adapter, others: Mapping[str, nn.Module] | None = None) -> None:
    """Prepares an adapter for `set_adapter`; the active adapter does not change.

    Args:
        model: the base, with a table or without.
        name: the adapter's name in the table.
        adapter: the adapter to add.
        others: module name -> a further module that replaces the base's while the adapter is active.

    Raises:
        UserError: the name is not a text or is in use, or the adapter does not fit the model, which is then unchanged.
    """
    table = table_of(model)
    if not isinstance(name, str) or not name:
        raise UserError(f"the name of an adapter must be a text that is not empty, got {name!r}")
    if name in table.adapters:
        raise UserError(f"there is an adapter {name!r} already: remove it first, or choose another name")
    with disable_adapters(model):
        if words := adapter.misfit(model.state_dict()):
            raise UserError(f"{words} in this model: the adapter belongs to another model")
        others = others or {}
        base = {place: model.get_submodule(place) for place in (*adapter.layers, *adapter.full_modules, *others)}
        for place in adapter.layers:
            if type(base[place]) is not nn.Linear:
                raise UserError(
                    f"the adapter changes {place}, a {type(base[place]).__name__}: only nn.Linear can be adapted"
                )
        modules = {place: live_layer(base[place], layer, adapter.dropout) for place, layer in adapter.layers.items()}
        for place in (*adapter.full_modules, *others):
            start = f"{place}."
            modules[place] = trained_copy(
                others.get(place, base[place]),
                {key.removeprefix(start): value for key, value in adapter.full.items() if key.startswith(start)},
            )
        parents = {place: model.get_submodule(place.rpartition(".")[0]) for place in base}
    table.adapters[name] = modules
    # outer modules first, so that inner ones are moved to the device after them
    table.base = dict(sorted((table.base | base).items(), key=lambda entry: entry[0].count(".")))
    table.parents |= parents


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Activates one adapter and deactivates any other; None deactivates all. In place, in about a millisecond.

    A predictor keeps the features that it computed before: call `set_image` or `init_state` again. Do not call this
    while another thread uses the model.

    Raises:
        UserError: there is no such adapter; the names are listed.
    """
    table = table_of(model)
    chosen = {} if name is None else table.find(name)
    for place, base in table.base.items():
        parent, key = table.parents[place], place.rpartition(".")[2]
        present, wanted = getattr(parent, key), chosen.get(place, base)
        if wanted is not present:
            follow(wanted, present)
            setattr(parent, key, wanted)
    table.active = name


def active_adapter(model: nn.Module) -> str | None:
    """The name of the active adapter; None while there is none."""
    return table_of(model).active


def adapter_names(model: nn.Module) -> list[str]:
    """The names of the model's adapters, in the order in which they were added."""
    return list(table_of(model).adapters)


def remove_adapter(model: nn.Module, name: str) -> None:
    """Removes an adapter; if it is active, the base alone remains.

    Raises:
        UserError: there is no such adapter; the names are listed.
    """
    table = table_of(model)
    table.find(name)
    if table.active == name:
        set_adapter(model, None)
    del table.adapters[name]


@contextmanager
def disable_adapters(model: Model) -> Iterator[Model]:
    """Within the block only the base is active; afterwards the previously active adapter is again."""
    before = active_adapter(model)
    set_adapter(model, None)
    try:
        yield model
    finally:
        set_adapter(model, before if before in table_of(model).adapters else None)


@torch.no_grad()
def live_layer(base: nn.Linear, layer: LayerAdapter, dropout: float) -> LoRALinear:
    """A layer that adds the adapter to `base` and shares its parameters; frozen if these are."""
    kind = LoRALinear if layer.magnitude is None else DoRALinear
    live = kind(base, layer.rank, layer.alpha, dropout, layer.parts, layer.rslora)
    for key, parameter in live.adapter_parameters().items():
        parameter.copy_(layer.tensors[key])
        parameter.requires_grad_(base.weight.requires_grad)
    return live


@torch.no_grad()
def trained_copy(base: nn.Module, values: Mapping[str, torch.Tensor]) -> nn.Module:
    """A copy of a module that was trained in full, with its values."""
    module = copy.deepcopy(base)
    state = module.state_dict()
    for key, value in values.items():
        state[key].copy_(value)
    return module


def follow(module: nn.Module, present: nn.Module) -> None:
    """Gives a module the mode, device and dtype of the one that it replaces, since these may have changed."""
    if module.training != present.training:
        module.train(present.training)
    own, wanted = _probe(module), _probe(present)
    if own.device != wanted.device or own.dtype != wanted.dtype:
        module.to(wanted.device, wanted.dtype)


def _probe(module: nn.Module) -> nn.Parameter:
    """A parameter that only this module has, if any; linear layers skip the slow search."""
    if isinstance(module, nn.Linear):
        return module.lora_a if isinstance(module, LoRALinear) else module.weight
    return next(module.parameters())
