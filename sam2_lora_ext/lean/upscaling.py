"""The mask decoder's upscaling with the pixels of a token beside each other: no pixel is moved before the masks are there.

SAM 2 enlarges the image's tokens twice, each time by a transposed convolution with kernel and stride 2, and adds features of
the image at that size:

    y[:, :, 2 i + a, 2 j + b] = W[:, :, a, b]^T x[:, :, i, j] + bias + f[:, :, 2 i + a, 2 j + b],   a, b in {0, 1}

What comes then, a norm over the channels, GELU and the product that makes the masks, looks at each pixel by itself, so any order
of the pixels will do. Here the four corners (a, b) of a pixel stay where one product (C, 4 C') puts them, and the product starts
from the features, which are brought into that order, with the bias, once for all prediction steps. Only the masks are put in rows.

The second sum is the largest map of a step. It, its GELU and the masks go by a few tokens at a time, which stay in fast memory,
and backward makes them again: little is computed for each number of it.

Until then, tensors of this order have the shape that stock's have, and their pixels at other places.

Shapes: x (B, C, H, W), of N = H W pixels · W (C, C', 2, 2) · f, y (B, C', 2 H, 2 W) · M masks.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from sam2.modeling.sam.mask_decoder import MaskDecoder
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sam2_lora_ext.lean.conv import LeanConvTranspose2d
from sam2_lora_ext.lean.maps import PlanarGELU
from sam2_lora_ext.lean.mlp import numbers_at_a_time
from sam2_lora_ext.lean.recompute import cast
from sam2_lora_ext.lean.shared import shared


@dataclass(frozen=True, eq=False)
class ByCorners:
    """Features plus bias, in the order of the corners, and the weight of the product that starts from them.

    B is 1 where all prompts read the same image.
    """

    maps: Tensor
    weight: Tensor


class CoarseByCorners(ByCorners):
    """Of the first sum: maps (B, N, 4 C'), weight (C, 4 C'), both corner by corner, as a norm over the channels wants them."""

    def added_to(self, x: Tensor) -> Tensor:
        """The sum of x (B, C, H, W): (B, C', 2 H, 2 W), its pixels in the order of the corners."""
        return _Sum.apply(x.to(self.weight.dtype), self.maps, self.weight)


class FineByCorners(ByCorners):
    """Of the second sum: maps (B, 4 C', N), weight (C, 4 C'), both channel by channel, as a product over the channels wants them."""

    def added_to(self, x: Tensor) -> "UpscaledFeatures":
        """The sum of x (B, C, H, W) in the order of the step before."""
        return UpscaledFeatures(self, cast(x, self.weight.dtype))


@dataclass(frozen=True, eq=False)
class UpscaledFeatures:
    """The second sum's GELU, of which the mask decoder makes masks: as much of a tensor as it asks for."""

    features: FineByCorners
    x: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, C', 2 H, 2 W)."""
        batch, _, height, width = self.x.shape
        return batch, self.features.weight.shape[1] // 4, 2 * height, 2 * width

    def view(self, *shape: int) -> "UpscaledFeatures":
        """Itself, for `shape` (B, C', 4 H W): its pixels are one axis of the product to come."""
        batch, channels, height, width = self.shape
        assert shape == (batch, channels, height * width), shape
        return self

    def __rmatmul__(self, hyper: Tensor) -> Tensor:
        """Masks (B, M, 4 N) of hypernetwork outputs (B, M, C'), in the order of the corners."""
        return _Masks.apply(self.x, hyper.to(self.x.dtype), self.features.maps, self.features.weight)


class CornerGELU(PlanarGELU):
    """A `PlanarGELU` that leaves `UpscaledFeatures` to the product after it."""

    def forward(self, x: Tensor | UpscaledFeatures) -> Tensor | UpscaledFeatures:
        return x if isinstance(x, UpscaledFeatures) else super().forward(x)


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

    def __add__(self, features: Tensor | ByCorners) -> Tensor | UpscaledFeatures:
        if not isinstance(features, ByCorners):
            return LeanConvTranspose2d.forward(self.layer, self.x) + features
        return features.added_to(self.x)

    __radd__ = __add__


class CornerMaskDecoder(MaskDecoder):
    """`MaskDecoder` that also takes its features by corners, and in training makes one mask where one is wanted.

    Stock makes four and throws three away. For the time of a call `num_mask_tokens` is then 1, so two threads cannot share one.
    """

    @property
    def makes_corners(self) -> bool:
        """Whether both upscalings can, now, and will when this is called: compiled by itself, it would trace them otherwise."""
        first, _, _, second, activation = self.output_upscaling
        compiled = self._compiled_call_impl is not None or bool({"forward", "predict_masks"} & vars(self).keys())
        return not compiled and first.makes_corners and second.makes_corners and type(activation) is CornerGELU

    def forward(
        self, image_embeddings: Tensor, image_pe: Tensor, sparse_prompt_embeddings: Tensor, dense_prompt_embeddings: Tensor,
        multimask_output: bool, repeat_image: bool, high_res_features: Sequence[Tensor | ByCorners] | None = None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Stock's masks, qualities, tokens and object scores; where one mask is wanted in training, no other is made."""
        with self._single_mask(not multimask_output):
            return super().forward(
                image_embeddings, image_pe, sparse_prompt_embeddings, dense_prompt_embeddings, multimask_output, repeat_image,
                high_res_features,
            )  # fmt: skip

    @contextmanager
    def _single_mask(self, wanted: bool) -> Iterator[None]:
        # Trained, the hypernetworks of masks that are thrown away get zeros: DDP waits for them and weight decay acts with them.
        trained = any(parameter.requires_grad for parameter in self.output_hypernetworks_mlps.parameters())
        count = self.num_mask_tokens
        if wanted and self.training and not trained and not torch.compiler.is_compiling():
            self.num_mask_tokens = 1  # of the tokens that came out of the transformer the first; all four went in
        try:
            yield
        finally:
            self.num_mask_tokens = count

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
        FineByCorners(planes.flatten(4).flatten(1, 3), _as_autocast(second.weight).flatten(1)),
        CoarseByCorners(tokens.flatten(3).flatten(1, 2), _as_autocast(first.weight).permute(0, 2, 3, 1).flatten(1)),
    ]


def _in_rows(masks: Tensor) -> Tensor:
    height, width = (side // 4 for side in masks.shape[2:])
    corners = masks.flatten(2).unflatten(2, (2, 2, height, width, 2, 2))  # B M c d H W a b
    return corners.permute(0, 1, 4, 6, 2, 5, 7, 3).reshape(masks.shape)


def _as_autocast(weight: Tensor) -> Tensor:
    kind = weight.device.type
    cast_by_autocast = torch.is_autocast_enabled(kind) and weight.dtype != torch.float64
    return weight.to(torch.get_autocast_dtype(kind)) if cast_by_autocast else weight


def _added(maps: Tensor, one: Tensor, other: Tensor) -> Tensor:
    return torch.baddbmm(maps, one, other) if maps.dtype == one.dtype else maps + one @ other


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, maps: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.one_image, ctx.dtype = x.shape, len(maps) < len(x), maps.dtype
        batch, _, height, width = x.shape
        y = _added(maps, x.flatten(2).transpose(1, 2), weight.expand(batch, -1, -1))
        return y.view(batch, 4 * height * width, -1).transpose(1, 2).unflatten(2, (2 * height, 2 * width))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        (weight,), (batch, _, height, width) = ctx.saved_tensors, ctx.shape
        dmaps = dy.flatten(2).transpose(1, 2).reshape(batch, height * width, -1)
        with torch.autocast(dy.device.type, enabled=False):
            dx = dmaps.to(weight.dtype) @ weight.t()
        if not ctx.needs_input_grad[1]:
            dmaps = None
        else:
            dmaps = (dmaps.sum(0, keepdim=True) if ctx.one_image else dmaps).to(ctx.dtype)
        return dx.transpose(1, 2).unflatten(2, (height, width)), dmaps, None


class _Masks(torch.autograd.Function):
    """masks = hyper gelu(y),   y = W^T x + maps, its rows (C', 4) and columns N seen as C' and (4, N).

        dhyper = dmasks gelu(y)^T,   dy = gelu'(y) * hyper^T dmasks,   dmaps = dy,   dx = W dy

    Shapes: x (B, C, H, W) · hyper (B, M, C') · maps (B, 4 C', N) · W (C, 4 C') · masks (B, M, 4 N).
    """

    @staticmethod
    def forward(ctx, x: Tensor, hyper: Tensor, maps: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, hyper, maps, weight)
        masks = hyper.new_empty(*hyper.shape[:2], 4, maps.shape[2])
        weight_t = weight.t().expand(len(x), -1, -1)
        with torch.autocast(x.device.type, enabled=False):
            for x_few, maps_few, masks_few in _pieces(maps.shape[1] * len(x), x.flatten(2), maps, masks):
                y = F.gelu(_added(maps_few, weight_t, x_few)).to(hyper.dtype)
                masks_few.copy_((hyper @ y.view(*hyper.shape[::2], -1)).view(masks_few.shape))
        return masks.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx, dmasks: Tensor) -> tuple[Tensor | None, ...]:
        x, hyper, maps, weight = ctx.saved_tensors
        dmasks = dmasks.unflatten(2, (4, -1))
        dx = x.new_empty(len(x), maps.shape[2], x.shape[1])  # B N C: the order in which a norm over the channels wants it
        dhyper = torch.zeros_like(hyper, dtype=torch.promote_types(hyper.dtype, torch.float32))
        dmaps = torch.empty_like(maps) if ctx.needs_input_grad[2] else None
        weight, weight_t = (matrix.expand(len(x), -1, -1) for matrix in (weight, weight.t()))
        tensors = x.flatten(2), maps, dmasks, dx.transpose(1, 2), maps if dmaps is None else dmaps
        with torch.autocast(x.device.type, enabled=False):
            for x_few, maps_few, dmasks_few, dx_few, dmaps_few in _pieces(maps.shape[1] * len(x), *tensors):
                dmasks_few, y = dmasks_few.flatten(2), _added(maps_few, weight_t, x_few)
                dhyper += dmasks_few @ F.gelu(y).to(hyper.dtype).view(*hyper.shape[::2], -1).transpose(1, 2)
                dy = (hyper.transpose(1, 2) @ dmasks_few).view(y.shape).to(y.dtype)
                dy = torch.ops.aten.gelu_backward(dy, y)
                dx_few.copy_((dy.transpose(1, 2).to(weight.dtype) @ weight.transpose(1, 2)).transpose(1, 2))
                if dmaps is not None:
                    dmaps_few.copy_(dy if len(maps) == len(x) else dy.sum(0, keepdim=True))
        return dx.transpose(1, 2).unflatten(2, x.shape[2:]), dhyper.to(hyper.dtype), dmaps, None


def _pieces(width: int, *tensors: Tensor) -> "zip[tuple[Tensor, ...]]":
    """The last axis of some tensors in pieces, of which `width` numbers each make as much as is worked on at a time."""
    return zip(*(tensor.split(max(numbers_at_a_time(tensor.device) // width, 1), -1) for tensor in tensors))
