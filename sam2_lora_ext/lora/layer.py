"""A linear layer with a low-rank update (LoRA, arXiv 2106.09685) whose weight stays where checkpoints have it.

    y = W x + b + s B A dropout(x),   s = alpha / r, or alpha / sqrt(r) when rank-stabilised (arXiv 2312.03732)

A fused layer stacks P equal parts along its outputs (Hiera's `qkv`: the rows of q, then k, then v), d = out / P each.
`parts` selects the n adapted ones. Each has its own r rows of A and its own B, so the full B is block-diagonal.

Shapes: x (..., in) · W (out, in) · b (out) · lora_a (n·r, in) · lora_b (n·d, r) · block-diagonal B (out, n·r).
Variants of this layer are in `variants.py`; what they add to the state dict is named `lora_...` too.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PLAIN = (True,)  # `parts` of a layer that is not fused


def lora_scaling(rank: int, alpha: float, rslora: bool = False) -> float:
    """The factor s in front of B A."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def block_diagonal(lora_b: Tensor, parts: tuple[bool, ...]) -> Tensor:
    """B as one matrix (out, n·r): an adapted part reads its own r columns, the rows of the others are zero."""
    if len(parts) == 1:
        return lora_b
    blocks = iter(lora_b.chunk(sum(parts)))
    no_columns = lora_b.new_zeros(lora_b.shape[0] // sum(parts), 0)
    return torch.block_diag(*[next(blocks) if adapted else no_columns for adapted in parts])


def delta_weight(lora_a: Tensor, lora_b: Tensor, scaling: float, parts: tuple[bool, ...] = PLAIN) -> Tensor:
    """The update s B A of the weight (out, in); merging, exporting and the layer itself use this one definition."""
    return block_diagonal(scaling * lora_b, parts) @ lora_a


def row_norms(weight: Tensor) -> Tensor:
    """|V| (out): the length of each row of a weight V (out, in); for a row of zeros the smallest normal number."""
    return torch.linalg.vector_norm(weight, dim=1).clamp_min(torch.finfo(weight.dtype).tiny)


def merged_weight(weight: Tensor, delta: Tensor, magnitude: Tensor | None = None) -> Tensor:
    """The weight that computes the same without an adapter: W + D, each row scaled to `magnitude` (out) if given."""
    total = delta + weight
    return total if magnitude is None else total * (magnitude / row_norms(total))[:, None]


class LoRALinear(nn.Linear):
    """An `nn.Linear` that adopts the Parameter objects of another one and adds a low-rank update to its output.

    `weight` and `bias` keep their names in the state dict, so the checkpoint of the base still loads. The two new
    parameters are not in submodules, so no adapter key ends in `.weight` or `.bias`. With B = 0, as at the
    start, the output is bitwise the base's. There is no merged state: merging is a function of state dicts.
    """

    def __init__(
        self,
        base: nn.Linear,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        parts: tuple[bool, ...] = PLAIN,
        rslora: bool = False,
        dropout_on: str = "inputs",
    ) -> None:
        """Shares the parameters of `base`, on their device and in their dtype, and draws A from the global generator.

        Args:
            base: the layer to adapt; itself unchanged.
            rank: r of each adapted part.
            alpha: numerator of the scaling s.
            dropout: probability in [0, 1) with which training zeroes an input of A.
            parts: for each of the P stacked outputs, whether it is adapted.
            rslora: scale by alpha / sqrt(r) instead of alpha / r.
            dropout_on: "inputs" draws for each number of x, as PEFT does; "channels" once for all tokens of a call.

        Raises:
            ValueError: an argument is out of its range, or the outputs do not divide into the parts.
        """
        if rank < 1 or not 0.0 <= dropout < 1.0:
            raise ValueError(f"expected a rank of at least 1 and a dropout in [0, 1), got {rank} and {dropout}")
        if not any(parts) or base.out_features % len(parts):
            raise ValueError(f"{base.out_features} outputs cannot be adapted in the parts {parts}")
        nn.Module.__init__(self)  # nn.Linear's own would allocate a second weight
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.train(base.training)
        self.rank, self.alpha, self.dropout, self.rslora = rank, alpha, dropout, rslora
        self.dropout_on = dropout_on
        self.parts = tuple(map(bool, parts))
        self.scaling = lora_scaling(rank, alpha, rslora)
        adapted = sum(self.parts)
        self.lora_a = nn.Parameter(base.weight.new_empty(adapted * rank, self.in_features))
        self.lora_b = nn.Parameter(base.weight.new_empty(adapted * (self.out_features // len(self.parts)), rank))
        self.reset_lora_parameters()

    def reset_lora_parameters(self) -> None:
        """Draws A from U(-1/sqrt(in), 1/sqrt(in)), the start of any `nn.Linear`, and sets B to zero."""
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        nn.init.zeros_(self.lora_b)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.factors()
        if self.dropout_on == "channels":
            low = F.linear(x, self.drop_channels(a))  # (..., n·r)
        else:
            low = F.linear(F.dropout(x, self.dropout, self.training), a)
        update = F.linear(low, block_diagonal(b, self.parts))  # (..., out)
        return F.linear(x, self.weight, self.bias) + self.scaling * update

    def drop_channels(self, a: Tensor) -> Tensor:
        """A (n·r, in) with columns set to zero and the others scaled, as if x had lost these channels in every
        token."""
        return a * F.dropout(a.new_ones(a.shape[1]), self.dropout, self.training) if self.dropout else a

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (n·r, in) and B (n·d, r) of the update, as they are now."""
        return self.lora_a, self.lora_b

    def delta_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The update s B A (out, in) of this layer's weight, computed in `dtype` (default: the adapter's own)."""
        a, b = self.factors()
        return delta_weight(a.to(dtype or a.dtype), b.to(dtype or b.dtype), self.scaling, self.parts)

    def merged_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight (out, in) of an `nn.Linear` that computes the same, in `dtype` (default: the adapter's own)."""
        delta = self.delta_weight(dtype)
        return merged_weight(self.weight.to(delta.dtype), delta)

    def adapter_state(self) -> dict[str, Tensor]:
        """The tensors that this layer adds to the base's keys in a state dict, by name."""
        return {key: value for key, value in self.state_dict().items() if key not in ("weight", "bias")}

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of the adapter that are trained."""
        return {key: value for key, value in self.named_parameters() if key not in ("weight", "bias")}

    def extra_repr(self) -> str:
        facts = f"{super().extra_repr()}, rank={self.rank}, alpha={self.alpha:g}, dropout={self.dropout:g}"
        return facts + (", rslora" if self.rslora else "") + (f", parts={self.parts}" if len(self.parts) > 1 else "")
