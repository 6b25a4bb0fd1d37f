"""Finds the layers that a `LoRAConfig` selects, adds adapters to them, and freezes everything else."""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, TypeVar

from torch import nn

from sam2_lora_ext.lora.config import LoRAConfig
from sam2_lora_ext.lora.layer import LoRALinear
from sam2_lora_ext.lora.overview import report
from sam2_lora_ext.lora.variants import LAYERS
from sam2_lora_ext.utils.errors import UserError

Config = LoRAConfig | Mapping[str, Any]
Model = TypeVar("Model", bound=nn.Module)


class Target(NamedTuple):
    """One layer to adapt: its full module name and the numbers of its adapter."""

    name: str
    rank: int
    alpha: float
    parts: tuple[bool, ...]


def above(name: str) -> Iterator[str]:
    """The names of the modules that contain `name`, the innermost first."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def outermost(names: list[str]) -> list[str]:
    """The outermost names, without those inside another one."""
    return [name for name in names if not any(outer in names for outer in above(name))]


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """The adapted layers with their full names, in the model's order; recognised by type, not by name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoRALinear))


def find_targets(model: nn.Module, config: Config) -> list[Target]:
    """The layers that `config.targets` selects, in the model's order; changes nothing.

    Raises:
        UserError: a glob matches nothing, something that is not an `nn.Linear`, a layer that already has an adapter, or
            a layer inside a module that is trained in full; or the outputs do not divide into q, k and v; or the rank
            of PiSSA is larger than the number of singular values of a weight.
    """
    config = LoRAConfig.of(config)
    modules = {name: module for name, module in model.named_modules() if name}
    wanted = set()
    for glob in config.targets:
        for name in _matches("targets", glob, modules):
            wanted.add(name)
            if isinstance(modules[name], LoRALinear):
                raise UserError(f"{name} has a LoRA adapter already: inject into a model only once, freshly built")
            if type(modules[name]) is not nn.Linear:  # a subclass has its own forward, which an adapter would drop
                raise UserError(
                    f"lora.targets: {glob!r} matches {name}, which is a {type(modules[name]).__name__}; "
                    "only nn.Linear can be adapted: write a narrower glob"
                )
    names = [name for name in modules if name in wanted]
    for outer in find_trainable(model, config):
        for name in names:
            if f"{name}.".startswith(f"{outer}."):
                raise UserError(
                    f"{name} cannot have an adapter, since {outer} is trained in full: "
                    "take it out of lora.targets or of lora.trainable"
                )
    for where in ("rank_pattern", "alpha_pattern"):
        for glob in getattr(config, where):
            _matches(where, glob, names)
    targets = [Target(name, config.rank_of(name), config.alpha_of(name), config.parts_of(name)) for name in names]
    if config.qkv_parts is not None and all(len(target.parts) == 1 for target in targets):
        raise UserError("lora.qkv_parts is set, but no target is named qkv: set it to null, or target fused layers")
    for name, rank, _, parts in targets:
        outputs, inputs = modules[name].weight.shape
        if outputs % len(parts):
            raise UserError(f"{name} has {outputs} outputs, which do not divide into q, k and v")
        if config.variant == "pissa" and rank > (most := min(outputs // len(parts), inputs)):
            raise UserError(
                f"{name} has {most} singular values, fewer than its rank {rank}: give it a lower one in "
                "lora.rank_pattern, or take it out of lora.targets"
            )
    return targets


def find_trainable(model: nn.Module, config: Config) -> list[str]:
    """The outermost modules that `config.trainable` selects, in the model's order.

    Raises:
        UserError: a glob matches nothing, or a module without any parameter.
    """
    config = LoRAConfig.of(config)
    modules = {name: module for name, module in model.named_modules() if name}
    wanted = {name for glob in config.trainable for name in _matches("trainable", glob, modules)}
    found = outermost([name for name in modules if name in wanted])
    for name in found:
        if next(modules[name].parameters(), None) is None:
            raise UserError(
                f"lora.trainable matches {name}, a {type(modules[name]).__name__} without parameters: "
                "name the modules that have some"
            )
    return found


def inject(model: nn.Module, config: Config) -> dict[str, Any]:
    """Replaces every target by a `LoRALinear` that shares its parameters, in place.

    Returns:
        The report (see `report`) of what `freeze` will leave trainable.

    Raises:
        UserError: see `find_targets`; the model is then unchanged.
    """
    config = LoRAConfig.of(config)
    present = next(lora_layers(model), None)
    if present:
        raise UserError(f"{present[0]} has a LoRA adapter already: inject into a model only once, freshly built")
    for name, rank, alpha, parts in find_targets(model, config):
        parent, _, attribute = name.rpartition(".")
        base = model.get_submodule(name)
        layer = LAYERS[config.variant, config.implementation](
            base, rank, alpha, config.dropout, parts, config.rslora, config.dropout_on
        )
        setattr(model.get_submodule(parent), attribute, layer)
    return report(model, _trained(model, config))


def freeze(model: nn.Module, config: Config) -> None:
    """Enables gradients for the adapters and the modules that `config.trainable` selects, and for nothing else.

    Raises:
        UserError: nothing would be left to train, or a glob is wrong (see `find_trainable`).
    """
    trained = _trained(model, LoRAConfig.of(config))
    if not trained:
        raise UserError("the model has no LoRA layer and lora.trainable is empty: inject adapters before freezing")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)


def build_lora_model(model: Model, lora: Config) -> Model:
    """Adds adapters to an instantiated SAM 2 and freezes the rest, in place; for Hydra and for scripts.

    Args:
        model: a SAM 2 without adapters; its weights may be loaded before or after, from Meta's own keys.
        lora: a `LoRAConfig` or a mapping of its fields.

    Returns:
        The same model.
    """
    inject(model, lora)
    freeze(model, lora)
    return model


def _trained(model: nn.Module, config: LoRAConfig) -> set[str]:
    adapters = {
        f"{name}.{key}"
        for name, layer in lora_layers(model)
        for key in layer.adapter_parameters()
        if not (config.freeze_a and key == "lora_a")
    }
    return adapters | {
        f"{outer}.{name}"
        for outer in find_trainable(model, config)
        for name, _ in model.get_submodule(outer).named_parameters()
    }


def _matches(where: str, glob: str, names: Iterable[str]) -> list[str]:
    found = [name for name in names if fnmatchcase(name, glob)]
    if not found:
        near = difflib.get_close_matches(glob, names, 1, cutoff=0)
        hint = f"; the closest name is {near[0]}" if near else ""
        raise UserError(f"lora.{where}: {glob!r} matches nothing{hint}")
    return found
