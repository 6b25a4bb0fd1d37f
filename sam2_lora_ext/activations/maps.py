"""Norms and position encodings of maps (B, C, H, W) in fewer operations than SAM 2's."""

from sam2.modeling.position_encoding import PositionEmbeddingSine
from sam2.modeling.sam2_utils import LayerNorm2d
from torch import Tensor
from torch.nn import functional as F


class LeanLayerNorm2d(LayerNorm2d):
    """`LayerNorm2d` by torch's own layer norm, equal to rounding: one operation instead of nine, saves its input once.

    Under a CPU's autocast the result has the dtype of the input, while SAM 2's is float32.
    """

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, self.eps)
        return y.permute(0, 3, 1, 2)


class UnreadPositions(PositionEmbeddingSine):
    """Skips the neck's position encodings: SAM 2 computes and copies them for every level but reads only one.

    `positions` computes that one.
    """

    positions = PositionEmbeddingSine.forward

    def forward(self, x: Tensor) -> Tensor:
        """Positions (B, 0, H, W): without channels."""
        return x.new_empty(len(x), 0, *x.shape[2:])
