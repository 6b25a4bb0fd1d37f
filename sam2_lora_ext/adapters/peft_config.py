"""Reads `adapter_config.json` (PEFT's `LoraConfig`), and refuses adapters other than LoRA and DoRA."""

from pathlib import Path
from types import NoneType
from typing import Any

from sam2_lora_ext.adapters.folder import CONFIG, WEIGHTS
from sam2_lora_ext.utils.errors import UserError
from sam2_lora_ext.utils.files import LARGEST_NOTE, read_json

# Settings that are supported, or that do not change what the adapter computes; any other setting that is on is refused.
HARMLESS = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "megatron_core",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "target_modules",
    "task_type",
    "use_dora",
    "use_rslora",
}
KINDS = {
    "rank_pattern": (dict, NoneType),
    "alpha_pattern": (dict, NoneType),
    "modules_to_save": (list, NoneType),
    "lora_dropout": (int, float, NoneType),
}
# The other initialisations change the base's weights.
OWN_INIT = (True, None, False, "gaussian", "eva", "orthogonal", "mica")


def read_config(path: Path) -> dict[str, Any]:
    """The content of the file.

    Raises:
        UserError: the file is missing or damaged, or describes an adapter of another kind.
    """
    try:
        config = read_json(path, LARGEST_NOTE)
    except UserError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise UserError(f"there is no {path}: an adapter folder holds {CONFIG} and {WEIGHTS}") from error
        raise UserError(f"{path} is damaged or cannot be read: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise UserError(f"{path} describes an adapter of the kind {kind}: only LORA can be used")
    for key, value in config.items():
        if key == "init_lora_weights":
            if value not in OWN_INIT:
                raise UserError(
                    f"{path} sets {key} to {value!r}, which changed the base's weights: save it as plain "
                    "LoRA with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...)"
                )
        elif value not in (None, "none") if key == "bias" else bool(value) and key not in HARMLESS:
            raise UserError(f"{path} sets {key} to {value!r}: only LoRA and DoRA can be used, this is another kind")
        if not isinstance(value, KINDS.get(key, object)):
            raise UserError(f"{path} sets {key} to {value!r}, which PEFT never does: it is damaged")
    return config
