"""For tests of the folders that transformers loads: a random base with an adapter, and a strict load."""

from pathlib import Path
from typing import Any

import torch

from helpers.stock_models import NANO, build, train_a_little
from sam2_lora_ext.adapters.peft import Adapter, save_adapter
from sam2_lora_ext.adapters.weights import write_weights
from sam2_lora_ext.lora import build_lora_model

SIZE = 128


def adapted(folder: Path, config: str = NANO, size: int = SIZE) -> Path:
    """`base.pt` and an adapter in `folder`, of random weights."""
    model = build(config, size)
    with torch.no_grad():  # the object is there: else all masks of a video are alike
        model.sam_mask_decoder.pred_obj_score_head.layers[2].bias.fill_(5.0)
    write_weights(folder / "base.pt", model.state_dict())
    build_lora_model(model, {"rank": 2, "qkv_parts": ["q", "v"], "trainable": ["sam_mask_decoder.output_upscaling.3"]})
    train_a_little(model)
    save_adapter(Adapter.from_model(model), folder / "adapter")
    return folder


def their_model(kind: str, folder: Path) -> Any:
    """A model of transformers from a folder, all of whose tensors were in it."""
    import transformers

    model, info = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()
