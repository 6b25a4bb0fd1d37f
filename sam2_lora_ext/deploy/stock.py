"""Builds stock SAM 2 from its config and a weight file, and computes mask logits on one image. Needs sam2.

Legend: B prompts · N points per prompt · C = 4 mask outputs, the single mask and the three multimask outputs ·
H W input pixels.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sam2_lora_ext.adapters.weights import explain_mismatch, read_weights
from sam2_lora_ext.utils.errors import UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # normalisation of SAM 2's input
POSITIVE, NEGATIVE, TOP_LEFT, BOTTOM_RIGHT = 1, 0, 2, 3  # SAM 2's labels of points and of the corners of a box
PROMPTS = [  # (x, y) as shares of the image, with labels
    ([(0.50, 0.50)], [POSITIVE]),
    ([(0.25, 0.25)], [POSITIVE]),
    ([(0.75, 0.60)], [POSITIVE]),
    ([(0.10, 0.90)], [POSITIVE]),
    ([(0.40, 0.40), (0.60, 0.70), (0.90, 0.10)], [POSITIVE, POSITIVE, NEGATIVE]),
    ([(0.20, 0.30), (0.70, 0.80)], [TOP_LEFT, BOTTOM_RIGHT]),
    ([(0.20, 0.30), (0.70, 0.80), (0.45, 0.55)], [TOP_LEFT, BOTTOM_RIGHT, POSITIVE]),
]


def check_inputs(config: str, image: str | Path | None = None) -> None:
    """Checks the inputs of `build_stock` and `read_image` before the slow work.

    Raises:
        UserError: there is no such config, it is not an inference config, or the image cannot be read.
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
        raise UserError(f"{config} is not an inference config (it has no top-level key model): {stock}")
    if image is not None:
        read_image(image, 8)


def build_stock(config: str, weights: str | Path | None = None, image_size: int | None = None) -> nn.Module:
    """Stock SAM 2 on the CPU as `build_sam2` builds it, without the postprocessing that selects masks.

    Args:
        config: name of a stock config, e.g. `configs/sam2.1/sam2.1_hiera_l.yaml`.
        weights: file to load; by default the weights remain random.
        image_size: side of the input in pixels, instead of the config's.

    Raises:
        UserError: there is no such config, or the weights do not fit it.
    """
    from sam2.build_sam import build_sam2

    check_inputs(config)
    native = weights is not None and Path(weights).suffix != ".safetensors"
    overrides = [f"++model.image_size={image_size}"] if image_size else []
    model = build_sam2(
        config,
        str(weights) if native else None,
        device="cpu",
        apply_postprocessing=False,
        hydra_overrides_extra=overrides,
    )
    if weights is not None and not native:
        load_strictly(model, weights)
    return model


def load_strictly(model: nn.Module, weights: str | Path) -> None:
    """Loads a weight file with exactly the model's keys; otherwise raises a `UserError` with the likely config."""
    state = read_weights(weights)
    if mismatch := explain_mismatch(state, model.state_dict()):
        raise UserError(f"{weights}: {mismatch}")
    model.load_state_dict(state)


def read_image(path: str | Path, size: int) -> Tensor:
    """An image file as SAM 2's input (1, 3, H, W), resized to `size` x `size` and normalised."""
    return normalised(read_pixels(path, size))


def noise_image(size: int) -> Tensor:
    """Smooth noise as SAM 2's input (1, 3, H, W), the same in each call."""
    return normalised(noise_pixels(size))


def read_pixels(path: str | Path, size: int) -> Tensor:
    """An image file as RGB in [0, 1], (1, 3, H, W), upright, resized to `size` x `size`."""
    import numpy as np
    from PIL import Image

    from sam2_lora_ext.data.images import ImageError, read_rgb

    try:
        image = Image.fromarray(read_rgb(path))
    except ImageError as error:
        raise UserError(f"cannot read the image {path}: {error}") from error
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR), dtype=np.float32)
    return torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255


def noise_pixels(size: int) -> Tensor:
    """Smooth noise as RGB in [0, 1], (1, 3, H, W), the same in each call."""
    coarse = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=False).clamp(0, 1)


def normalised(pixels: Tensor) -> Tensor:
    """RGB in [0, 1] (..., 3, H, W), normalised for SAM 2."""
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def mask_logits(model: nn.Module, image: Tensor) -> Tensor:
    """All mask outputs of stock SAM 2 for `PROMPTS` on one image, at low resolution: (B, C, H/4, W/4)."""
    features = model.forward_image(image)
    _, vision, _, sizes = model._prepare_backbone_features(features)
    if model.directly_add_no_mem_embed:  # as SAM2ImagePredictor does for a single image
        vision[-1] = vision[-1] + model.no_mem_embed
    maps = [feature.permute(1, 2, 0).reshape(1, -1, *size) for feature, size in zip(vision, sizes)]
    outputs = []
    for points, labels in PROMPTS:
        coords = torch.tensor([points]) * model.image_size  # (1, N, 2), x before y, in pixels
        sparse, dense = model.sam_prompt_encoder(points=(coords, torch.tensor([labels])), boxes=None, masks=None)
        outputs.append(
            torch.cat(
                [
                    model.sam_mask_decoder(
                        image_embeddings=maps[-1],
                        image_pe=model.sam_prompt_encoder.get_dense_pe(),
                        sparse_prompt_embeddings=sparse,
                        dense_prompt_embeddings=dense,
                        multimask_output=multimask,
                        repeat_image=False,
                        high_res_features=maps[:-1],
                    )[0]
                    for multimask in (False, True)
                ],
                dim=1,
            )
        )
    return torch.cat(outputs)
