"""Proves a merged file on stock SAM 2: its mask logits against those of the base with the live adapter. Needs sam2.

Legend: B prompts · N points of a prompt · C mask outputs · H W pixels of the model's input.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sam2_lora_ext.adapter import Adapter
from sam2_lora_ext.checkpoints import explain_mismatch, read_weights
from sam2_lora_ext.errors import UserError
from sam2_lora_ext.lora import attach_adapter, lora_layers

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of SAM 2's input
POSITIVE, NEGATIVE, TOP_LEFT, BOTTOM_RIGHT = 1, 0, 2, 3  # SAM 2's labels of points and of a box's corners
PROMPTS = [  # (x, y) as shares of the image, with labels
    ([(0.50, 0.50)], [POSITIVE]),
    ([(0.25, 0.25)], [POSITIVE]),
    ([(0.75, 0.60)], [POSITIVE]),
    ([(0.10, 0.90)], [POSITIVE]),
    ([(0.40, 0.40), (0.60, 0.70), (0.90, 0.10)], [POSITIVE, POSITIVE, NEGATIVE]),
    ([(0.20, 0.30), (0.70, 0.80)], [TOP_LEFT, BOTTOM_RIGHT]),
    ([(0.20, 0.30), (0.70, 0.80), (0.45, 0.55)], [TOP_LEFT, BOTTOM_RIGHT, POSITIVE]),
]
LOGIT_BOUND = 1e-4
HALF_BOUNDS = {torch.float16: 0.01, torch.bfloat16: 0.08}  # share of the largest logit: about ten times what is usual


@dataclass
class Comparison:
    """Merged against unmerged.

    Attributes:
        max_abs_weight_diff: largest difference of the file from the merged weights in float64, over all tensors.
        max_abs_logit_diff: largest difference of a low-resolution mask logit, over all prompts and mask outputs.
        max_abs_logit: largest logit, for scale.
        flipped: share of mask pixels that changed side.
        bound: what `max_abs_logit_diff` may be, given the dtypes in the file.
    """

    max_abs_weight_diff: float
    max_abs_logit_diff: float
    max_abs_logit: float
    flipped: float
    bound: float

    @property
    def passed(self) -> bool:
        """Whether the merged file is the adapter's model."""
        return self.max_abs_logit_diff <= self.bound  # False for NaN


def compare_merged(merged: str | Path, base: str | Path, adapter: Adapter, config: str,
                   image: str | Path | None = None) -> Comparison:
    """Builds stock SAM 2 from the merged file, and another from the base with the adapter live, and compares them.

    Args:
        merged: the file to prove, loaded by `build_sam2` itself unless it is safetensors.
        base: the weights that were merged.
        adapter: what was merged into them.
        config: name of the stock config, e.g. `configs/sam2.1/sam2.1_hiera_l.yaml`.
        image: what to segment; by default smooth noise, the same each time.

    Raises:
        UserError: there is no such config, or the weights are of another one, or the image cannot be read.
    """
    live = build_stock(config)
    pixels = read_image(image, live.image_size) if image else noise_image(live.image_size)
    load_strictly(live, base)
    attach_adapter(live, adapter)
    live.requires_grad_(False)
    live_logits = mask_logits(live, pixels)
    expected = {f"{name}.weight": layer.merged_weight(torch.float64)
                for name, layer in lora_layers(live)}
    expected = {key: expected.get(key, value) for key, value in live.state_dict().items()}
    written = read_weights(merged)
    weight_diff = max(float((written[key].double() - expected[key].double()).abs().max()) for key in written)
    half = max(HALF_BOUNDS.get(value.dtype, 0.0) for value in written.values())
    del live, expected, written
    logits = mask_logits(build_stock(config, merged).requires_grad_(False), pixels)
    largest = float(live_logits.abs().max())
    return Comparison(weight_diff, float((logits - live_logits).abs().max()), largest,
                      float(((logits > 0) != (live_logits > 0)).double().mean()), max(LOGIT_BOUND, half * largest))


def check_inputs(config: str, image: str | Path | None = None) -> None:
    """Tells early what `compare_merged` would stumble over.

    Raises:
        UserError: there is no such config, or it is no inference config, or the image cannot be read.
    """
    import sam2  # noqa: F401  (initialises Hydra with SAM 2's configs)
    from hydra import compose
    from hydra.errors import MissingConfigException

    stock = "give a stock name such as configs/sam2.1/sam2.1_hiera_l.yaml or configs/sam2/sam2_hiera_l.yaml"
    try:
        known = "model" in compose(config_name=config)
    except MissingConfigException as error:
        raise UserError(f"there is no config {config!r}: {stock}") from error
    if not known:
        raise UserError(f"{config} is no inference config (it has no model at its top): {stock}")
    if image is not None:
        read_image(image, 8)


def build_stock(config: str, weights: str | Path | None = None) -> nn.Module:
    """Stock SAM 2 on the CPU as `build_sam2` makes it, without the postprocessing that chooses between masks.

    Raises:
        UserError: there is no such config, or the weights do not fit it.
    """
    from sam2.build_sam import build_sam2

    check_inputs(config)
    native = weights is not None and Path(weights).suffix != ".safetensors"
    model = build_sam2(config, str(weights) if native else None, device="cpu", apply_postprocessing=False)
    if weights is not None and not native:
        load_strictly(model, weights)
    return model


def load_strictly(model: nn.Module, weights: str | Path) -> None:
    """Loads a weight file of exactly the model's keys; raises `UserError` with the likely config otherwise."""
    state = read_weights(weights)
    if mismatch := explain_mismatch(state, model.state_dict()):
        raise UserError(f"{weights}: {mismatch}")
    model.load_state_dict(state)


def read_image(path: str | Path, size: int) -> Tensor:
    """An image file as SAM 2's input (1, 3, H, W), squashed to `size` x `size` and normalised."""
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR), dtype=np.float32)
    except (OSError, UnidentifiedImageError, ValueError) as error:
        raise UserError(f"cannot read the image {path}: {getattr(error, 'strerror', None) or error}") from error
    return _normalised(torch.from_numpy(pixels).permute(2, 0, 1) / 255)


def noise_image(size: int) -> Tensor:
    """Smooth noise as SAM 2's input (1, 3, H, W), the same for each call."""
    coarse = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return _normalised(F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=False)[0].clamp(0, 1))


def mask_logits(model: nn.Module, image: Tensor) -> Tensor:
    """All mask outputs of stock SAM 2 for `PROMPTS` on one image, at low resolution: (B, C = 4, H/4, W/4)."""
    features = model.forward_image(image)
    _, vision, _, sizes = model._prepare_backbone_features(features)
    if model.directly_add_no_mem_embed:  # as SAM2ImagePredictor does for a single image
        vision[-1] = vision[-1] + model.no_mem_embed
    maps = [feature.permute(1, 2, 0).reshape(1, -1, *size) for feature, size in zip(vision, sizes)]
    outputs = []
    for points, labels in PROMPTS:
        coords = torch.tensor([points]) * model.image_size  # (1, N, 2), x before y, in pixels
        sparse, dense = model.sam_prompt_encoder(points=(coords, torch.tensor([labels])), boxes=None, masks=None)
        outputs.append(torch.cat([
            model.sam_mask_decoder(
                image_embeddings=maps[-1], image_pe=model.sam_prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse, dense_prompt_embeddings=dense, multimask_output=multimask,
                repeat_image=False, high_res_features=maps[:-1],
            )[0] for multimask in (False, True)], dim=1))
    return torch.cat(outputs)


def _normalised(image: Tensor) -> Tensor:
    return ((image - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None])[None]
