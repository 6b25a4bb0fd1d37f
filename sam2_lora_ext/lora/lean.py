"""The same layer as `LoRALinear` with a backward pass of its own, which keeps one copy of the input and no dropout mask.

    y = W x + b + s B A D x,   D = diag(m) / (1 - p), m the dropout mask
    dA = s (B^T dy) (D x)^T,   dB = s dy (A D x)^T,   dx = W^T dy + s D A^T B^T dy

What is kept for backward is x itself (or, in `lean.recompute`, how it was made), the r numbers A D x of each token, and the
gaps between the zeros in m. Plain LoRA keeps the dropped copy of x, the mask and the update besides; layers that read the same
x share it here (under autocast each keeps its own cast of it).

Products with a side of r are bound by memory, and several times slower in some layouts than in others (oneMKL): A D x and
B^T dy are made as (r, N), and the adapted parts of a fused layer each by itself, without the zeros of a block-diagonal B.

Shapes: x (..., in), as N tokens (N, in) · W (out, in) · A (n·r, in) · B (n, d, r), for the n adapted ones of P parts with
d = out / P outputs each.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sam2_lora_ext.lean.recompute import cast
from sam2_lora_ext.lora.layer import LoRALinear

SMALL = 2**14  # numbers of an input, such as a prompt's tokens, up to which the plain way is faster and keeps next to nothing


def is_small(x: Tensor) -> bool:
    """Whether an input goes the plain way."""
    return x.numel() <= SMALL


def drawn_gaps(tokens: int, features: int, dropout: float, device: torch.device) -> Tensor:
    """Draws which of tokens x features inputs dropout zeroes: how far each zero is behind the one before, the first behind place 0.

    The gaps between the zeros of a Bernoulli sequence are geometric, so p N in numbers are drawn and kept and not N in; on a
    CPU, at p = 0.05, in a sixteenth of the time of `bernoulli_`. The number of gaps is fixed, eight standard deviations above
    what is expected. They are kept in 16 bits, or 64 where p < 0.0006, whose largest gap needs more.
    """
    count = tokens * features
    if torch.compiler.is_compiling():
        torch.empty(0).geometric_(dropout)  # draws nothing, but makes p a constant: a symbol cannot be a size
    draws, rate = math.ceil(count * dropout + 8 * math.sqrt(count * dropout)) + 16, -math.log1p(-dropout)
    uniform = torch.empty(draws, dtype=torch.float32, device=device).uniform_(2**-24, 1)
    gaps = torch.rsub(uniform.log_(), 1, alpha=1 / rate)  # 1 + log u / log (1 - p): faster than `geometric_`
    gaps[0].sub_(1)
    return gaps.to(torch.int16 if 24 * math.log(2) / rate < 2**15 - 2 else torch.int64)  # their whole parts


def places_of(gaps: Tensor | None, count: int) -> Tensor | None:
    """The places of the zeros among `count` inputs, ascending; those behind the end become `count`, the first of a spare row."""
    return None if gaps is None else gaps.cumsum(0).clamp_(max=count)  # in 64 bits, as an index is read


def drop(x: Tensor, places: Tensor | None) -> Tensor:
    """m x (N, in), a copy: without the factor 1 / (1 - p), which goes into the scaling; x itself where nothing is dropped."""
    if places is None:
        return x
    copy = x.new_empty(len(x) + 1, x.shape[1])
    copy[:-1] = x
    return drop_in_place(copy, places)


def drop_in_place(x: Tensor, places: Tensor) -> Tensor:
    """m x (N, in) of an x with a spare row (N + 1, in)."""
    if torch.are_deterministic_algorithms_enabled():  # torch refuses `put_` then, as to it places might be there twice
        x.view(-1)[places] = 0.0
    else:
        x.view(-1).put_(places, x.new_zeros(len(places)))  # on a CPU in half the time
    return x[:-1]


def low_input_gradient(dlow: Tensor, a: Tensor, places: Tensor | None) -> Tensor:
    """The gradient m A^T dlow of x (N, in) for that of A m x, dlow (r, N)."""
    dx = dlow.new_empty(dlow.shape[1] + 1, a.shape[1])
    torch.mm(dlow.t(), a, out=dx[:-1])
    return dx[:-1] if places is None else drop_in_place(dx, places)


def adapted(ys: Sequence[Tensor], slices: tuple[bool, ...]) -> list[Tensor]:
    """Of outputs, one tensor or several (N, ...), the slices of equal width that are adapted."""
    each = len(slices) // len(ys)
    pieces = ys if each == 1 else (piece for y in ys for piece in y.chunk(each, 1))
    return [piece for piece, wanted in zip(pieces, slices) if wanted]


class LoRAFunction(torch.autograd.Function):
    """`y` of the formula above, from W in any dtype and x (..., in), A and B in that of the result.

    It returns `outputs` tensors (N, out / outputs), whose gradients need not be put together. The outputs of the layer are looked
    at in equal `slices`, as many as it has parts or as there are tensors, whichever is more; B here is (M, width, r) of the
    M adapted ones. It is for the caller to give the tensors the shape of x: a view made in here could not be written to
    in place afterwards, as SAM 2's rotary attention does with its keys.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float, gaps: Tensor | None,
        slices: tuple[bool, ...], outputs: int,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        tokens = x.reshape(-1, x.shape[-1])
        places = places_of(gaps, tokens.numel())
        low = (a @ drop(tokens, places).t()).view(len(a) // b.shape[2], b.shape[2], len(tokens))  # n r N
        each = len(b) // len(low)
        biases = [None] * outputs if bias is None else bias.to(x.dtype).chunk(outputs)
        ys = tuple(F.linear(tokens, part, bias) for part, bias in zip(weight.to(x.dtype).chunk(outputs), biases))
        for m, y in enumerate(adapted(ys, slices)):  # in place: another (N, out) costs as much as the product
            y.addmm_(low[m // each].t(), b[m].t(), alpha=scaling)
        needs_x, needs_low = weight.requires_grad or a.requires_grad, b.requires_grad
        ctx.save_for_backward(x if needs_x else None, weight, a, b, low if needs_low else None, gaps)
        ctx.scaling, ctx.shape, ctx.slices = scaling, x.shape, slices
        return ys

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(dys[0].device.type, enabled=False):
            return _gradients(ctx, *dys)


def _gradients(ctx, *dys: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, a, b, low, gaps = ctx.saved_tensors
    places = places_of(gaps, math.prod(ctx.shape))
    tokens = None if x is None else x.reshape(-1, x.shape[-1])
    dslices, n = adapted(dys, ctx.slices), len(a) // b.shape[2]
    each = len(b) // n
    dlows: list[Tensor] = []  # n, each (r, N)
    for m, dy in enumerate(dslices):
        if m % each:
            dlows[-1].addmm_(b[m].t(), dy.t())
        else:
            dlows.append(b[m].t() @ dy.t())
    dlow = (dlows[0] if n == 1 else torch.cat(dlows)).mul_(ctx.scaling)
    dx = dweight = dbias = da = db = None
    if ctx.needs_input_grad[0]:
        dx = low_input_gradient(dlow, a, places)
        for dy, part in zip(dys, weight.to(dlow.dtype).chunk(len(dys))):
            dx.addmm_(dy, part)
        dx = dx.view(ctx.shape)
    if ctx.needs_input_grad[1]:
        dweight = torch.cat([dy.t() @ tokens for dy in dys]).to(weight.dtype)
    if ctx.needs_input_grad[2]:
        dbias = torch.cat([dy.sum(0) for dy in dys]).to(weight.dtype)
    if ctx.needs_input_grad[3]:
        da = dlow @ drop(tokens, places)
    if ctx.needs_input_grad[4]:
        db = torch.stack([(low[m // each] @ dy).t() for m, dy in enumerate(dslices)]).mul_(ctx.scaling)
    return dx, dweight, dbias, da, db, None, None, None, None


class LeanLoRALinear(LoRALinear):
    """`LoRALinear` that computes the same with less kept for backward; parameters, keys and numbers are those of the base.

    An input of at most `SMALL` numbers goes the plain way. The zeros of the dropout come from torch's global generator, so a
    run is repeated by seeding that, and activation checkpointing, which restores it, recomputes with the same zeros. Above
    `SMALL` they are not those that the plain layer draws from the same seed, and derivatives of derivatives are not available.
    """

    def forward(self, x: Tensor, outputs: int | None = None) -> Tensor | tuple[Tensor, ...]:
        """x (..., in) to y (..., out).

        With `outputs` to as many equal parts of y (of a fused layer: as it has parts), above `SMALL` each in a tensor of its own,
        so that their gradients need not be put together.

        Raises:
            ValueError: the outputs or the parts do not divide so.
        """
        if outputs is not None and (self.out_features % outputs or outputs % len(self.parts)):
            raise ValueError(f"{self.out_features} outputs in {len(self.parts)} parts do not come apart in {outputs}")
        if is_small(x):
            # Flat there is less to do in backward; of tokens that are apart in memory it would be a copy, with other zeros.
            flat = x.flatten(0, -2) if x.dim() > 2 and x.is_contiguous() else x
            y = super().forward(flat).view(*x.shape[:-1], self.out_features)
            return y if outputs is None else y.chunk(outputs, -1)
        ys = self._outputs(x, outputs or 1)
        return ys[0] if outputs is None else ys

    def dropped(self, x: Tensor) -> tuple[Tensor | None, float]:
        """Draws which of x (..., in) the dropout zeroes, None where nothing is; and the scaling with its factor 1 / (1 - p)."""
        p = self.dropout if self.training else 0.0
        return drawn_gaps(x.shape[:-1].numel(), x.shape[-1], p, x.device) if p else None, self.scaling / (1 - p)

    def _outputs(self, x: Tensor, count: int) -> tuple[Tensor, ...]:
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                return self._outputs(cast(x, torch.get_autocast_dtype(kind)), count)
        gaps, scaling = self.dropped(x)
        a, b = self.factors()
        each = max(count // len(self.parts), 1)
        slices = tuple(part for part in self.parts for _ in range(each))
        a, b = a.to(x.dtype), b.to(x.dtype).view(sum(slices), -1, b.shape[1])
        ys = LoRAFunction.apply(x, self.weight, self.bias, a, b, scaling, gaps, slices, count)
        return tuple(y.view(*x.shape[:-1], y.shape[1]) for y in ys)
