"""Computes the norm of each update relative to its weight, by layer and by block.

For a layer whose weight W became W + D: ||D|| / ||W||, Frobenius norms. For a block: sqrt(sum ||D||^2 / sum ||W||^2).
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from sam2_lora_ext.lora.adapter_state import Adapter

BLOCK = re.compile(
    r"image_encoder\.trunk\.blocks\.\d+|sam_mask_decoder\.transformer\.[a-z_]+(\.\d+)?|memory_attention\.layers\.\d+"
)
SHORT = (
    ("image_encoder.trunk.blocks.", "encoder block "),
    ("image_encoder.", "encoder "),
    ("sam_mask_decoder.transformer.layers.", "decoder layer "),
    ("sam_mask_decoder.transformer.", "decoder "),
    ("sam_mask_decoder.", "decoder "),
    ("sam_prompt_encoder.", "prompt encoder "),
    ("memory_attention.layers.", "memory layer "),
)


@dataclass(frozen=True)
class Change:
    """The norms of an update and of its weight; the weight's norm is None without the base."""

    name: str
    norm: float
    weight: float | None

    @property
    def relative(self) -> float | None:
        """The ratio of the two norms; None without the base and for a weight of zeros."""
        return self.norm / self.weight if self.weight else None


def adapter_changes(adapter: Adapter, base: Mapping[str, Tensor] | None) -> list[Change]:
    """A row for each adapted layer and each tensor trained in full, in the order of the adapter.

    Without the base only plain LoRA has rows: the updates of DoRA and full training depend on the base.
    """
    rows = []
    for name, layer in adapter.layers.items():
        if base is not None:
            weight = base[f"{name}.weight"].double()
            rows.append(Change(name, float((layer.merged_weight(weight) - weight).norm()), float(weight.norm())))
        elif layer.magnitude is None:
            rows.append(Change(name, float(layer.delta_weight().norm()), None))
    return rows + (weight_changes(adapter.full, base) if base is not None else [])


def weight_changes(state: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> list[Change]:
    """A row for each tensor that differs from the base's, in the order of the state dict."""
    rows = []
    for key, value in state.items():
        before = base[key].double()
        norm = float((value.double() - before).norm())
        if norm:
            rows.append(Change(key, norm, float(before.norm())))
    return rows


def by_block(rows: Iterable[Change]) -> list[Change]:
    """The rows summed by block; rows outside of blocks are summed by part of the model."""
    sums: dict[str, list[float]] = {}
    known = True
    for row in rows:
        known = known and row.weight is not None
        total = sums.setdefault(block_of(row.name), [0.0, 0.0])
        total[0] += row.norm**2
        total[1] += (row.weight or 0.0) ** 2
    return [Change(name, math.sqrt(a), math.sqrt(b) if known else None) for name, (a, b) in sums.items()]


def block_of(name: str) -> str:
    """A short name of a layer's block: `encoder block 3`, `decoder layer 0`, `decoder final_attn_token_to_image`."""
    found = BLOCK.match(name)
    inside = found.group() if found else ".".join(name.split(".")[:2])
    for long, short in SHORT:
        if inside.startswith(long):
            return short + inside.removeprefix(long)
    return inside
