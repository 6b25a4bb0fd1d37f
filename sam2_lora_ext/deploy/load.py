"""Builds stock SAM 2 with switchable adapters, for SAM 2's own predictors. Imports SAM 2 only to build a model.

adapters = {"line 1": "runs/line1", "line 2": "runs/line2"}
model = load_sam2("configs/sam2.1/sam2.1_hiera_l.yaml", "sam2.1_hiera_large.pt", adapters)
predictor = fit_predictor(SAM2ImagePredictor(model))
set_adapter(model, "line 2")
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from sam2_lora_ext.adapters.class_binding import tokens_of
from sam2_lora_ext.adapters.peft import Adapter
from sam2_lora_ext.adapters.sources import check_base, read_adapter
from sam2_lora_ext.adapters.weights import weights_id
from sam2_lora_ext.deploy.stock import check_inputs, load_strictly
from sam2_lora_ext.lora.live import disable_adapters, put_adapter, set_adapter, table_of
from sam2_lora_ext.utils.errors import UserError

if TYPE_CHECKING:
    from sam2.modeling.sam2_base import SAM2Base

ENCODER = "sam_prompt_encoder"  # the module of a SAM 2 that class prompts replace
Source = str | Path | Adapter
COARSEST = 32  # stride of the trunk's last feature map in pixels


def load_sam2(
    config: str,
    base: str | Path,
    adapter: Source | Mapping[str, Source] | None = None,
    *,
    video: bool = False,
    image_size: int | None = None,
    device: str | torch.device | None = None,
    apply_postprocessing: bool = True,
    hydra_overrides_extra: Sequence[str] = (),
) -> "SAM2Base":
    """Builds stock SAM 2 as `build_sam2` does, loads a base and adds switchable adapters; in eval mode.

    Args:
        config: name of a stock config, e.g. `configs/sam2.1/sam2.1_hiera_l.yaml`.
        base: the weight file of the base (.pt, .safetensors), which may be a merged file.
        adapter: a run folder, an adapter folder, a Trainer's checkpoint or an `Adapter`, which gets the name "default";
            or several by name, the first of which becomes active. None: the base only; adapters may be added later.
        video: build a `SAM2VideoPredictor`, which is a model and a predictor.
        image_size: side of the model's input in pixels, instead of the config's.
        device: by default the GPU if there is one, else the CPU.
        apply_postprocessing: see `build_sam2`.
        hydra_overrides_extra: see `build_sam2`.

    Raises:
        UserError: a file is missing or damaged, the base does not fit the config, or an adapter has another base.
    """
    from sam2.build_sam import build_sam2, build_sam2_video_predictor

    check_inputs(config)
    if image_size is not None and (image_size < COARSEST or image_size % COARSEST):
        raise UserError(f"image_size must be a multiple of {COARSEST} pixels, got {image_size}")
    overrides = [*hydra_overrides_extra, *([f"++model.image_size={image_size}"] if image_size else [])]
    model = (build_sam2_video_predictor if video else build_sam2)(
        config, device="cpu", apply_postprocessing=apply_postprocessing, hydra_overrides_extra=overrides
    )
    load_strictly(model, base)
    table_of(model).base_id = weights_id(model.state_dict())  # before adapters change the values
    adapters = adapter if isinstance(adapter, Mapping) else {} if adapter is None else {"default": adapter}
    for name, source in adapters.items():
        add_adapter(model, name, source, base_path=base)
    if adapters:
        set_adapter(model, next(iter(adapters)))
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(torch.device(device)).eval()


def add_adapter(model: nn.Module, name: str, adapter: Source, *, base_path: str | Path = "the model's") -> None:
    """Adds an adapter for `set_adapter`, with its class prompts if any; the active adapter does not change.

    Args:
        model: from `load_sam2`, or any SAM 2 without adapters.
        name: the adapter's name.
        adapter: see `load_sam2`.
        base_path: file of the model's base, for messages.

    Raises:
        UserError: the name is in use, there is no such adapter, or the adapter has another base.
    """
    with disable_adapters(model):
        state = model.state_dict()
        found = adapter if isinstance(adapter, Adapter) else read_adapter(adapter, base=state)
        table = table_of(model)
        if table.base_id is None:
            table.base_id = weights_id(state)
        check_base(base_path, state, found, table.base_id)
        others = {}
        if found.class_prompts is not None:
            from sam2_lora_ext.host.class_encoder import with_class_prompts

            others[ENCODER] = with_class_prompts(model.get_submodule(ENCODER), tokens_of(found.class_prompts))
    put_adapter(model, name, found, others)
