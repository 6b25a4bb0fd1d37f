"""The mask decoder's upscaling with the pixels of a token beside each other: no pixel is moved before the masks are there.

SAM 2 enlarges the image's tokens twice, each time by a transposed convolution with kernel and stride 2, and adds features of
the image at that size:

    y[:, :, 2 i + a, 2 j + b] = W[:, :, a, b]^T x[:, :, i, j] + bias + f[:, :, 2 i + a, 2 j + b],   a, b in {0, 1}

What comes then, a norm over the channels, GELU and the product that makes the masks, looks at each pixel by itself, so any order
of the pixels will do. Here the four corners (a, b) of a pixel stay where one product (C, 4 C') puts them, and the product starts
from the features, which are brought into that order, with the bias, once for all prediction steps. Only the masks are put in rows.
The second sum, the largest map of a step, is made of little and may be computed again.

Until then, tensors of this order have the shape that stock's have, and their pixels at other places.

Shapes: x (B, C, H, W), of N = H W pixels · W (C, C', 2, 2) · f, y (B, C', 2 H, 2 W).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from sam2.modeling.sam.mask_decoder import MaskDecoder
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sam2_lora_ext.lean.conv import LeanConvTranspose2d
from sam2_lora_ext.lean.recompute import recomputed
from sam2_lora_ext.lean.shared import shared


@dataclass(frozen=True, eq=False)
class ByCorners:
    """Features plus bias, in the order of the corners, and the weight of the product that starts from them.

    Attributes:
        maps: (B, N, 4 C'), or (B, 4 C', N) if planar; B is 1 where all prompts read the same image.
        weight: (C, 4 C'), its columns in the order of those of `maps`: corner by corner, or channel by channel if planar.
        planar: whether the sum has each channel by itself in memory, as a product over the channels wants it, or those of a
            pixel together, as a norm does.
    """

    maps: Tensor
    weight: Tensor
    planar: bool

    def added_to(self, x: Tensor) -> Tensor:
        """The sum, of x (B, C, H, W) in the order of the step before: (B, C', 2 H, 2 W), its pixels in that of the corners."""
        return _Sum.apply(x.to(self.weight.dtype), self.maps, self.weight, self.planar)


class CornerUpscaling(LeanConvTranspose2d):
    """A transposed convolution to whose result features are added at once, as by `dc1(src) + feat_s1` in SAM 2.

    Frozen, it keeps no input, by corners or not.
    """

    def forward(self, x: Tensor) -> "Tensor | _Summand":
        """The result; where it makes corners, what becomes a sum when features are added to it: no tensor before."""
        return _Summand(self, x) if self.makes_corners else super().forward(x)

    @property
    def makes_corners(self) -> bool:
        """Whether a graph is made, not by `torch.compile`, nothing here is trained, and it is of SAM 2's kind.

        That is with a bias, and each pixel becomes four that no other reaches.
        """
        spread = self.kernel_size, self.stride, self.dilation, self.padding, self.output_padding, self.groups
        plain = spread == ((2, 2), (2, 2), (1, 1), (0, 0), (0, 0), 1) and self.bias is not None
        trained = any(parameter.requires_grad for parameter in self.parameters())
        return plain and not trained and torch.is_grad_enabled() and not torch.compiler.is_compiling()


@dataclass(frozen=True)
class _Summand:
    layer: CornerUpscaling
    x: Tensor

    def __add__(self, features: Tensor | ByCorners) -> Tensor:
        if not isinstance(features, ByCorners):
            return LeanConvTranspose2d.forward(self.layer, self.x) + features
        y = features.added_to(self.x)
        return recomputed(y, features.added_to, self.x) if features.planar else y

    __radd__ = __add__


class CornerMaskDecoder(MaskDecoder):
    """`MaskDecoder` that also takes its features by corners."""

    @property
    def makes_corners(self) -> bool:
        """Whether both upscalings can, now, and will when this is called: compiled by itself, it would trace them otherwise."""
        first, _, _, second, _ = self.output_upscaling
        compiled = self._compiled_call_impl is not None or bool({"forward", "predict_masks"} & vars(self).keys())
        return not compiled and first.makes_corners and second.makes_corners

    def predict_masks(self, *args, high_res_features: Sequence[Tensor | ByCorners] | None = None, **kwargs) -> tuple[Tensor, ...]:
        """Stock's masks (B, M, 4 H, 4 W), qualities, tokens and object scores."""
        masks, *others = super().predict_masks(*args, high_res_features=high_res_features, **kwargs)
        if high_res_features is not None and isinstance(high_res_features[0], ByCorners):
            masks = _in_rows(masks)
        return masks, *others


def by_corners(decoder: MaskDecoder, features: list[Tensor] | None) -> list[Tensor] | list[ByCorners] | None:
    """The image's features (B, C', 4 H, 4 W) and (B, C'', 2 H, 2 W) for a decoder, by corners where it can read them so.

    Inside of `sharing` made once for the prediction steps of a frame, which all hand over the same tensors.
    """
    if type(decoder) is not CornerMaskDecoder or features is None or not decoder.makes_corners:
        return features
    last: list[list] = shared(by_corners, list)  # the features of the last call and what was made of them
    if not last or any(one is not other for one, other in zip(last[0], features, strict=True)):
        first, _, _, second, _ = decoder.output_upscaling
        last[:] = features, _sorted(first, second, *features)
    return last[1]


def _sorted(first: CornerUpscaling, second: CornerUpscaling, fine: Tensor, coarse: Tensor) -> list[ByCorners]:
    fine, coarse = (level[:1] if level.stride(0) == 0 else level for level in (fine, coarse))  # the objects of one image
    tokens = coarse.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 2, 4, 3, 5, 1)  # B H W a b C''
    planes = fine.unflatten(3, (-1, 2, 2)).unflatten(2, (-1, 2, 2)).permute(0, 1, 4, 7, 2, 5, 3, 6)  # B C' c d H W a b
    tokens = tokens + first.bias.to(coarse.dtype)
    planes = planes + second.bias.to(fine.dtype)[:, *[None] * 6]
    return [
        ByCorners(planes.flatten(4).flatten(1, 3), _as_autocast(second.weight).flatten(1), True),
        ByCorners(tokens.flatten(3).flatten(1, 2), _as_autocast(first.weight).permute(0, 2, 3, 1).flatten(1), False),
    ]


def _in_rows(masks: Tensor) -> Tensor:
    height, width = (side // 4 for side in masks.shape[2:])
    corners = masks.flatten(2).unflatten(2, (2, 2, height, width, 2, 2))  # B M c d H W a b
    return corners.permute(0, 1, 4, 6, 2, 5, 7, 3).reshape(masks.shape)


def _as_autocast(weight: Tensor) -> Tensor:
    kind = weight.device.type
    return weight.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else weight


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, maps: Tensor, weight: Tensor, planar: bool) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.planar, ctx.one_image, ctx.dtype = x.shape, planar, len(maps) < len(x), maps.dtype
        batch, _, height, width = x.shape
        tokens, w = x.flatten(2).transpose(1, 2), weight.expand(batch, -1, -1)
        one, other = (w.transpose(1, 2), tokens.transpose(1, 2)) if planar else (tokens, w)
        y = torch.baddbmm(maps, one, other) if maps.dtype == x.dtype else maps + one @ other
        y = y.view(batch, -1, 4 * height * width) if planar else y.view(batch, 4 * height * width, -1).transpose(1, 2)
        return y.unflatten(2, (2 * height, 2 * width))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        (weight,), (batch, _, height, width), pixels = ctx.saved_tensors, ctx.shape, dy.flatten(2)
        if ctx.planar:
            dmaps = pixels.reshape(batch, -1, height * width)
            dcorners = dmaps.transpose(1, 2)
        else:
            dmaps = dcorners = pixels.transpose(1, 2).reshape(batch, height * width, -1)
        with torch.autocast(dy.device.type, enabled=False):
            dx = dcorners.to(weight.dtype) @ weight.t()  # B N C: the order in which a norm over the channels wants it
        if not ctx.needs_input_grad[1]:
            dmaps = None
        else:
            dmaps = (dmaps.sum(0, keepdim=True) if ctx.one_image else dmaps).to(ctx.dtype)
        return dx.transpose(1, 2).unflatten(2, (height, width)), dmaps, None, None
