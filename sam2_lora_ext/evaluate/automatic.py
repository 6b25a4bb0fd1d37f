"""Compares masks of the stock `SAM2AutomaticMaskGenerator`, which needs no prompt, with the true masks.

Legend: O objects, A automatic masks, H W pixels.
"""

import warnings

import numpy as np
import torch
from sam2.automatic_mask_generator import SAM2AutomaticMaskGenerator
from sam2.modeling.sam2_base import SAM2Base
from torch import Tensor

from sam2_lora_ext.data.tiles import tile_starts
from sam2_lora_ext.deploy.predictors import fit_predictor
from sam2_lora_ext.evaluate.metrics import iou, mask_counts


class AutomaticMasks:
    """The stock generator, on whole strips or on tiles; a defect across two tiles is not found as one mask.

    Args:
        model: any SAM 2 in eval mode.
        points_per_side: the generator prompts with the square of this number of points, per image or tile.
        thresholds: minimum predicted IoU and minimum stability of a mask.
        tile: width of tiles, None for whole strips.
        overlap: overlap of neighbouring tiles.
    """

    def __init__(
        self,
        model: SAM2Base,
        points_per_side: int,
        thresholds: tuple[float, float],
        tile: int | None = None,
        overlap: int = 0,
    ):
        with warnings.catch_warnings():  # in stock's transforms
            warnings.filterwarnings("ignore", message=".*torch.jit.script.*deprecated", category=FutureWarning)
            self.generator = fit_predictor(
                SAM2AutomaticMaskGenerator(
                    model,
                    points_per_side=points_per_side,
                    pred_iou_thresh=thresholds[0],
                    stability_score_thresh=thresholds[1],
                )
            )
        self.tile, self.overlap = tile, overlap

    def masks(self, image: np.ndarray) -> Tensor:
        """All masks bool [A, H, W] of an image uint8 [H, W, 3]; A may be 0, a tile's masks are empty outside it."""
        height, width = image.shape[:2]
        tile = min(self.tile or width, width)
        found = []
        for start in tile_starts(width, tile, min(self.overlap, tile - 1)):
            for record in self.generator.generate(np.ascontiguousarray(image[:, start : start + tile])):
                mask = torch.zeros(height, width, dtype=torch.bool)
                mask[:, start : start + tile] = torch.from_numpy(np.asarray(record["segmentation"], dtype=bool))
                found.append(mask)
        return torch.stack(found) if found else torch.zeros(0, height, width, dtype=torch.bool)

    def best_ious(self, image: np.ndarray, truth: Tensor) -> tuple[list[float], int]:
        """The IoU of the best automatic mask for each true mask bool [O, 1, H, W] (0 without masks), and A."""
        masks = self.masks(image)
        if not len(masks):
            return [0.0] * len(truth), 0
        return [float(iou(mask_counts(masks, target)).max()) for target in truth], len(masks)
