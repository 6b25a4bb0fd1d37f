"""Two pointwise convolutions in a row as one: the neck's of a large level, and the mask decoder's, which alone reads it.

    y = W2 (W1 x + b1) + b2 = (W2 W1) x + (W2 b1 + b2)

SAM 2's neck gives each level 256 channels. Of the two largest its mask decoder makes 32 and 64 at once, by `conv_s0` and
`conv_s1`. The 256 at a quarter of the image's side are the largest map of the model; where both convolutions are frozen,
neither it nor its gradient is made here. `image_encoder` then hands the trunk's own maps on at these levels.

Shapes: x (B, C, H, W) of the trunk · W1 (256, C) · W2 (32 or 64, 256) · y (B, 32 or 64, H, W).
"""

import torch
from sam2.modeling.backbones.image_encoder import FpnNeck
from sam2.modeling.sam2_base import SAM2Base
from torch import Tensor, nn

from sam2_lora_ext.lean.conv import LeanConv2d, frozen_pointwise


class _Pair:
    """The neck's convolution of a level and the mask decoder's after it, whichever stand there now."""

    def __init__(self, lateral: nn.Sequential, decoder: nn.Module, name: str):
        self.lateral, self.decoder, self.name = lateral, decoder, name

    @property
    def convolutions(self) -> tuple[nn.Module, nn.Module]:
        return self.lateral[-1], getattr(self.decoder, self.name)

    @property
    def is_one(self) -> bool:
        """Whether both are convolutions of 1x1, with nothing between them and nothing to train."""
        both = self.convolutions
        frozen = not any(parameter.requires_grad for conv in both for parameter in conv.parameters())
        return frozen and len(self.lateral) == 1 and all(map(_is_pointwise, both))

    def __call__(self, x: Tensor) -> Tensor:
        """x to y."""
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                return self(x.to(torch.get_autocast_dtype(kind)))
        w1, b1, w2, b2 = (value.to(x.dtype) for conv in self.convolutions for value in (conv.weight, conv.bias))
        w1, w2 = w1.flatten(1), w2.flatten(1)
        return frozen_pointwise(x, (w2 @ w1)[..., None, None], w2 @ b1 + b2)


class PassedLateral(nn.Sequential):
    """The neck's convolution of a level, left to the `HighResConv` after it where the two are one."""

    pair: _Pair

    def forward(self, x: Tensor) -> Tensor:
        return x if self.pair.is_one else super().forward(x)


class HighResConv(LeanConv2d):
    """The mask decoder's convolution of a level, with the neck's before it where the two are one; else a `LeanConv2d`."""

    pair: _Pair

    def forward(self, x: Tensor) -> Tensor:
        return self.pair(x) if self.pair.is_one else super().forward(x)


def pair_convolutions(model: SAM2Base) -> None:
    """Changes the classes of the convolutions of a model's two largest levels, in place.

    Not where the neck adds the map of a smaller level to them, nor where the mask decoder does not read them.
    """
    neck, decoder = model.image_encoder.neck, model.sam_mask_decoder
    if not model.use_high_res_features_in_sam or type(neck) is not FpnNeck or {0, 1} & set(neck.fpn_top_down_levels):
        return
    for lateral, name in zip(reversed(neck.convs), ("conv_s0", "conv_s1")):
        second = getattr(decoder, name)
        if type(lateral) is nn.Sequential and type(second) in (nn.Conv2d, LeanConv2d):
            lateral.pair = second.pair = _Pair(lateral, decoder, name)
            lateral.__class__, second.__class__ = PassedLateral, HighResConv


def _is_pointwise(conv: nn.Module) -> bool:
    if type(conv) not in (nn.Conv2d, LeanConv2d, HighResConv) or conv.bias is None:
        return False
    return (conv.kernel_size, conv.stride, conv.padding, conv.groups) == ((1, 1), (1, 1), (0, 0), 1)
