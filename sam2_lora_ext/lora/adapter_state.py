"""An adapter in memory: extracted from a model, validated, attached to another model. Needs torch only."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import mode
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sam2_lora_ext.lora.class_tokens import ClassTokens
from sam2_lora_ext.lora.config import QKV, LoRAConfig
from sam2_lora_ext.lora.inject import build_lora_model, lora_layers
from sam2_lora_ext.lora.layer import PLAIN
from sam2_lora_ext.lora.layer_state import LayerAdapter
from sam2_lora_ext.lora.overview import full_modules
from sam2_lora_ext.utils.errors import UserError

NAME = re.compile(r"[\w-]+(\.[\w-]+)*", re.ASCII)  # of a module; neither a path nor a glob
Model = TypeVar("Model", bound=nn.Module)


@dataclass
class Adapter:
    """What training changed: low-rank updates by layer, and the modules that were trained in full.

    Attributes:
        layers: module name -> its low-rank update.
        full: state dict key -> value, of the modules trained in full.
        full_modules: names of these modules.
        dropout: probability of dropping an input of A in further training.
        metadata: JSON values. `base_id` (see `weights_id`), `base_path` and `model_config` (a stock config's name)
            identify the base; `step`, `metrics` and the like are informative only.
        class_prompts: the class prompts that were trained with the adapter, or None.

    Raises:
        UserError: it is empty, or a tensor has an impossible name or shape, or holds NaN or infinity.
    """

    layers: dict[str, LayerAdapter]
    full: dict[str, Tensor] = field(default_factory=dict)
    full_modules: list[str] = field(default_factory=list)
    dropout: float = 0.0
    metadata: dict[str, Any] = field(default_factory=dict)
    class_prompts: Any = None  # an `adapters.class_prompts.ClassPrompts`, which this folder does not import

    def __post_init__(self) -> None:
        if not self.layers and not self.full:
            raise UserError("the adapter is empty: it holds neither LoRA layers nor modules trained in full")
        for name in (*self.layers, *self.full, *self.full_modules):
            if not NAME.fullmatch(name):
                raise UserError(f"the adapter names {name!r}, which cannot be a part of a model")
        for name, layer in self.layers.items():
            a, b, adapted = layer.lora_a, layer.lora_b, sum(layer.parts)
            if (
                a.dim() != 2
                or b.dim() != 2
                or not adapted
                or a.shape[0] != adapted * b.shape[1]
                or not a.numel()
                or b.shape[0] % adapted
            ):
                raise UserError(
                    f"the adapter of {name} has A {list(a.shape)} and B {list(b.shape)} for "
                    f"{adapted} adapted part(s), expected A (parts x rank, in) and B (parts x out, rank)"
                )
            if (m := layer.magnitude) is not None and (layer.parts != PLAIN or m.shape != b.shape[:1]):
                raise UserError(
                    f"the adapter of {name} has a magnitude {list(m.shape)} for parts {layer.parts} of "
                    f"B {list(b.shape)}, expected one number for each output of a layer adapted as one"
                )
            if not all(tensor.is_floating_point() for tensor in layer.tensors.values()):
                raise UserError(f"the adapter of {name} has values that are not of floating point")
            if not (math.isfinite(layer.scaling) and all(tensor.isfinite().all() for tensor in layer.tensors.values())):
                raise UserError(f"the adapter of {name} holds NaN or infinity: its training diverged, use another one")
        kinds = {layer.magnitude is None: name for name, layer in self.layers.items()}
        if len(kinds) == 2:
            raise UserError(
                f"{kinds[False]} has a magnitude (DoRA), {kinds[True]} has none: all layers or none must have one"
            )
        for key, value in self.full.items():
            if not any(key.startswith(f"{module}.") for module in self.full_modules):
                raise UserError(f"the adapter holds {key}, which is in none of its modules trained in full")
            if not value.isfinite().all():
                raise UserError(f"the adapter's {key} holds NaN or infinity: its training diverged, use another one")

    @classmethod
    def from_model(cls, model: nn.Module, metadata: Mapping[str, Any] | None = None) -> "Adapter":
        """A copy, on the CPU, of a model's adapters and of its other trained parameters, except class tokens.

        Raises:
            UserError: nothing is adapted, or a parameter is trained whose module is not trained as a whole.
        """
        tokens = {name for name, module in model.named_modules() if isinstance(module, ClassTokens)}
        modules = [name for name in full_modules(model) if name not in tokens]
        if modules == [""]:
            raise UserError("every parameter of the model is trained, so there is no adapter: use its checkpoint")
        full = {
            key: copied(value)
            for module in modules
            for key, value in model.state_dict().items()
            if key.startswith(f"{module}.") and key.rpartition(".")[0] not in tokens
        }
        layers, adapters, dropout = {}, {f"{name}.tokens" for name in tokens}, 0.0
        for name, layer in lora_layers(model):
            tensors = {key: copied(value) for key, value in layer.adapter_state().items()}
            layers[name], dropout = LayerAdapter.of(tensors, layer.alpha, layer.rslora, layer.parts), layer.dropout
            adapters |= {f"{name}.{key}" for key in tensors}
        for key, parameter in model.named_parameters():
            if parameter.requires_grad and key not in full and key not in adapters:
                raise UserError(f"{key} is trained, but not the whole of its module: an adapter cannot hold it alone")
        return cls(layers, full, modules, dropout, dict(metadata or {}))

    @property
    def is_dora(self) -> bool:
        """Whether its layers have magnitudes."""
        return any(layer.magnitude is not None for layer in self.layers.values())

    def misfit(self, state: Mapping[str, Tensor]) -> str | None:
        """A message about the first changed key that is missing in `state` or has another shape; None when all fit."""
        shapes = {f"{name}.weight": layer.shape for name, layer in self.layers.items()}
        for key, shape in {**shapes, **{key: tuple(value.shape) for key, value in self.full.items()}}.items():
            if key not in state or tuple(state[key].shape) != shape:
                found = f"is {list(state[key].shape)}" if key in state else "does not exist"
                return f"the adapter changes {key} of shape {list(shape)}, which {found}"
        return None

    def config(self) -> LoRAConfig:
        """The config with which `inject` adds layers of this adapter's shapes to a model without adapters.

        Raises:
            UserError: fused layers differ in their parts, which no config can express.
        """
        rslora = any(layer.rslora for layer in self.layers.values())
        ranks = {name: layer.rank for name, layer in self.layers.items()}
        alphas = {name: layer.alpha_for(rslora) for name, layer in self.layers.items()}
        rank, alpha = mode(ranks.values() or [8]), mode(alphas.values() or [16])
        parts = {layer.parts for name, layer in self.layers.items() if name.rpartition(".")[2] == "qkv"}
        fused = [flags for flags in parts if len(flags) > 1]
        config = LoRAConfig(
            targets=list(self.layers),
            rank=rank,
            alpha=alpha,
            dropout=self.dropout,
            rslora=rslora,
            rank_pattern={name: value for name, value in ranks.items() if value != rank},
            alpha_pattern={name: value for name, value in alphas.items() if value != alpha},
            qkv_parts=[part for part, adapted in zip(QKV, fused[0]) if adapted] if fused else None,
            trainable=list(self.full_modules),
            variant="dora" if self.is_dora else "lora",
        )
        for name, layer in self.layers.items():
            if layer.parts != config.parts_of(name):
                raise UserError(
                    f"{name} is adapted in the parts {layer.parts}, unlike other layers: no config can express this"
                )
        return config


def apply_adapter(model: nn.Module, adapter: Adapter) -> None:
    """Copies an adapter's tensors into a model that has layers of the same shapes; on an error nothing changes.

    Raises:
        UserError: the model's adapted layers, shapes, parts or scalings, or its full modules, differ.
    """
    layers, state = dict(lora_layers(model)), model.state_dict()
    for name in (*layers, *adapter.layers):
        if name not in layers or name not in adapter.layers:
            raise UserError(
                f"{name} is adapted in the {'adapter' if name in adapter.layers else 'model'} only: "
                "inject with the adapter's own config, or use attach_adapter on a model without adapters"
            )
    values = dict(adapter.full)
    for name, layer in adapter.layers.items():
        own = layers[name]
        if (layer.rank, layer.parts) != (own.rank, own.parts) or not math.isclose(layer.scaling, own.scaling):
            raise UserError(
                f"{name}: the adapter has rank {layer.rank}, scaling {layer.scaling:g} and parts {layer.parts}, "
                f"the model {own.rank}, {own.scaling:g} and {own.parts}: inject with the adapter's own config"
            )
        if set(layer.tensors) != set(own.adapter_state()):
            raise UserError(
                f"{name}: the adapter is {'DoRA' if adapter.is_dora else 'LoRA'}, the model has a "
                f"{type(own).__name__}: inject with the adapter's own config"
            )
        values |= {f"{name}.{key}": tensor for key, tensor in layer.tensors.items()}
    _require_fit(adapter, state)
    with torch.no_grad():
        for key, value in values.items():
            state[key].copy_(value)


def attach_adapter(model: Model, adapter: Adapter) -> Model:
    """Adds an active adapter to a model that has none, in place; all other parameters are frozen.

    Raises:
        UserError: the adapter does not fit the model.
    """
    _require_fit(adapter, model.state_dict())
    build_lora_model(model, adapter.config())
    apply_adapter(model, adapter)
    return model


def copied(tensor: Tensor) -> Tensor:
    """A copy on the CPU that shares no memory."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _require_fit(adapter: Adapter, state: Mapping[str, Tensor]) -> None:
    if words := adapter.misfit(state):
        raise UserError(f"{words} in this model: the adapter belongs to another model")
