"""Two pointwise convolutions in a row as one: the neck's of a large level, and the mask decoder's, which alone reads it.

    y = W2 (W1 x + b1) + b2 = (W2 W1) x + (W2 b1 + b2)

SAM 2's neck gives each level 256 channels. Of the two largest its mask decoder makes 32 and 64 at once, by `conv_s0` and
`conv_s1`. The 256 at a quarter of the image's side are the largest map of the model; where both convolutions are frozen,
neither it nor its gradient is made here. `image_encoder` then hands the trunk's own maps on at these levels.

Shapes: x (B, C, H, W) of the trunk · W1 (256, C) · W2 (32 or 64, 256) · y (B, 32 or 64, H, W).
"""

import torch
from sam2.modeling.sam2_base import SAM2Base
from torch import Tensor, nn

from sam2_lora_ext.lean.conv import LeanConv2d, frozen_pointwise
from sam2_lora_ext.lean.recompute import cast


class _Pair:
    """A convolution of the neck and the one after it."""

    def __init__(self, first: nn.Conv2d, second: nn.Conv2d):
        self.first, self.second = first, second

    @property
    def is_frozen(self) -> bool:
        return not any(parameter.requires_grad for conv in (self.first, self.second) for parameter in conv.parameters())

    def __call__(self, x: Tensor) -> Tensor:
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                return self(cast(x, torch.get_autocast_dtype(kind)))
        wide = torch.promote_types(x.dtype, torch.float32)  # in which the factors, of x's type, are multiplied
        w1, b1, w2, b2 = (value.to(x.dtype).to(wide) for conv in (self.first, self.second) for value in (conv.weight, conv.bias))
        w1, w2 = w1.flatten(1), w2.flatten(1)
        return frozen_pointwise(x, (w2 @ w1)[..., None, None].to(x.dtype), (w2 @ b1 + b2).to(x.dtype))


class PassedLateral(nn.Sequential):
    """A convolution of the neck that is left to the `HighResConv` after it, where both are frozen."""

    pair: _Pair

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) as it is."""
        return x if self.pair.is_frozen else super().forward(x)


class HighResConv(LeanConv2d):
    """A convolution of the mask decoder that also does the neck's before it, where both are frozen."""

    pair: _Pair

    def forward(self, x: Tensor) -> Tensor:
        """x to y."""
        return self.pair(x) if self.pair.is_frozen else super().forward(x)


def pair_convolutions(model: SAM2Base) -> None:
    """Changes the classes of the convolutions of a model's two largest levels, in place, if they are as in SAM 2's own configs."""
    neck, decoder = model.image_encoder.neck, model.sam_mask_decoder
    if not model.use_high_res_features_in_sam or {0, 1} & set(neck.fpn_top_down_levels):
        return
    for lateral, second in zip(reversed(neck.convs), (decoder.conv_s0, decoder.conv_s1)):
        if _is_pointwise(lateral.conv) and _is_pointwise(second):
            lateral.pair = second.pair = _Pair(lateral.conv, second)
            lateral.__class__, second.__class__ = PassedLateral, HighResConv


def _is_pointwise(conv: nn.Module) -> bool:
    how = type(conv) in (nn.Conv2d, LeanConv2d) and (conv.kernel_size, conv.stride, conv.padding, conv.groups)
    return how == ((1, 1), (1, 1), (0, 0), 1) and conv.bias is not None
