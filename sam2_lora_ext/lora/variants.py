"""DoRA (arXiv 2402.09353) and PiSSA (arXiv 2404.02948): adapters initialised from the pretrained weight.

    DoRA    y = g (W x + s B A dropout(x)) + b,   g = m / |W + s B A|
            m is initialised to |W|; the gradient treats |W + s B A| as a constant
    PiSSA   y = W x + b + s (B A - B0 A0) dropout(x)
            B A is initialised to B0 A0, where s B0 A0 are the r largest singular values of W with their vectors

PiSSA's paper trains s B A and replaces the base's weight with the residual W - s B0 A0. The sum above is the same and
leaves W unchanged: its file still loads strictly, and an export is plain LoRA of rank 2r with the factors [A; A0] and
[B, -B0].

SAM 2's Trainer builds the model before it loads the base. So m, or A, B, A0 and B0, are initialised again whenever a
weight is loaded without them. A checkpoint of the Trainer holds them, so a resumed run continues with its own.

Shapes: as in `layer.py`, and m (out) · A0 (n·r, in) · B0 (n·d, r).
"""

from typing import Any

import torch
from torch import Tensor, nn

from sam2_lora_ext.lora.backward import LeanLoRALinear
from sam2_lora_ext.lora.layer import PLAIN, LoRALinear, merged_weight, row_norms


def subtracted(a: Tensor, b: Tensor, a0: Tensor, b0: Tensor, parts: tuple[bool, ...]) -> tuple[Tensor, Tensor]:
    """A (n·2r, in) and B (n·d, 2r) of B A - B0 A0, part by part."""
    pairs = zip(a.chunk(sum(parts)), a0.chunk(sum(parts)))
    return torch.cat([half for pair in pairs for half in pair]), torch.cat([b, -b0], 1)


class BeginsWithBase(LoRALinear):
    """An adapter initialised from the pretrained weight; `mark` names a tensor that the initialisation sets."""

    mark: str

    def begin(self) -> None:
        """Initialises the adapter from the current weight."""
        raise NotImplementedError

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if f"{prefix}weight" in state_dict and f"{prefix}{self.mark}" not in state_dict:
            self.begin()


class DoRALinear(BeginsWithBase):
    """Separate direction and magnitude (`lora_m`, the length of each row); the first output is bitwise the base's."""

    mark = "lora_m"

    def __init__(self, base: nn.Linear, *args: Any, **kwargs: Any) -> None:
        """As in `LoRALinear`; a fused layer can only be adapted as one, since every row has a magnitude."""
        super().__init__(base, *args, **kwargs)
        if self.parts != PLAIN:
            raise ValueError(f"DoRA cannot adapt the parts {self.parts} of a layer")
        self.lora_m = nn.Parameter(base.weight.new_empty(self.out_features))
        self.begin()

    @torch.no_grad()
    def begin(self) -> None:
        self.lora_m.copy_(self._norms())

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        linear = y if self.bias is None else y - self.bias.to(y.dtype)
        return y + (self.lora_m / self._norms() - 1).to(y.dtype) * linear  # at the start y + 0, bitwise

    @torch.no_grad()
    def _norms(self) -> Tensor:
        with torch.autocast(self.weight.device.type, enabled=False):
            return row_norms(self.weight + self.delta_weight())

    def merged_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        delta = self.delta_weight(dtype)
        return merged_weight(self.weight.to(delta.dtype), delta, self.lora_m.to(delta.dtype))


class PiSSALinear(BeginsWithBase):
    """B A is initialised with the largest singular values of the weight, or of each adapted part, instead of zero."""

    mark = "lora_a0"

    def __init__(self, base: nn.Linear, *args: Any, **kwargs: Any) -> None:
        """As in `LoRALinear`; the rank cannot be above that of the weight."""
        super().__init__(base, *args, **kwargs)
        if self.rank > (largest := min(self.in_features, self.out_features // len(self.parts))):
            raise ValueError(f"PiSSA starts with {self.rank} singular values, the weight has {largest}")
        self.register_buffer("lora_a0", torch.empty_like(self.lora_a, requires_grad=False))
        self.register_buffer("lora_b0", torch.empty_like(self.lora_b, requires_grad=False))
        self.begin()

    @torch.no_grad()
    def begin(self) -> None:
        parts = self.weight.float().chunk(len(self.parts))
        found = [torch.linalg.svd(part, full_matrices=False) for part, adapted in zip(parts, self.parts) if adapted]
        roots = [(s[: self.rank] / self.scaling).sqrt() for _, s, _ in found]
        self.lora_a0.copy_(torch.cat([root[:, None] * vh[: self.rank] for root, (_, _, vh) in zip(roots, found)]))
        self.lora_b0.copy_(torch.cat([u[:, : self.rank] * root for root, (u, _, _) in zip(roots, found)]))
        self.lora_a.copy_(self.lora_a0)
        self.lora_b.copy_(self.lora_b0)

    def factors(self) -> tuple[Tensor, Tensor]:
        return subtracted(self.lora_a, self.lora_b, self.lora_a0, self.lora_b0, self.parts)


class LeanDoRALinear(DoRALinear, LeanLoRALinear):
    """`DoRALinear` on `LeanLoRALinear`."""


class LeanPiSSALinear(PiSSALinear, LeanLoRALinear):
    """`PiSSALinear` on `LeanLoRALinear`."""


TENSORS = {  # by `LoRAConfig.variant`: the tensors that a layer adds to the base's keys in a state dict
    "lora": ("lora_a", "lora_b"),
    "dora": ("lora_a", "lora_b", "lora_m"),
    "pissa": ("lora_a", "lora_b", "lora_a0", "lora_b0"),
}
LAYERS: dict[tuple[str, str], type[LoRALinear]] = {  # by `LoRAConfig.variant` and `.implementation`
    ("lora", "plain"): LoRALinear,
    ("lora", "lean"): LeanLoRALinear,
    ("dora", "plain"): DoRALinear,
    ("dora", "lean"): LeanDoRALinear,
    ("pissa", "plain"): PiSSALinear,
    ("pissa", "lean"): LeanPiSSALinear,
}
