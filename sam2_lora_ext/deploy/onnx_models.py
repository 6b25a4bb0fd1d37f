"""The two halves of a stock SAM 2 that go into ONNX files: what sees the image once, and what answers prompts.

Legend: S pixels of a side of the input · D width of the features · B prompts · N points of each ·
C = 4 mask outputs.

    pixels (1, 3, S, S), RGB in [0, 1]                       -> image_embed (1, D, S/16, S/16)
                                                                high_res_0 (1, D/8, S/4, S/4)
                                                                high_res_1 (1, D/4, S/8, S/8)
    these three, point_coords (B, N, 2), point_labels (B, N) -> masks (B, C, S/4, S/4), iou (B, C), object_score (B, 1)

`point_coords` are x before y in pixels of the squashed input; `point_labels` int64: 1 on the object, 0 beside it, 2 and
3 the top left and bottom right corner of a box, -1 for none. `masks` are logits: output 0 is the single mask, 1 to 3
are those of multimask, and `iou` is what the model thinks of each.
"""

import torch
from torch import Tensor, nn

from sam2_lora_ext.deploy.stock import normalised

FEATURES = ("image_embed", "high_res_0", "high_res_1")
INPUTS = {"image_encoder": ("pixels",), "mask_decoder": (*FEATURES, "point_coords", "point_labels")}
OUTPUTS = {"image_encoder": FEATURES, "mask_decoder": ("masks", "iou", "object_score")}


class ImageHalf(nn.Module):
    """The image encoder, normalisation before it, and behind it the decoder's projections of its fine features."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        fine, middle, coarse = self.model.forward_image(normalised(pixels))["backbone_fpn"]
        if self.model.directly_add_no_mem_embed:  # as SAM2ImagePredictor does for a single image
            coarse = coarse + self.model.no_mem_embed.reshape(1, -1, 1, 1)
        return coarse, fine, middle


class PromptHalf(nn.Module):
    """Prompt encoder and mask decoder, for any number of prompts on one image; boxes are points, as the predictor's."""

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
        masks, iou, _, score = self.decoder.predict_masks(
            embed, self.positions, sparse, dense, repeat_image=True, high_res_features=[fine, middle]
        )
        return masks, iou, score


def example_inputs(model: nn.Module, pixels: Tensor) -> dict[str, tuple[Tensor, ...]]:
    """What to trace the two halves with: an image (1, 3, S, S) and B = 3 prompts of N = 2 points."""
    with torch.no_grad():
        features = ImageHalf(model)(pixels)
    coords = torch.tensor([[[0.2, 0.3], [0.7, 0.8]]]).repeat(3, 1, 1) * pixels.shape[-1]
    return {"image_encoder": (pixels,), "mask_decoder": (*features, coords, torch.tensor([[2, 3], [1, 0], [1, -1]]))}
