"""The mask decoder's upscaling with the pixels of a token beside each other: no pixel is moved before the masks are there.

SAM 2 enlarges the image's tokens twice, each time by a transposed convolution with kernel and stride 2, and adds features of
the image at that size:

    y[:, :, 2 i + a, 2 j + b] = W[:, :, a, b]^T x[:, :, i, j] + bias + f[:, :, 2 i + a, 2 j + b],   a, b in {0, 1}

What comes then, a norm over the channels, GELU and the product that makes the masks, looks at each pixel by itself, so any order
of the pixels will do. Here the four corners (a, b) of a pixel stay where one product (C, 4 C') puts them, and the product starts
from the features, which are brought into that order, with the bias, once for all prediction steps. Only the masks are put in rows.

Until then, tensors of this order have the shape that stock's have, and their pixels at other places.

Shapes: x (B, C, H, W), of N = H W pixels · W (C, C', 2, 2) · f, y (B, C', 2 H, 2 W) · M masks.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from sam2.modeling.sam.mask_decoder import MaskDecoder
from torch import Tensor, nn

from sam2_lora_ext.lean.conv import LeanConvTranspose2d
from sam2_lora_ext.lean.corner_products import CornerMasks, CornerSum
from sam2_lora_ext.lean.maps import LeanGELU
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
        return CornerSum.apply(x.to(self.weight.dtype), self.maps, self.weight)


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
        return CornerMasks.apply(self.x, hyper.to(self.x.dtype), self.features.maps, self.features.weight)


class CornerGELU(LeanGELU):
    """A `LeanGELU` that leaves `UpscaledFeatures` to the product after it, and brings a tensor into the order that this product wants."""

    def forward(self, x: Tensor | UpscaledFeatures) -> Tensor | UpscaledFeatures:
        return x if isinstance(x, UpscaledFeatures) else super().forward(x.contiguous())


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
