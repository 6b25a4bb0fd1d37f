"""Combines several adapters of one base into one: the weighted sum of their updates. Needs torch only.

    W + sum_i w_i s_i B_i A_i  =  W + [w_1 s_1 B_1, w_2 s_2 B_2, ...] [A_1; A_2; ...]

so the combination is an adapter whose rank is the sum of the ranks, with a scaling of 1. A module that one adapter
trained in full becomes W + w (W_full - W).
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sam2_lora_ext.lora import Adapter, LayerAdapter
from sam2_lora_ext.lora.layer import PLAIN, block_diagonal
from sam2_lora_ext.utils.errors import UserError


def combine(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None,
    base: Mapping[str, Tensor],
    names: Sequence[str],
) -> Adapter:
    """The adapter whose update is the weighted sum, in float64; a single adapter of weight 1 is returned unchanged.

    Args:
        adapters: at least one; each fits the base.
        weights: one factor for each adapter; None for a single one means 1.
        base: the weights that all of them were trained on.
        names: of the adapters, for messages.

    Raises:
        UserError: there is not one finite weight other than 0 for each adapter; an adapter occurs twice; they were
            trained on different bases; one is DoRA, which is no sum; or one changes a module that another trained in
            full.
    """
    if weights is None and len(adapters) > 1:
        raise UserError(
            f"{len(adapters)} adapters need --weights, one number each, such as --weights "
            + " ".join(f"{1 / len(adapters):.2g}" for _ in adapters)
        )
    weights = [1.0] if weights is None else list(weights)
    if len(weights) != len(adapters):
        raise UserError(f"--weights has {len(weights)} numbers for {len(adapters)} adapters: give one each")
    for name, weight in zip(names, weights):
        if not math.isfinite(weight) or weight == 0:
            raise UserError(f"the weight of {name} is {weight:g}: give a finite number, or omit the adapter for 0")
    if weights == [1.0]:
        return adapters[0]
    _refuse_meaningless(adapters, names)
    layers: dict[str, list[tuple[float, LayerAdapter]]] = {}
    parts: dict[str, set[tuple[bool, ...]]] = {}
    for weight, adapter in zip(weights, adapters):
        for name, layer in adapter.layers.items():
            layers.setdefault(name, []).append((weight, layer))
            parts.setdefault(name.rpartition(".")[2], set()).add(layer.parts)
    full = {
        key: _blend(base[key], value, weight)
        for weight, adapter in zip(weights, adapters)
        for key, value in adapter.full.items()
    }
    facts = {
        key: adapter.metadata[key]
        for adapter in adapters
        for key in ("base_id", "base_path", "model_config")
        if adapter.metadata.get(key)
    }
    return Adapter(
        {name: _stacked(members, len(parts[name.rpartition(".")[2]]) > 1) for name, members in layers.items()},
        full,
        [module for adapter in adapters for module in adapter.full_modules],
        0.0,
        {**facts, "combined": [{"adapter": name, "weight": weight} for name, weight in zip(names, weights)]},
    )


def _refuse_meaningless(adapters: Sequence[Adapter], names: Sequence[str]) -> None:
    changed = [set(adapter.full) | {f"{name}.weight" for name in adapter.layers} for adapter in adapters]
    for index, (adapter, name) in enumerate(zip(adapters, names)):
        if adapter.is_dora:
            raise UserError(f"{name} is DoRA, whose magnitudes cannot be summed: merge it alone, with weight 1")
        for other in range(len(adapters)):
            if index != other and (both := sorted(set(adapter.full) & changed[other])):
                raise UserError(
                    f"{name} trained {both[0]} in full, and {names[other]} changes it too: the two cannot be summed, "
                    "merge one of them"
                )
            if index < other and _same(adapter, adapters[other]):
                raise UserError(f"{name} and {names[other]} are the same adapter: give it once, with the summed weight")
    bases = [adapter.metadata.get("base_id") for adapter in adapters]
    known = {base: name for base, name in zip(bases, names) if base}
    if len(known) > 1:
        raise UserError(
            f"{' and '.join(known.values())} were trained on different bases ("
            f"{', '.join(f'sha256 {str(key)[:12]}' for key in known)}): their updates do not add up"
        )


def _same(one: Adapter, other: Adapter) -> bool:
    return (
        one.layers.keys() == other.layers.keys()
        and one.full.keys() == other.full.keys()
        and all(
            layer.lora_a.shape == other.layers[name].lora_a.shape
            and torch.equal(layer.lora_a, other.layers[name].lora_a)
            and torch.equal(layer.lora_b, other.layers[name].lora_b)
            for name, layer in one.layers.items()
        )
        and all(torch.equal(value, other.full[key]) for key, value in one.full.items())
    )


def _stacked(members: Sequence[tuple[float, LayerAdapter]], as_one: bool) -> LayerAdapter:
    """The sum of updates of one layer; `as_one` when layers of this kind differ in their parts."""
    parts = PLAIN if as_one else members[0][1].parts
    adapted = sum(parts)
    columns = [[] for _ in range(adapted)]  # A of each part, one below the other
    factors = []
    for weight, layer in members:
        b = layer.lora_b.double() if layer.parts == parts else block_diagonal(layer.lora_b.double(), layer.parts)
        for column, rows in zip(columns, layer.lora_a.double().chunk(adapted)):
            column.append(rows)
        factors.append(weight * layer.scaling * b)
    b = torch.cat(factors, 1)
    return LayerAdapter(torch.cat([rows for column in columns for rows in column]), b, float(b.shape[1]), False, parts)


def _blend(base: Tensor, full: Tensor, weight: float) -> Tensor:
    return full if weight == 1 else base.double() + weight * (full.double() - base.double())
