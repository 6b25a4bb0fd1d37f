"""Operations of the prompt encoder and the mask decoder on maps (B, C, H, W), by fewer and better laid out ones.

Convolutions hand maps on with the channels of a pixel together in memory; the mask decoder's last product wants each channel
by itself. And what hands the encoder's maps to the objects of an image.
"""

from sam2.modeling.position_encoding import PositionEmbeddingSine
from sam2.modeling.sam2_utils import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

from sam2_lora_ext.lean.recompute import recomputed


class LeanLayerNorm2d(LayerNorm2d):
    """`LayerNorm2d` over the channels, to rounding, as torch's own: one operation for nine, which keeps its input once.

    Under a CPU's autocast the result has the type of the input, where stock's is float32.
    """

    def forward(self, x: Tensor) -> Tensor:
        return recomputed(self._normed(x), self._normed, x)

    def _normed(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


class LeanGELU(nn.GELU):
    """`nn.GELU` that may be computed again."""

    def forward(self, x: Tensor) -> Tensor:
        return recomputed(super().forward(x), super().forward, x)


class OfOneImage:
    """Features (H W, 1, C) of the one image of a batch, for SAM 2's `features[:, image_of_each_object]`: a view of them.

    Stock's index copies them for each object, and back in their gradient.
    """

    def __init__(self, features: Tensor):
        self.features = features

    def __getitem__(self, key: tuple[slice, Tensor]) -> Tensor:
        """Features (H W, O, C) for the images [O] of the objects."""
        return self.features.expand(-1, len(key[1]), -1)


class UnreadPositions(PositionEmbeddingSine):
    """The neck's position encodings, which stock makes, holds and copies for every level and reads for one.

    That one is what `positions` makes.
    """

    positions = PositionEmbeddingSine.forward

    def forward(self, x: Tensor) -> Tensor:
        """Positions (B, 0, H, W): without channels."""
        return x.new_empty(len(x), 0, *x.shape[2:])
