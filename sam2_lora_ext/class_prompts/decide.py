"""Applies a decision: which classes an image has, and which pixels are whose. The formulas: `adapters.decision`."""

import numpy as np
import torch
from torch import Tensor

from sam2_lora_ext.adapters.decision import Decision, calibrated, claim
from sam2_lora_ext.data.components import find_components
from sam2_lora_ext.data.rle import decode_runs, encode_mask


def decide(logits: Tensor, scores: Tensor, decision: Decision) -> Tensor:
    """The masks bool [C, H, W] of one image, on the device of the logits.

    Args:
        logits: of each class, [C, H, W].
        scores: presence scores (logits) [C].
        decision: thresholds, calibration and areas.
    """
    scores = scores.float().cpu()
    masks = claim(calibrated(logits, decision), scores >= torch.tensor(decision.threshold), decision.exclusive)
    return without_specks(masks, decision.smallest(scores))


def without_specks(masks: Tensor, smallest: list[int]) -> Tensor:
    """Masks bool [C, H, W] without components of fewer pixels than the class's entry in `smallest`."""
    if max(smallest, default=0) <= 1:
        return masks
    kept, (height, width) = masks.cpu().numpy().copy(), masks.shape[1:]
    for mask, least in zip(kept, smallest, strict=True):
        runs = encode_mask(mask) if least > 1 else ()
        if not len(runs):
            continue
        found = find_components(runs, np.array([0, len(runs)]), np.array([height]), np.array([width]))
        for place in np.flatnonzero(found.areas < least):
            low, high = found.run_offsets[place : place + 2]
            mask[decode_runs(found.runs[low:high], height, width) > 0] = False
    return torch.from_numpy(kept).to(masks.device)
