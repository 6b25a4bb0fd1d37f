"""The individual defects in class masks: 8-connected components, each with its score, area and box.

    score = sigmoid(presence score of the class) * mean over its pixels of sigmoid(z)

Legend: C classes, H W pixels of the strip.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from sam2_lora_ext.data.components import find_components
from sam2_lora_ext.data.rle import encode_mask


@dataclass(frozen=True)
class Found:
    """One defect.

    Args:
        class_id: of the class table.
        score: confidence in [0, 1].
        area: in pixels.
        box: (x0, y0, x1, y1), half open.
        runs: its pixels, int32 [R, 2] of (start, length) down the columns.
    """

    class_id: int
    score: float
    area: int
    box: tuple[int, int, int, int]
    runs: np.ndarray


def find_objects(masks: Tensor, z: Tensor, scores: Tensor, class_ids: Sequence[int]) -> tuple[Found, ...]:
    """The components of masks bool [C, H, W], given calibrated logits z [C, H, W] and presence scores [C]."""
    height, width = masks.shape[1:]
    certain, found = scores.double().sigmoid().tolist(), []
    for place, class_id in enumerate(class_ids):
        runs = encode_mask(masks[place].numpy())
        if not len(runs):
            continue
        parts = find_components(runs, np.array([0, len(runs)]), np.array([height]), np.array([width]))
        sure = z[place].sigmoid().numpy().T.ravel()  # down the columns
        for number, (area, box) in enumerate(zip(parts.areas.tolist(), parts.boxes.tolist(), strict=True)):
            own = parts.runs[parts.run_offsets[number] : parts.run_offsets[number + 1]]
            inside = np.concatenate([sure[start : start + length] for start, length in own.tolist()])
            score = certain[place] * float(inside.mean(dtype=np.float64))
            found.append(Found(class_id, score, area, tuple(box), own))
    return tuple(found)
