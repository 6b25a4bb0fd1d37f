"""Where the adaptation happened: the norm of each layer's update relative to its weight, and summed by block.

For a layer with weight W and update D = s B A: ||D|| / ||W||, Frobenius norms.
For a block: sqrt(sum ||D||^2 / sum ||W||^2).
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from sam2_lora_ext.lora.adapter import Adapter

BLOCK = re.compile(
    r"(image_encoder\.trunk\.blocks\.\d+|sam_mask_decoder\.transformer\.layers\.\d+|memory_attention\.layers\.\d+)\."
)
SHORT = (
    ("image_encoder.trunk.blocks.", "encoder block "),
    ("sam_mask_decoder.transformer.layers.", "decoder layer "),
    ("sam_mask_decoder.transformer.", "decoder "),
    ("memory_attention.layers.", "memory layer "),
)


@dataclass(frozen=True)
class Change:
    """An update's norm; `relative` is None without the base."""

    name: str
    norm: float
    relative: float | None


def layer_changes(adapter: Adapter, base: Mapping[str, Tensor] | None) -> list[Change]:
    """One row for each adapted layer and each module trained in full, in the order of the adapter."""
    rows = []
    for name, layer in adapter.layers.items():
        norm = float(layer.delta_weight().norm())
        rows.append(Change(name, norm, _relative(norm, base[f"{name}.weight"]) if base is not None else None))
    for key, value in adapter.full.items():
        if base is not None:
            norm = float((value.double() - base[key].double()).norm())
            rows.append(Change(key, norm, _relative(norm, base[key])))
    return rows


def block_changes(adapter: Adapter, base: Mapping[str, Tensor] | None) -> list[Change]:
    """The layers of each block together; layers outside of blocks by the module that they are in."""
    sums: dict[str, list[float]] = {}
    for row in layer_changes(adapter, base):
        total = sums.setdefault(block_of(row.name), [0.0, 0.0])
        total[0] += row.norm**2
        if base is not None:
            weight = base[row.name if row.name in base else f"{row.name}.weight"]
            total[1] += float(weight.double().norm()) ** 2
    return [
        Change(name, math.sqrt(norm), math.sqrt(norm / weight) if weight else None)
        for name, (norm, weight) in sums.items()
    ]


def block_of(name: str) -> str:
    """A short name of a layer's block: `encoder block 3`, `decoder layer 0`, `decoder final_attn_token_to_image`."""
    found = BLOCK.match(name)
    inside = found.group(1) if found else name.rpartition(".")[0]
    for long, short in SHORT:
        if inside.startswith(long):
            return short + inside.removeprefix(long)
    return inside


def _relative(norm: float, weight: Tensor) -> float | None:
    size = float(weight.double().norm())
    return norm / size if size else None
