"""The mask decoder's attention between the few tokens of a prompt and the many of the image, without projecting the image.

Stock makes keys and values, or queries, of every token of the image to meet a dozen of the prompt's. A product is the same in
any order, so here the prompt's side takes the weights ("absorbed", as in DeepSeek-V2, arXiv 2405.04434, 2.1.2). For image tokens
x and W, b and B of one head:

    k = x W^T + b + s (D x) A^T B^T                    a projection, adapted or not, of x; D the dropout's zeros, as in `lora.lean`
    q k^T = (q W) x^T + (s q B) (A (D x)^T) + q b      scores, for x as keys or as queries
    P v   = (P x) W^T + (P (D x) A^T) s B^T + b        weighted sums; the rows of P add up to 1

Backward keeps x, as the adapters do anyway, P (R, N) and q W (R, C) of each object, and A (D x)^T; no projection of the image, nor
its gradient, is ever there. It buys bytes with FLOPs: for as many prompt tokens as a head has channels, the most that it is
used for, forward and backward take 1.3 to 1.4 times stock's. Under autocast S is rounded to its type, where stock rounds
keys and queries: on random weights of a few scales the error was 0.5 to 1.7 times stock's.

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
        b: s B (H, d, r) with 1 / (1 - p) of the dropout, or None.
        gaps: of the zeros of the dropout, or None.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    a: Tensor | None
    b: Tensor | None
    gaps: Tensor | None

    @classmethod
    def of(cls, layer: nn.Module, heads: int, x: Tensor) -> "Projection":
        """In the type of x; draws the zeros of the dropout."""
        weight = layer.weight.to(x.dtype).unflatten(0, (heads, -1))
        bias = None if layer.bias is None else layer.bias.to(x.dtype).view(heads, -1, 1)
        if not isinstance(layer, LeanLoRALinear):
            return cls(x, weight, bias, None, None, None)
        gaps, scaling = layer.dropped(x)
        a, b = (factor.to(x.dtype) for factor in layer.factors())
        return cls(x, weight, bias, a, b.unflatten(0, (heads, -1)) * scaling, gaps)

    def scores(self, prompt: Tensor) -> Tensor:
        """The products (O, R, N) of a prompt's heads (O, H, T, d) with this projection's."""
        absorbed = _by_heads(prompt, self.weight)
        if self.a is None:
            scores = absorbed @ self.x.mT
        else:
            scores = _Scores.apply(absorbed, _by_heads(prompt, self.b), self.x, self.a, self.gaps)
        return scores if self.bias is None else scores + _by_heads(prompt, self.bias)

    def weighted_sums(self, attention: Tensor) -> Tensor:
        """The sums (O, H, T, d) of this projection's heads with weights (O, R, N) that add up to 1 over the tokens."""
        if self.a is None:
            y = self._of_heads(attention @ self.x, self.weight)
        else:
            full, low = _WeightedSums.apply(attention, self.x, self.a, self.gaps)
            y = self._of_heads(full, self.weight) + self._of_heads(low, self.b)
        return y if self.bias is None else y + self.bias.mT

    def _of_heads(self, rows: Tensor, factor: Tensor) -> Tensor:
        return _by_heads(rows.unflatten(1, (len(factor), -1)), factor.mT).unflatten(1, (len(factor), -1))


def _by_heads(x: Tensor, factor: Tensor) -> Tensor:
    """x (O, H, T, k) times a factor (H, k, m) to (O, R, m); as a product over (O, H) it would keep a copy of the factor for each object."""
    y = x.transpose(0, 1).flatten(1, 2) @ factor  # H OT m
    return y.unflatten(1, (len(x), -1)).transpose(0, 1).flatten(1, 2)


class _Scores(torch.autograd.Function):
    """Q x^T + U A (D x)^T (O, R, N) of Q (O, R, C) and U (O, R, r)."""

    @staticmethod
    def forward(ctx, q: Tensor, u: Tensor, x: Tensor, a: Tensor, gaps: Tensor | None) -> Tensor:
        low = _low(x, a, gaps)
        ctx.save_for_backward(q, u, x, a, low, gaps)
        return (q @ x.mT).baddbmm_(u, low)

    @staticmethod
    @once_differentiable
    def backward(ctx, ds: Tensor) -> tuple[Tensor | None, ...]:
        q, u, x, a, low, gaps = ctx.saved_tensors
        with torch.autocast(ds.device.type, enabled=False):
            dx, da = _low_gradients(u.mT @ ds, ds.mT, q, x, a, gaps, *ctx.needs_input_grad[2:4])
            return ds @ x, ds @ low.mT, dx, da, None


class _WeightedSums(torch.autograd.Function):
    """P x (O, R, C) and P (D x) A^T (O, R, r) of P (O, R, N)."""

    @staticmethod
    def forward(ctx, p: Tensor, x: Tensor, a: Tensor, gaps: Tensor | None) -> tuple[Tensor, Tensor]:
        low = _low(x, a, gaps)
        ctx.save_for_backward(p, x, a, low, gaps)
        return p @ x, p @ low.mT

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor, dlow: Tensor) -> tuple[Tensor | None, ...]:
        p, x, a, low, gaps = ctx.saved_tensors
        with torch.autocast(dy.device.type, enabled=False):
            dx, da = _low_gradients(dlow.mT @ p, p.mT, dy, x, a, gaps, *ctx.needs_input_grad[1:3])
            return (dy @ x.mT).baddbmm_(dlow, low), dx, da, None


def _low(x: Tensor, a: Tensor, gaps: Tensor | None) -> Tensor:
    """A (D x)^T (O, r, N), without the factor of D."""
    tokens = x.reshape(-1, x.shape[-1])
    return (a @ drop(tokens, places_of(gaps, x.numel())).t()).view(len(a), *x.shape[:2]).transpose(0, 1)


def _low_gradients(
    dlow: Tensor, left: Tensor, right: Tensor, x: Tensor, a: Tensor, gaps: Tensor | None, needs_x: bool, needs_a: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x, left @ right (O, N, C) and what comes through `_low`, and of A, for that of `_low` (O, r, N)."""
    dlow, places = dlow.transpose(0, 1).reshape(len(a), -1), places_of(gaps, x.numel())
    dx = low_input_gradient(dlow, a, places).view(x.shape).baddbmm_(left, right) if needs_x else None
    return dx, dlow @ drop(x.reshape(-1, x.shape[2]), places) if needs_a else None


def _transposed_product(x: Tensor, y: Tensor) -> Tensor:
    return x.mT @ y
