"""The mask decoder's attention between the few tokens of a prompt and the many of the image, without projecting the image.

Stock makes keys and values, or queries, of every token of the image to meet a dozen of the prompt's. A product is the same in
any order, so here the prompt's side takes the weights ("absorbed", as in DeepSeek-V2, arXiv 2405.04434, 2.1.2). For image tokens
x and W, b and B of one head:

    k = x W^T + b + s (D x) A^T B^T                    a projection, adapted or not, of x; D the dropout's zeros, as in `lora.lean`
    q k^T = (q W) x^T + (s q B) (A (D x)^T) + q b      scores, for x as keys or as queries
    P v   = (P x) W^T + (P (D x) A^T) s B^T + b        weighted sums; the rows of P add up to 1

W and s B stand side by side, so one product with the prompt's side is enough. Backward keeps x, as the adapters do anyway, P (R, N)
and q [W, s B, b] (R, C + r + 1) of each object, A (D x)^T and what is of the prompt's size; no projection of the image, nor its
gradient, is ever there. It buys bytes with FLOPs: for as many prompt tokens as a head has channels, the most that it is used for,
forward and backward take 1.3 to 1.4 times stock's. Under autocast S is rounded to its type, where stock rounds keys and queries:
on random weights of a few scales the error was 0.5 to 1.7 times stock's.

Legend: O objects · H heads of d channels · T prompt tokens · R = H T · N image tokens of C channels · r rank.
"""

import math
from typing import NamedTuple

import torch
from sam2.modeling.sam.transformer import Attention
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sam2_lora_ext.lean.recompute import cast, recomputed
from sam2_lora_ext.lora.lean import LeanLoRALinear, drop, is_small, low_input_gradient, places_of


class LeanAttention(Attention):
    """`Attention` that keeps less for the same numbers; where it would not, as stock."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Queries (O, N, C), keys and values (O, M, C) to (O, N, C)."""
        image_asks = q.shape[1] > k.shape[1]
        image, prompt = (q, k) if image_asks else (k, q)
        projections = [self.q_proj] if image_asks else [self.k_proj, self.v_proj]
        tokens, channels = prompt.shape[1], self.internal_dim // self.num_heads
        if (
            is_small(image)
            or tokens > channels
            or self.num_heads * tokens >= image.shape[1]
            or (self.training and self.dropout_p)
            or not all(map(can_be_absorbed, projections))
            or not any(map(keeps_input, projections))
        ):
            return super().forward(q, k, v)
        kind = image.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else image.dtype
        return self.out_proj((self._from_image if image_asks else self._from_prompt)(q, k, v, dtype))

    def _from_prompt(self, q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
        queries = self._scaled_heads(self.q_proj(q))
        keys, values = (Projection.of(layer, self.num_heads, cast(x, dtype)) for layer, x in ((self.k_proj, k), (self.v_proj, v)))
        keys = keys._replace(bias=None)  # it adds the same to the scores of all keys, of which softmax sees nothing
        with torch.autocast(q.device.type, enabled=False):
            return self._recombine_heads(values.weighted_sums(keys.scores(queries.to(dtype)).softmax(-1)))

    def _from_image(self, q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
        queries = Projection.of(self.q_proj, self.num_heads, cast(q, dtype))
        keys, values = self._scaled_heads(self.k_proj(k)), self._separate_heads(self.v_proj(v), self.num_heads)
        with torch.autocast(q.device.type, enabled=False):
            scores = queries.scores(keys.to(dtype))
            attention = scores.unflatten(1, keys.shape[1:3]).softmax(2).flatten(1, 2)
            same_head = torch.eye(self.num_heads, dtype=dtype, device=q.device)[:, None, :, None]
            blocks = (values.to(dtype).unsqueeze(3) * same_head).flatten(3).flatten(1, 2)  # O R Hd, block-diagonal
            return recomputed(_transposed_product(attention, blocks), _transposed_product, attention, blocks)

    def _scaled_heads(self, x: Tensor) -> Tensor:
        return self._separate_heads(x / math.sqrt(self.internal_dim // self.num_heads), self.num_heads)


def can_be_absorbed(layer: nn.Module) -> bool:
    """Whether `Projection` may stand for `layer`: frozen, but for the adapter of plain LoRA, and without hooks."""
    if type(layer) not in (nn.Linear, LeanLoRALinear):
        return False
    trained = any(p is not None and p.requires_grad for p in (layer.weight, layer.bias))
    hooks = layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks
    return not (trained or any(hooks))


def keeps_input(layer: nn.Module) -> bool:
    """Whether a layer that `can_be_absorbed` keeps its input, larger than its output, for backward in any case."""
    return isinstance(layer, LeanLoRALinear) and layer.lora_a.requires_grad


class Projection(NamedTuple):
    """What a linear layer, adapted or not, would make of the image's tokens, by heads.

    Attributes:
        x: the tokens (O, N, C).
        weight: (H, d, C).
        bias: (H, d, 1), or None.
        a: A (r, C), or None.
        b: B (H, d, r), or None.
        scaling: s with 1 / (1 - p) of the dropout.
        gaps: of the zeros of the dropout, or None.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    a: Tensor | None
    b: Tensor | None
    scaling: float
    gaps: Tensor | None

    @classmethod
    def of(cls, layer: nn.Module, heads: int, x: Tensor) -> "Projection":
        """In the type of x; draws the zeros of the dropout."""
        weight = layer.weight.to(x.dtype).unflatten(0, (heads, -1))
        bias = None if layer.bias is None else layer.bias.to(x.dtype).view(heads, -1, 1)
        if not isinstance(layer, LeanLoRALinear):
            return cls(x, weight, bias, None, None, 1.0, None)
        gaps, scaling = layer.dropped(x)
        a, b = (factor.to(x.dtype) for factor in layer.factors())
        return cls(x, weight, bias, a, b.unflatten(0, (heads, -1)), scaling, gaps)

    def scores(self, prompt: Tensor) -> Tensor:
        """The products (O, R, N) of a prompt's heads (O, H, T, d) with this projection's."""
        return _Scores.apply(prompt, *self)

    def weighted_sums(self, attention: Tensor) -> Tensor:
        """The sums (O, H, T, d) of this projection's heads with weights (O, R, N) that add up to 1 over the tokens."""
        return _WeightedSums.apply(attention, *self).unflatten(1, (len(self.weight), -1))


class _Scores(torch.autograd.Function):
    """q W x^T + s q B A (D x)^T + q b (O, R, N) of q (O, H, T, d)."""

    @staticmethod
    def forward(
        ctx, q: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor | None, b: Tensor | None, scaling: float,
        gaps: Tensor | None,
    ) -> Tensor:  # fmt: skip
        absorbed = _by_heads(q, _side_by_side(weight, b, scaling, bias))
        full, low_side, constant = _apart(absorbed, x, a)
        low = None if a is None else _low(x, a, gaps)
        scores = full @ x.mT if low is None else (full @ x.mT).baddbmm_(low_side, low)
        ctx.save_for_backward(q if ctx.needs_input_grad[5] else None, absorbed, x, weight, bias, a, b, low, gaps)
        ctx.shape, ctx.scaling = q.shape, scaling
        return scores if bias is None else scores.add_(constant)

    @staticmethod
    @once_differentiable
    def backward(ctx, ds: Tensor) -> tuple[Tensor | None, ...]:
        q, absorbed, x, weight, bias, a, b, low, gaps = ctx.saved_tensors
        with torch.autocast(ds.device.type, enabled=False):
            full, low_side, _ = _apart(absorbed, x, a)
            sides = [ds @ x, *([] if a is None else [ds @ low.mT]), *([] if bias is None else [ds.sum(-1, keepdim=True)])]
            dq = _by_heads(torch.cat(sides, -1).unflatten(1, ctx.shape[1:3]), _side_by_side(weight, b, ctx.scaling, bias).mT)
            db = _factor_gradient(q, sides[1], ctx.scaling) if ctx.needs_input_grad[5] else None
            dlow = None if a is None else low_side.mT @ ds
            dx, da = _token_gradients(dlow, ds.mT, full, x, a, gaps, ctx.needs_input_grad[1], ctx.needs_input_grad[4])
        return dq.view(ctx.shape), dx, None, None, da, db, None, None


class _WeightedSums(torch.autograd.Function):
    """P x W^T + s P (D x) A^T B^T + b (O, R, d) of P (O, R, N)."""

    @staticmethod
    def forward(
        ctx, p: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor | None, b: Tensor | None, scaling: float,
        gaps: Tensor | None,
    ) -> Tensor:  # fmt: skip
        heads = len(weight), -1
        low = None if a is None else _low(x, a, gaps)
        low_sums = None if a is None else p @ low.mT
        sums = p @ x if a is None else torch.cat([p @ x, low_sums], -1)
        y = _by_heads(sums.unflatten(1, heads), _side_by_side(weight, b, scaling, None).mT)
        ctx.save_for_backward(p, low_sums, x, weight, a, b, low, gaps)
        ctx.scaling = scaling
        if bias is not None:
            y.unflatten(1, heads).add_(bias.mT)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        p, low_sums, x, weight, a, b, low, gaps = ctx.saved_tensors
        with torch.autocast(dy.device.type, enabled=False):
            dy = dy.unflatten(1, (len(weight), -1))
            dfull, dlow_sums, _ = _apart(_by_heads(dy, _side_by_side(weight, b, ctx.scaling, None)), x, a)
            dp = dfull @ x.mT if a is None else (dfull @ x.mT).baddbmm_(dlow_sums, low)
            db = _factor_gradient(dy, low_sums, ctx.scaling) if ctx.needs_input_grad[5] else None
            dlow = None if a is None else dlow_sums.mT @ p
            dx, da = _token_gradients(dlow, p.mT, dfull, x, a, gaps, ctx.needs_input_grad[1], ctx.needs_input_grad[4])
        return dp, dx, None, None, da, db, None, None


def _side_by_side(weight: Tensor, b: Tensor | None, scaling: float, bias: Tensor | None) -> Tensor:
    """W, s B and b, as far as they are there: (H, d, C + r + 1)."""
    return torch.cat([weight, *([] if b is None else [b * scaling]), *([] if bias is None else [bias])], 2)


def _apart(rows: Tensor, x: Tensor, a: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Views of rows (O, R, C + r + 1) that were made by that: for W (O, R, C), s B and b, empty where there are none."""
    channels = x.shape[-1]
    rank = 0 if a is None else len(a)
    return rows[..., :channels], rows[..., channels : channels + rank], rows[..., channels + rank :]


def _by_heads(x: Tensor, factor: Tensor) -> Tensor:
    """x (O, H, T, k) times a factor (H, k, m) to (O, R, m); as a product over (O, H) it would keep a copy of the factor for each object."""
    y = x.transpose(0, 1).flatten(1, 2) @ factor  # H OT m
    return y.unflatten(1, (len(x), -1)).transpose(0, 1).flatten(1, 2)


def _factor_gradient(heads: Tensor, low: Tensor, scaling: float) -> Tensor:
    """The gradient of B (H, d, r) for heads (O, H, T, d), which meet low (O, R, r)."""
    low = low.unflatten(1, heads.shape[1:3]).transpose(0, 1).flatten(1, 2)
    return (heads.transpose(0, 1).flatten(1, 2).mT @ low).mul_(scaling)


def _low(x: Tensor, a: Tensor, gaps: Tensor | None) -> Tensor:
    """A (D x)^T (O, r, N), without the factor of D."""
    tokens = x.reshape(-1, x.shape[-1])
    return (a @ drop(tokens, places_of(gaps, x.numel())).t()).view(len(a), *x.shape[:2]).transpose(0, 1)


def _token_gradients(
    dlow: Tensor | None, left: Tensor, right: Tensor, x: Tensor, a: Tensor | None, gaps: Tensor | None, needs_x: bool, needs_a: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x, left @ right (O, N, C) and what comes through `_low`, and of A, for that of `_low` (O, r, N)."""
    if dlow is None:
        return left @ right if needs_x else None, None
    dlow, places = dlow.transpose(0, 1).reshape(len(a), -1), places_of(gaps, x.numel())
    dx = low_input_gradient(dlow, a, places).view(x.shape).baddbmm_(left, right) if needs_x else None
    return dx, dlow @ drop(x.reshape(-1, x.shape[2]), places) if needs_a else None


def _transposed_product(x: Tensor, y: Tensor) -> Tensor:
    return x.mT @ y
