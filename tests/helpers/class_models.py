"""Stock models with class prompts for tests: random tokens, files of them, and strips to inspect."""

from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from torch import nn

from helpers.stock_models import NANO, build
from sam2_lora_ext.adapters.class_prompts import ClassPrompts, as_entry
from sam2_lora_ext.adapters.decision import Decision
from sam2_lora_ext.adapters.weights import write_weights
from sam2_lora_ext.host.class_encoder import install_class_prompts
from sam2_lora_ext.lora.class_tokens import ClassTokens

NAMES = ("scratch", "scale", "patch")
DECISION = Decision(  # as if fitted; components below 20 pixels are dropped
    (0.0, 0.0, 0.0), (1.0,) * 3, (0.0,) * 3, (20, 20, 20), (20, 20, 20), (0.0,) * 3, fitted=True
)


def make_strip(height: int = 64, width: int = 300, seed: int = 0) -> np.ndarray:
    """Smooth noise uint8 [H, W, 3]."""
    noise = np.random.default_rng(seed).random((height, width, 3))
    smooth = ndimage.gaussian_filter(noise, (4, 4, 0))
    return np.uint8(255 * (smooth - smooth.min()) / (smooth.max() - smooth.min()))


def make_prompts(
    classes: int = 3,
    count: int = 2,
    width: int = 64,
    crop: int | None = 128,
    size: int = 128,
    decision: Decision | None = None,
    seed: int = 0,
) -> ClassPrompts:
    """Random tokens of the nano model's width."""
    tokens = torch.randn(classes, count, width, generator=torch.Generator().manual_seed(seed))
    ids = tuple(range(1, classes + 1))
    return ClassPrompts(tokens, ids, NAMES[:classes], decision or Decision.default(classes), crop, size)


def tokens_of(prompts: ClassPrompts) -> ClassTokens:
    """As a module."""
    return ClassTokens(prompts.tokens, prompts.class_ids, prompts.class_names)


def class_model(prompts: ClassPrompts) -> nn.Module:
    """The nano model with class prompts, whose score head is turned up so that some classes are there and some not."""
    model = build(NANO, prompts.resolution)
    sharpen(model)
    install_class_prompts(model, tokens_of(prompts))
    return model.requires_grad_(False)


def sharpen(model: nn.Module) -> None:
    """Turns up what random weights make of the object score."""
    with torch.no_grad():
        for name, parameter in model.sam_mask_decoder.pred_obj_score_head.named_parameters():
            parameter.mul_(6.0 if name.endswith("weight") else 0.0)


def write_merged(path: Path, prompts: ClassPrompts) -> Path:
    """Merged weights with class prompts, as `merge` writes them."""
    model = build(NANO, prompts.resolution)
    sharpen(model)
    write_weights(path, model.state_dict())
    content = torch.load(path, weights_only=True)
    torch.save({**content, "class_prompts": as_entry(prompts)}, path)
    return path
