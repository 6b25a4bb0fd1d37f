"""The same layer as `LoRALinear` with a backward pass of its own, which keeps one copy of the input and no dropout mask.

    y = W x + b + s B A D x,   D = diag(m) / (1 - p), m the dropout mask
    dA = s (B^T dy) (D x)^T,   dB = s dy (A D x)^T,   dx = W^T dy + s D A^T B^T dy

What is kept for backward is x itself, the r numbers A D x of each token, and the places of the zeros in m. Plain LoRA keeps
the dropped copy of x, the mask and the update besides; layers that read the same x share it here (under
autocast each keeps its own cast of it).

Products with a side of r are bound by memory, and several times slower in some layouts than in others (oneMKL): A D x and
B^T dy are made as (r, N), and the P parts of a fused layer each by itself, without the zeros of a block-diagonal
B. (Where only some parts are adapted, B is block-diagonal and P = 1.)

Shapes: x (..., in), as N tokens (N, in) · W (out, in) · A (P·r, in) · B (P, d, r) of P parts with d = out / P outputs each.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sam2_lora_ext.lean.recompute import cast
from sam2_lora_ext.lora.layer import LoRALinear, block_diagonal

SMALL = 2**14  # numbers of an input, such as a prompt's tokens, up to which the plain way is faster and keeps next to nothing


def dropped_places(tokens: int, features: int, dropout: float, device: torch.device) -> Tensor:
    """Draws which of tokens x features inputs dropout zeroes: their places, ascending, as int64.

    The gaps between the zeros of a Bernoulli sequence are geometric, so p N in numbers are drawn and kept and not N in; on a
    CPU, at p = 0.05, in a sixteenth of the time of `bernoulli_`. The number of gaps is fixed, eight standard deviations above
    what is expected; places behind the end become tokens * features, the first number of a spare row.
    """
    count = tokens * features
    torch.empty(0).geometric_(dropout)  # draws nothing; a constant p to `torch.compile`, whose symbols cannot be sizes
    draws = math.ceil(count * dropout + 8 * math.sqrt(count * dropout)) + 16
    uniform = 1 - torch.rand(draws, dtype=torch.float32, device=device)  # in (0, 1]
    gaps = uniform.log_().mul_(1 / math.log1p(-dropout)).floor_().add_(1)  # faster than `geometric_`
    return gaps.cumsum(0, dtype=torch.int64).sub_(1).clamp_(max=count)


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


def by_part(x: Tensor, parts: int) -> Tensor:
    """(N, out) as (P, N, d)."""
    return x.reshape(len(x), parts, x.shape[1] // parts).transpose(0, 1)


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
        low = (a @ drop(tokens, places).t()).view(len(b), b.shape[2], len(tokens))  # P r N
        y = F.linear(tokens, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        for part, low_part, b_part in zip(y.chunk(len(b), 1), low, b):  # in place: another (N, out) costs as much as the product
            part.addmm_(low_part.t(), b_part.t(), alpha=scaling)
        needs_x, needs_low = weight.requires_grad or a.requires_grad, b.requires_grad
        if places is not None and x.numel() < 2**31:
            places = places.int()  # to be kept
        ctx.save_for_backward(x if needs_x else None, weight, a, b, low if needs_low else None, places)
        ctx.scaling, ctx.shape = scaling, x.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, low, places = ctx.saved_tensors
        tokens = None if x is None else x.reshape(-1, x.shape[-1])
        places = None if places is None else places.long()
        dlow = (b.mT @ by_part(dy, len(b)).mT).mul_(ctx.scaling).view(len(a), len(dy))
        dx = dweight = dbias = da = db = None
        if ctx.needs_input_grad[0]:
            dx = dlow.t() @ a if places is None else drop_in_place(F.pad(dlow, (0, 1)).t() @ a, places)
            dx = dx.addmm_(dy, weight.to(dy.dtype)).view(ctx.shape)
        if ctx.needs_input_grad[1]:
            dweight = (dy.t() @ tokens).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            dbias = dy.sum(0).to(weight.dtype)
        if ctx.needs_input_grad[3]:
            da = dlow @ drop(tokens, places)
        if ctx.needs_input_grad[4]:
            db = (low @ by_part(dy, len(b))).mul_(ctx.scaling).mT
        return dx, dweight, dbias, da, db, None, None


class LeanLoRALinear(LoRALinear):
    """`LoRALinear` that computes the same with less kept for backward; parameters, keys and numbers are those of the base.

    An input of at most `SMALL` numbers goes the plain way. The zeros of the dropout come from torch's global generator, so a
    run is repeated by seeding that, and activation checkpointing, which restores it, recomputes with the same zeros. Above
    `SMALL` they are not those that the plain layer draws from the same seed, and derivatives of derivatives are not available.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() <= SMALL:
            return super().forward(x)
        kind = x.device.type
        if not torch.is_autocast_enabled(kind):
            return self._forward(x)
        with torch.autocast(kind, enabled=False):
            return self._forward(cast(x, torch.get_autocast_dtype(kind)))

    def _forward(self, x: Tensor) -> Tensor:
        p = self.dropout if self.training else 0.0
        places = dropped_places(x.shape[:-1].numel(), x.shape[-1], p, x.device) if p else None
        a, b = self.factors()
        b = b.view(len(self.parts), -1, b.shape[1]) if all(self.parts) else block_diagonal(b, self.parts)[None]
        y = LoRAFunction.apply(
            x, self.weight, self.bias, a.to(x.dtype), b.to(x.dtype), self.scaling / (1 - p), places
        )
        return y.view(*x.shape[:-1], self.out_features)
