"""`LoRALinear` with its own backward pass, for which it saves only two large tensors: dropped input and dropout mask.

    y = W x + b + B' A D x,          B' = s B,   D x = native_dropout(x)
    dB' = dy (A D x)^T,   dA = B'^T dy (D x)^T,   dx = W^T dy + D A^T B'^T dy

The plain layer also saves x or the update, and passes over the outputs twice more: here one fused product (`addmm`)
computes and adds the update. A and B' are cast, and B is scaled, once for all uses in a forward pass (`lora.shared`).

Shapes: x (..., in) · W (out, in) · A (n·r, in) · B' (out, n·r), block-diagonal for a fused layer.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sam2_lora_ext.lora.layer import LoRALinear, block_diagonal
from sam2_lora_ext.lora.shared import shared


class LoRAFunction(torch.autograd.Function):
    """The formula above for N tokens x (N, in) and frozen W and b; A and B' have the dtype of x, W and b any."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, dropout: float) -> Tensor:
        weight = weight.to(x.dtype)
        dropped, mask = torch.native_dropout(x, dropout, True) if dropout else (x, None)
        low = dropped @ a.t()  # N n·r
        y = F.linear(x, weight, None if bias is None else bias.to(x.dtype)).addmm_(low, b.t())
        _, _, _, a_trained, b_trained, _ = ctx.needs_input_grad
        ctx.save_for_backward(weight, a, b, dropped if a_trained else None, low if b_trained else None, mask)
        ctx.dropout = dropout
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, a, b, dropped, low, mask = ctx.saved_tensors
        needs_x, _, _, needs_a, needs_b, _ = ctx.needs_input_grad
        with torch.autocast(dy.device.type, enabled=False):
            dlow, dx = dy @ b, None
            if needs_x:
                dx = dlow @ a
                if mask is not None:
                    dx = torch.ops.aten.native_dropout_backward(dx, mask, 1 / (1 - ctx.dropout))
                dx.addmm_(dy, weight)
            da = dlow.t() @ dropped if needs_a else None
            db = dy.t() @ low if needs_b else None
        return dx, None, None, da, db, None


class LeanLoRALinear(LoRALinear):
    """`LoRALinear` with the same results and less saved for backward; parameters and state dict keys are the same.

    If the weight itself is trained, it computes like the plain layer. Second derivatives are not available.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad):
            return super().forward(x)
        kind = x.device.type
        if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(kind))
        with torch.autocast(kind, enabled=False):
            a, b = shared((self, x.dtype), lambda: self._factors_for(x.dtype))
            dropout = self.dropout if self.training and self.dropout_on == "inputs" else 0.0
            a = self.drop_channels(a) if self.dropout_on == "channels" else a
            y = LoRAFunction.apply(x.reshape(-1, self.in_features), self.weight, self.bias, a, b, dropout)
            return y.view(*x.shape[:-1], self.out_features)

    def _factors_for(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A and B' in a dtype."""
        a, b = self.factors()
        return a.to(dtype), block_diagonal((self.scaling * b).to(dtype), self.parts)
