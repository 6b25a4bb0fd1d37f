"""Verifies a merged file on stock SAM 2: compares its mask logits with those of base and adapter. Needs sam2."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sam2_lora_ext.adapters.peft import Adapter
from sam2_lora_ext.adapters.weights import read_weights
from sam2_lora_ext.deploy.stock import build_stock, load_strictly, mask_logits, noise_image, read_image
from sam2_lora_ext.deploy.transformers_folder import folder_logits, folder_size, read_state
from sam2_lora_ext.lora import attach_adapter, lora_layers

LOGIT_BOUND = 1e-4
HALF_BOUNDS = {torch.float16: 0.01, torch.bfloat16: 0.08}  # share of the largest logit; about ten times the usual error


@dataclass
class Comparison:
    """The comparison of a merged file with its base and adapter.

    Attributes:
        max_abs_weight_diff: largest difference of the file from the merged weights in float64, over all tensors.
        max_abs_logit_diff: largest difference of a low-resolution mask logit, over all prompts and mask outputs.
        max_abs_logit: largest logit, for scale.
        flipped: share of mask pixels whose logit changed sign.
        lowest_iou: lowest IoU of a merged mask with its unmerged counterpart.
        mean_iou: mean IoU over all prompts and mask outputs.
        bound: largest allowed `max_abs_logit_diff` for the dtypes in the file.
    """

    max_abs_weight_diff: float
    max_abs_logit_diff: float
    max_abs_logit: float
    flipped: float
    lowest_iou: float
    mean_iou: float
    bound: float

    @property
    def passed(self) -> bool:
        """Whether the difference is within the bound."""
        return self.max_abs_logit_diff <= self.bound  # False for NaN


def compare_merged(
    merged: str | Path, base: str | Path, adapter: Adapter, config: str, image: str | Path | None = None
) -> Comparison:
    """Compares stock SAM 2 built from the merged file with stock SAM 2 built from the base with the adapter.

    Args:
        merged: the file to verify, loaded by `build_sam2` itself unless it is safetensors; or a folder, loaded by
            transformers' `Sam2Model`.
        base: the weights that the adapter was merged into.
        adapter: the merged adapter.
        config: name of the stock config, e.g. `configs/sam2.1/sam2.1_hiera_l.yaml`.
        image: image to segment; by default smooth noise, the same each time.

    Raises:
        UserError: there is no such config, the weights do not fit it, or the image cannot be read.
    """
    folder = Path(merged) if Path(merged).is_dir() else None
    live = build_stock(config, image_size=folder_size(folder) if folder else None)
    pixels = read_image(image, live.image_size) if image else noise_image(live.image_size)
    load_strictly(live, base)
    attach_adapter(live, adapter)
    live.requires_grad_(False)
    live_logits = mask_logits(live, pixels)
    expected = {f"{name}.weight": layer.merged_weight(torch.float64) for name, layer in lora_layers(live)}
    expected = {key: expected.get(key, value) for key, value in live.state_dict().items()}
    written = read_state(folder) if folder else read_weights(merged)
    weight_diff = max(float((written[key].double() - expected[key].double()).abs().max()) for key in written)
    half = max(HALF_BOUNDS.get(value.dtype, 0.0) for value in written.values())
    del live, expected, written
    if folder:
        logits = folder_logits(folder, pixels)
    else:
        logits = mask_logits(build_stock(config, merged).requires_grad_(False), pixels)
    largest, ious = float(live_logits.abs().max()), mask_ious(logits > 0, live_logits > 0)
    return Comparison(
        weight_diff,
        float((logits - live_logits).abs().max()),
        largest,
        float(((logits > 0) != (live_logits > 0)).double().mean()),
        float(ious.min()),
        float(ious.mean()),
        max(LOGIT_BOUND, half * largest),
    )


def mask_ious(one: Tensor, other: Tensor) -> Tensor:
    """IoU of bool masks (..., H, W) with their counterparts (...); 1 where both are empty."""
    common, union = ((one & other).sum((-2, -1)).double(), (one | other).sum((-2, -1)).double())
    return torch.where(union > 0, common / union.clamp_min(1), 1.0)
