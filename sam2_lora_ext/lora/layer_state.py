"""The adapter of one layer, independent of any model. Needs torch only."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sam2_lora_ext.lora.layer import PLAIN, delta_weight, lora_scaling, merged_weight
from sam2_lora_ext.lora.variants import subtracted


@dataclass
class LayerAdapter:
    """The tensors and settings of one `LoRALinear` without its base; see there for the formula and the shapes.

    Attributes:
        magnitude: m (out) of DoRA, see `variants.py`; None for LoRA.
    """

    lora_a: Tensor
    lora_b: Tensor
    alpha: float
    rslora: bool = False
    parts: tuple[bool, ...] = PLAIN
    magnitude: Tensor | None = None

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], alpha: float, rslora: bool, parts: tuple[bool, ...]) -> "LayerAdapter":
        """Builds it from the tensors that the layer has in a state dict, by their names there.

        PiSSA becomes plain LoRA of twice the rank and the same scaling, since the base keeps its initial B0 A0.
        """
        a, b = tensors["lora_a"], tensors["lora_b"]
        if "lora_a0" in tensors:
            scaling = lora_scaling(b.shape[1], alpha, rslora)
            a, b = subtracted(a, b, tensors["lora_a0"], tensors["lora_b0"], parts)
            alpha = scaling / lora_scaling(b.shape[1], 1.0, rslora)
        return cls(a, b, alpha, rslora, parts, tensors.get("lora_m"))

    @property
    def rank(self) -> int:
        """r of each adapted part."""
        return self.lora_b.shape[1]

    @property
    def scaling(self) -> float:
        """The factor s in front of B A."""
        return lora_scaling(self.rank, self.alpha, self.rslora)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the adapted weight."""
        return self.lora_b.shape[0] // sum(self.parts) * len(self.parts), self.lora_a.shape[1]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Its tensors, by their names in the state dict of an adapted layer."""
        named = {"lora_a": self.lora_a, "lora_b": self.lora_b, "lora_m": self.magnitude}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def alpha_for(self, rslora: bool) -> float:
        """The alpha that gives the same scaling with this `rslora`."""
        return self.alpha if rslora == self.rslora else self.scaling / lora_scaling(self.rank, 1.0, rslora)

    def delta_weight(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """The update s B A (out, in), computed in `dtype`."""
        return delta_weight(self.lora_a.to(dtype), self.lora_b.to(dtype), self.scaling, self.parts)

    def merged_weight(self, weight: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """The weight (out, in) of a plain layer equivalent to the base's `weight` with this adapter, in `dtype`."""
        magnitude = None if self.magnitude is None else self.magnitude.to(dtype)
        return merged_weight(weight.to(dtype), self.delta_weight(dtype), magnitude)
