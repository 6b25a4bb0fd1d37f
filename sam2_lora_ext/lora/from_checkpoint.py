"""Extracts the adapter from the state dict of a training checkpoint. Needs torch only."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from sam2_lora_ext.lora.adapter_state import Adapter, LayerAdapter, copied
from sam2_lora_ext.lora.class_tokens import STATE_KEY
from sam2_lora_ext.lora.config import LoRAConfig
from sam2_lora_ext.lora.inject import above, outermost
from sam2_lora_ext.lora.variants import TENSORS
from sam2_lora_ext.utils.errors import UserError


def adapter_from_state(
    state: Mapping[str, Tensor],
    config: LoRAConfig | None = None,
    alpha: float | None = None,
    *,
    base: Mapping[str, Tensor] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Adapter:
    """The adapter in the state dict of a training checkpoint, without its frozen weights and class tokens.

    Args:
        state: keys `<module>.lora_a`, `<module>.lora_b` (of a variant, see `TENSORS`), keys of modules trained in
            full, and optionally all others.
        config: the config of the training. Without it no layer counts as fused, and the keys that differ from `base`
            count as trained in full; in a checkpoint without the frozen weights, all other keys do.
        alpha: replaces the config's.
        base: the weights that training started from.
        metadata: see `Adapter`.

    Raises:
        UserError: the keys do not fit the config, or without a config the adapter cannot be determined.
    """
    names = [key.removesuffix(".lora_a") for key in state if key.endswith(".lora_a")]
    if config is None and alpha is None and names:
        raise UserError("a checkpoint does not hold alpha, and its run has no lora.json: give --alpha")
    numbers = config or LoRAConfig()
    if alpha is not None:
        numbers = replace(numbers, alpha=alpha, alpha_pattern={})
    layers = {}
    for name in names:
        tensors = _tensors(name, state, config)
        layers[name] = LayerAdapter.of(tensors, numbers.alpha_of(name), numbers.rslora, numbers.parts_of(name))
    others = [key for key in state if key.rpartition(".")[0] not in layers and key != STATE_KEY]
    modules = _modules_meant(others, config.trainable) if config else _modules_changed(others, state, base, names)
    full = {key: copied(state[key]) for key in others if any(key.startswith(f"{module}.") for module in modules)}
    return Adapter(layers, full, modules, config.dropout if config else 0.0, dict(metadata or {}))


def _tensors(name: str, state: Mapping[str, Tensor], config: LoRAConfig | None) -> dict[str, Tensor]:
    found = {key.removeprefix(f"{name}.") for key in state if key.startswith(f"{name}.lora_")}
    kind = config.variant if config else "dora" if "lora_m" in found else "pissa" if "lora_a0" in found else "lora"
    if missing := [key for key in TENSORS[kind] if key not in found]:
        raise UserError(f"the checkpoint holds {name}.lora_a without its {missing[0]}: it is incomplete")
    return {key: copied(state[f"{name}.{key}"]) for key in TENSORS[kind]}


def _modules_meant(keys: Iterable[str], trainable: list[str]) -> list[str]:
    names = dict.fromkeys(name for key in keys for name in reversed(list(above(key))))
    for glob in trainable:
        if not any(fnmatchcase(name, glob) for name in names):
            raise UserError(f"the checkpoint holds nothing that lora.trainable's {glob!r} matches: it is incomplete")
    return outermost([name for name in names if any(fnmatchcase(name, glob) for glob in trainable)])


def _modules_changed(
    keys: list[str], state: Mapping[str, Tensor], base: Mapping[str, Tensor] | None, adapted: list[str]
) -> list[str]:
    if base is not None:
        keys = [key for key in keys if key not in base or not torch.equal(state[key].float(), base[key].float())]
    elif any(f"{name}.weight" in state for name in adapted):
        raise UserError("the checkpoint holds the whole model, and no lora.json lists what was trained: give --base")
    if alone := [key for key in keys if "." not in key]:
        raise UserError(f"{alone[0]} was trained, but is in no module: an adapter cannot hold it alone")
    return list(dict.fromkeys(key.rpartition(".")[0] for key in keys))
