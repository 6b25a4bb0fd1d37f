"""The two halves of a stock SAM 2 for ONNX files: the image encoder, and the prompt encoder with mask decoder.

Legend: S side of the input in pixels · D width of the features · B prompts · N points per prompt ·
C = 4 mask outputs.

    pixels (1, 3, S, S), RGB in [0, 1]                       -> image_embed (1, D, S/16, S/16)
                                                                high_res_feats_0 (1, D/8, S/4, S/4)
                                                                high_res_feats_1 (1, D/4, S/8, S/8)
    these three, point_coords (B, N, 2), point_labels (B, N) -> masks (B, C, S/4, S/4), iou_predictions (B, C),
                                                                object_score (B, 1)

`point_coords` are x before y in pixels of the resized input; `point_labels` are int64: 1 on the object, 0 outside, 2
and 3 the top left and bottom right corner of a box, -1 padding. `masks` are logits: output 0 is the single mask, 1 to 3
are the multimask outputs, and `iou_predictions` is the predicted IoU of each.

The halves for labelling tools omit steps of their runners: see `LabellingImageHalf` and `LabellingPromptHalf`.
"""

import torch
from torch import Tensor, nn

from sam2_lora_ext.deploy.stock import normalised


class ImageHalf(nn.Module):
    """Normalisation, the image encoder, and the decoder's projections of the high-resolution features."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        return self.features(normalised(pixels))

    def features(self, image: Tensor) -> tuple[Tensor, ...]:
        """The features of a normalised image, the coarse ones first."""
        fine, middle, coarse = self.model.forward_image(image)["backbone_fpn"]
        if self.model.directly_add_no_mem_embed:  # as in SAM2ImagePredictor for a single image
            coarse = coarse + self.model.no_mem_embed.reshape(1, -1, 1, 1)
        return coarse, fine, middle


class PromptHalf(nn.Module):
    """Prompt encoder and mask decoder for any number of prompts on one image; boxes are points, as in predictors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.prompts, self.decoder = model.sam_prompt_encoder, model.sam_mask_decoder
        self.register_buffer("positions", self.prompts.get_dense_pe())

    def forward(
        self,
        embed: Tensor,
        fine: Tensor,
        middle: Tensor,
        coords: Tensor,
        labels: Tensor,
    ) -> tuple[Tensor, ...]:
        sparse, dense = self.prompts(points=(coords, labels), boxes=None, masks=None)
        return self.answer(embed, fine, middle, sparse, dense)

    def answer(
        self,
        embed: Tensor,
        fine: Tensor,
        middle: Tensor,
        sparse: Tensor,
        dense: Tensor,
    ) -> tuple[Tensor, ...]:
        """Masks, predicted IoU and object score for embedded prompts."""
        masks, iou, _, score = self.decoder.predict_masks(
            embed, self.positions, sparse, dense, repeat_image=True, high_res_features=[fine, middle]
        )
        return masks, iou, score


class LabellingImageHalf(ImageHalf):
    """`ImageHalf` for runners that normalise the image themselves and expect the finest features first.

    image (1, 3, S, S), normalised -> high_res_feats_0, high_res_feats_1, image_embed.
    """

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        coarse, fine, middle = self.features(image)
        return fine, middle, coarse


class LabellingPromptHalf(PromptHalf):
    """`PromptHalf` with a mask as a further prompt; returns the multimask outputs, and runners show the best of them.

    The features, point_coords (B, N, 2), point_labels (B, N) as floats, mask_input (B, 1, S/4, S/4) logits,
    has_mask_input (B) or (1), 1 to use `mask_input` and 0 to ignore it -> masks (B, 3, S/4, S/4), iou_predictions
    (B, 3).
    """

    def forward(
        self,
        embed: Tensor,
        fine: Tensor,
        middle: Tensor,
        coords: Tensor,
        labels: Tensor,
        mask: Tensor,
        given: Tensor,
    ) -> tuple[Tensor, ...]:
        sparse, dense = self.prompts(points=(coords, labels), boxes=None, masks=mask)
        none = self.prompts.no_mask_embed.weight.reshape(1, -1, 1, 1)
        last = torch.arange(given.shape[0])[-1:]
        given = given[torch.minimum(torch.arange(coords.shape[0]), last)]  # some runners pass one flag for all prompts
        dense = torch.where(given.reshape(-1, 1, 1, 1) > 0, dense, none)
        masks, iou, _ = self.answer(embed, fine, middle, sparse, dense)
        return masks[:, 1:], iou[:, 1:]
