"""LoRA on any PyTorch model, made for SAM 2: layers, target selection, summary. Needs torch only."""

from sam2_lora_ext.lora.adapter_state import Adapter, LayerAdapter, apply_adapter, attach_adapter
from sam2_lora_ext.lora.config import LoRAConfig
from sam2_lora_ext.lora.from_checkpoint import adapter_from_state
from sam2_lora_ext.lora.inject import (
    Target,
    build_lora_model,
    find_targets,
    find_trainable,
    freeze,
    inject,
    lora_layers,
)
from sam2_lora_ext.lora.layer import LoRALinear, delta_weight, lora_scaling
from sam2_lora_ext.lora.overview import format_report, full_modules, report

__all__ = [
    "Adapter",
    "LayerAdapter",
    "LoRAConfig",
    "LoRALinear",
    "Target",
    "adapter_from_state",
    "apply_adapter",
    "attach_adapter",
    "build_lora_model",
    "delta_weight",
    "find_targets",
    "find_trainable",
    "format_report",
    "freeze",
    "full_modules",
    "inject",
    "lora_layers",
    "lora_scaling",
    "report",
]
