"""The frozen MLP of a trunk's block: its hidden layer, four times as wide as what it reads, need never be there as a whole.

    y = W2 gelu(h) + b2,   h = W1 x + b1,   dx = W1^T (gelu'(h) * W2^T dy)

Where nothing of it is trained, backward needs h alone, or x, of which it makes h again. Both ways go by a few tokens at a time,
whose hidden layer stays in fast memory; gelu(h) is never there as a whole.

Shapes: x, y (N, C) of N tokens · W1 (4 C, C) · W2 (C, 4 C).
"""

from collections.abc import Callable

import torch
from sam2.modeling.sam2_utils import MLP
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sam2_lora_ext.lean.recompute import cast

CPU_CHUNK, GPU_CHUNK = 2**20, 2**24  # numbers of a temporary tensor at a time; no GPU has timed the second


def is_frozen(mlp: MLP) -> bool:
    """Whether `frozen_mlp` may stand for `mlp`: as SAM 2 makes it for its trunk, and nothing in it trained or adapted."""
    if [type(layer) for layer in mlp.layers] != [nn.Linear] * 2 or mlp.sigmoid_output:
        return False
    fitting = mlp.layers[0].in_features == mlp.layers[1].out_features and type(mlp.act) is nn.GELU and mlp.act.approximate == "none"
    return fitting and not any(parameter.requires_grad for parameter in mlp.parameters())


def frozen_mlp(mlp: MLP, x: Tensor, keeps_hidden: bool = False) -> Tensor:
    """`mlp(x)` for x (..., C), of which backward keeps x, or else h."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:  # which autocast leaves as it is
        with torch.autocast(kind, enabled=False):
            return frozen_mlp(mlp, cast(x, torch.get_autocast_dtype(kind)), keeps_hidden)
    wide, narrow = mlp.layers
    weights = wide.weight, wide.bias, narrow.weight
    if keeps_hidden and x.requires_grad and torch.is_grad_enabled():
        return _WithHidden.apply(x, *weights, narrow.bias)
    return _Result.apply(_Gradient.apply(x, *weights), *weights, narrow.bias)


def _result(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, hidden: Tensor | None = None) -> Tensor:
    """y; also h (..., 4 C), where there is room for it."""
    w1, b1, w2, b2 = (None if weight is None else weight.to(x.dtype) for weight in (w1, b1, w2, b2))
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    for x_few, y_few, *h_few in zip(*_chunks(len(w1), x, y, *([] if hidden is None else [hidden]))):
        _product(F.gelu(_product(x_few, w1, b1, *h_few)), w2, b2, y_few)
    return y


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    return torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)


def _gradient(dy: Tensor, w1: Tensor, w2: Tensor, source: Tensor, hidden: Callable[[Tensor], Tensor]) -> Tensor:
    """dx, from h of a few tokens as `hidden` makes it of as many of `source` (..., any)."""
    w1, w2 = w1.to(dy.dtype), w2.to(dy.dtype)
    dx = torch.empty_like(dy, memory_format=torch.contiguous_format)
    with torch.autocast(dy.device.type, enabled=False):
        for source_few, dy_few, dx_few in zip(*_chunks(len(w1), source, dy, dx)):
            dh = torch.ops.aten.gelu_backward(dy_few @ w2, hidden(source_few))
            torch.mm(dh, w1, out=dx_few)
    return dx


# Two functions, for x must be saved before the result is computed: what checkpointing computes again ends where all that was
# saved is there. So the one in front saves and has the whole gradient, and the one behind hands dy on.
class _Gradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor) -> Tensor:
        ctx.save_for_backward(x, w1, b1, w2)
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, b1, w2 = ctx.saved_tensors
        w1, b1 = (None if weight is None else weight.to(x.dtype) for weight in (w1, b1))
        return _gradient(dy, w1, w2, x, lambda few: _product(few, w1, b1)), None, None, None


class _Result(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, *weights: Tensor | None) -> Tensor:
        return _result(x, *weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        return dy, None, None, None, None


class _WithHidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> Tensor:
        hidden = x.new_empty(*x.shape[:-1], len(w1))
        y = _result(x, w1, b1, w2, b2, hidden)
        ctx.save_for_backward(hidden, w1, w2)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, w1, w2 = ctx.saved_tensors
        return _gradient(dy, w1, w2, hidden, lambda few: few), None, None, None, None


def numbers_at_a_time(device: torch.device) -> int:
    """How many numbers of a temporary tensor stay in fast memory, or nearly."""
    return CPU_CHUNK if device.type == "cpu" else GPU_CHUNK


def _chunks(width: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """The tokens of each of some tensors (..., C), as many at a time as there are numbers of a hidden layer of some width."""
    tokens = max(numbers_at_a_time(tensors[0].device) // width, 1)
    return [tensor.reshape(-1, tensor.shape[-1]).split(tokens) for tensor in tensors]
