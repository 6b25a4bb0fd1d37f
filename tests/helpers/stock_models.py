"""Stock SAM 2 models with random weights for tests: Meta's own classes and configs, at fewer pixels."""

import torch
from sam2.build_sam import build_sam2
from torch import nn

NANO, TINY = "configs/sam2_nano.yaml", "configs/sam2.1/sam2.1_hiera_t.yaml"


def build(config: str = NANO, image_size: int = 128, seed: int = 0) -> nn.Module:
    """A stock SAM 2 in evaluation mode; its random weights depend on the seed alone."""
    torch.manual_seed(seed)
    size = f"++model.image_size={image_size}"
    model = build_sam2(config, device="cpu", apply_postprocessing=False, hydra_overrides_extra=[size])
    with torch.no_grad():  # else the random model would hardly look at the image, and its masks would be near zero
        for name, parameter in model.named_parameters():
            if name.startswith("sam_mask_decoder.output_hypernetworks_mlps") and parameter.dim() > 1:
                parameter.mul_(4)
    return model


def train_a_little(model: nn.Module, scale: float = 0.05, seed: int = 1) -> None:
    """Moves everything that is trainable by noise, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
