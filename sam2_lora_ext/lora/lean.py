"""The same layer as `LoRALinear` with a backward pass of its own, which keeps one copy of the input and no dropout mask.

    y = W x + b + s B A D x,   D = diag(m) / (1 - p), m the dropout mask
    dA = s (B^T dy) (D x)^T,   dB = s dy (A D x)^T,   dx = W^T dy + s D A^T B^T dy

What is kept for backward is x itself, the r numbers A D x of each token, and the places of the zeros in m. Plain LoRA keeps
the dropped copy of x, the mask and the update besides; layers that read the same x share it here (under
autocast each keeps its own cast of it).

Shapes: x (..., in), as N tokens (N, in) · W (out, in) · A (n·r, in) · B (out, n·r), block-diagonal for a fused layer.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sam2_lora_ext.lora.layer import LoRALinear, block_diagonal


def dropped_places(tokens: int, features: int, dropout: float, device: torch.device) -> Tensor:
    """Draws which of tokens x features inputs dropout zeroes: their places, ascending, as int64.

    The gaps between the zeros of a Bernoulli sequence are geometric, so p N in numbers are drawn and kept and not N in; on a
    CPU, at p = 0.05, in a third of the time of `bernoulli_`. The number of gaps is fixed, eight standard deviations above what
    is expected; places behind the end become tokens * features, the first number of a spare row.
    """
    count = tokens * features
    draws = math.ceil(count * dropout + 8 * math.sqrt(count * dropout)) + 16
    gaps = torch.empty(draws, dtype=torch.float64, device=device).geometric_(dropout)
    return gaps.cumsum(0).sub_(1).clamp_(max=count).long()


def drop(x: Tensor, places: Tensor | None) -> Tensor:
    """m x (N, in), a copy: without the factor 1 / (1 - p), which goes into the scaling; x itself where nothing is dropped."""
    if places is None:
        return x
    copy = x.new_empty(len(x) + 1, x.shape[1])
    copy[:-1] = x
    return drop_in_place(copy, places)


def drop_in_place(x: Tensor, places: Tensor) -> Tensor:
    """m x (N, in) of an x with a spare row (N + 1, in)."""
    x.view(-1).index_fill_(0, places, 0.0)
    return x[:-1]


class LoRAFunction(torch.autograd.Function):
    """`y` (N, out) of the formula above, from W in any dtype and x (..., in), A and B in that of the result.

    It is for the caller to give `y` the shape of x: a view made in here could not be written to in place afterwards, as SAM 2's
    rotary attention does with its keys.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float, places: Tensor | None
    ) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        low = drop(tokens, places) @ a.t()
        y = F.linear(tokens, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        y.addmm_(low, b.t(), alpha=scaling)  # in place: another (N, out) would cost as much as the product
        needs_x, needs_low = weight.requires_grad or a.requires_grad, b.requires_grad
        ctx.save_for_backward(x if needs_x else None, weight, a, b, low if needs_low else None, places)
        ctx.scaling, ctx.shape = scaling, x.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, low, places = ctx.saved_tensors
        tokens = None if x is None else x.reshape(-1, x.shape[-1])
        dlow = (dy @ b).mul_(ctx.scaling)
        dx = dweight = dbias = da = db = None
        if ctx.needs_input_grad[0]:
            dx = dlow @ a if places is None else drop_in_place(F.pad(dlow, (0, 0, 0, 1)) @ a, places)
            dx = dx.addmm_(dy, weight.to(dy.dtype)).view(ctx.shape)
        if ctx.needs_input_grad[1]:
            dweight = (dy.t() @ tokens).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            dbias = dy.sum(0).to(weight.dtype)
        if ctx.needs_input_grad[3]:
            da = dlow.t() @ drop(tokens, places)
        if ctx.needs_input_grad[4]:
            db = (dy.t() @ low).mul_(ctx.scaling)
        return dx, dweight, dbias, da, db, None, None


class LeanLoRALinear(LoRALinear):
    """`LoRALinear` that computes the same with less kept for backward; parameters, keys and numbers are those of the base.

    The zeros of its dropout come from torch's global generator, so a run is repeated by seeding that, and activation
    checkpointing, which restores it, recomputes with the same zeros. They are not those that the plain layer draws from the
    same seed. Derivatives of derivatives are not available.
    """

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        if not torch.is_autocast_enabled(kind):
            return self._forward(x)
        with torch.autocast(kind, enabled=False):
            return self._forward(x.to(torch.get_autocast_dtype(kind)))

    def _forward(self, x: Tensor) -> Tensor:
        p = self.dropout if self.training else 0.0
        places = dropped_places(x.shape[:-1].numel(), x.shape[-1], p, x.device) if p else None
        a, b = self.factors()
        b = block_diagonal(b, self.parts)
        y = LoRAFunction.apply(
            x, self.weight, self.bias, a.to(x.dtype), b.to(x.dtype), self.scaling / (1 - p), places
        )
        return y.view(*x.shape[:-1], self.out_features)
