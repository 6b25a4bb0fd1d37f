"""Stores frozen weights in the dtype to which autocast would cast them at each use: half the bytes and no casts.

Autocast would cast the weights of matrix products and convolutions to the same values, so results stay bitwise equal.
Merging and exporting an adapter read the base's file, not these weights.
"""

import torch
from torch import nn

from sam2_lora_ext.lora.variants import DoRALinear

CAST = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)  # autocast's list, restricted to SAM 2's operations


def cast_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts the frozen weights and biases of the model's matrix products and convolutions, in place."""
    for module in model.modules():
        if isinstance(module, CAST) and not isinstance(module, DoRALinear):  # DoRA also computes the norm of its weight
            for parameter in (module.weight, module.bias):
                if parameter is not None and not parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)
