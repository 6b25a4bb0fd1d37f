"""A plain and a lean LoRA layer with the same parameters."""

import copy

import torch
from torch import nn

from sam2_lora_ext.lora import LoRALinear
from sam2_lora_ext.lora.backward import LeanLoRALinear

QKV = (True, False, True)


def pair(dtype=torch.float64, parts=(True,), bias=True, dropout=0.0, frozen=True, width=(12, 24), dropout_on="inputs"):
    """A plain and a lean layer with the same parameters and a B that is not zero."""
    torch.manual_seed(0)
    base = nn.Linear(*width, bias=bias).to(dtype).requires_grad_(not frozen)
    plain = LoRALinear(base, 4, 8, dropout, parts, dropout_on=dropout_on)
    nn.init.normal_(plain.lora_b)
    lean = LeanLoRALinear(copy.deepcopy(base), 4, 8, dropout, parts, dropout_on=dropout_on)
    lean.load_state_dict(plain.state_dict())
    return plain, lean
