"""Keeps frozen weights in the type that autocast casts them to anyway, at each use: half the bytes, and no casts.

A weight that is read by a matrix product or a convolution alone is only ever seen in that type, so not a bit changes.
Merging and exporting an adapter read the base from its file, not from here.
"""

import torch
from torch import nn

from sam2_lora_ext.lora.variants import DoRALinear

CAST = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)  # autocast's list, as far as SAM 2 has it


def cast_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts the frozen weights and biases of the model's matrix products and convolutions, in place."""
    for module in model.modules():
        if isinstance(module, CAST) and not isinstance(module, DoRALinear):  # DoRA also measures its weight
            for parameter in (module.weight, module.bias):
                if parameter is not None and not parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)
