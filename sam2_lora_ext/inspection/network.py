"""Runs stock SAM 2 for all classes of a batch of images at once; every inspection gets logits and scores from here.

Each class is one prompt: its tokens and the padding that training appends. The output is the decoder's single mask,
never a multimask output or a choice by stability. Legend: B images, C classes, S pixels of a side.
"""

import torch
from torch import Tensor, nn

from sam2_lora_ext.deploy.stock import MEAN, STD
from sam2_lora_ext.lora.class_tokens import find_tokens
from sam2_lora_ext.utils.errors import UserError


class ClassNetwork(nn.Module):
    """Pixels (B, 3, S, S), RGB in [0, 1] -> logits (B, C, S/4, S/4) and presence scores (B, C).

    Args:
        model: a SAM 2 with class prompts, see `class_encoder.install_class_prompts`.

    Raises:
        UserError: it has none.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        tokens = find_tokens(model.sam_prompt_encoder)  # of the active adapter
        if tokens is None:
            raise UserError("the model has no class prompts: load them with load_segmenter, or train them first")
        self.model, self._tokens = model, (tokens,)  # a tuple, so that the module is not registered twice
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(STD)[:, None, None], persistent=False)
        device = tokens.tokens.device
        coords, labels = tokens.prompt_of(torch.arange(len(tokens.class_ids), device=device))
        self.register_buffer("coords", coords, persistent=False)
        self.register_buffer("labels", labels, persistent=False)
        self.to(device)

    @property
    def size(self) -> int:
        """S."""
        return self.model.image_size

    @property
    def device(self) -> torch.device:
        """The device of the network, where pixels must be."""
        return self.mean.device

    def prompt(self) -> tuple[Tensor, Tensor, Tensor]:
        """The decoder's other inputs: class prompts [C, K + 1, D], "no mask" [1, D, S/16, S/16], position encoding.

        Raises:
            UserError: another adapter is active than when this network was made.
        """
        encoder = self.model.sam_prompt_encoder
        if find_tokens(encoder) is not self._tokens[0]:
            raise UserError(
                "the active adapter has other class prompts than this segmenter: switch to the adapter that it was "
                "made with, or make a new segmenter"
            )
        sparse, dense = encoder(points=(self.coords, self.labels), boxes=None, masks=None)
        return sparse, dense[:1], encoder.get_dense_pe()  # "no mask" is the same for all prompts

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return self.answer(pixels, *self.prompt())

    def answer(self, pixels: Tensor, sparse: Tensor, dense: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """`forward`, given the result of `prompt`."""
        model, classes = self.model, len(sparse)
        fine, middle, coarse = model.forward_image((pixels - self.mean) / self.std)["backbone_fpn"]
        if model.directly_add_no_mem_embed:  # as training and SAM2ImagePredictor do for a single image
            coarse = coarse + model.no_mem_embed.reshape(1, -1, 1, 1)
        coarse, fine, middle = (maps.repeat_interleave(classes, 0) for maps in (coarse, fine, middle))
        masks, _, _, scores = model.sam_mask_decoder.predict_masks(
            image_embeddings=coarse,
            image_pe=places,
            sparse_prompt_embeddings=sparse.repeat(pixels.shape[0], 1, 1),
            dense_prompt_embeddings=dense,
            repeat_image=False,
            high_res_features=[fine, middle],
        )
        return masks[:, 0].unflatten(0, (-1, classes)).float(), scores.reshape(-1, classes).float()
