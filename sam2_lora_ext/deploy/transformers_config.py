"""Derives the arguments of transformers' `Sam2Config` and `Sam2VideoConfig` from the shapes of SAM 2's weights.

`ARCHITECTURES` has the settings that shapes do not determine (windows, global attention, heads), by size. Torch only.

Legend: C width of the features (256) · M width of the memory (64) · S side of the input in pixels.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from sam2_lora_ext.adapters.weights import identify
from sam2_lora_ext.utils.errors import UserError

MEMORY_WIDTH = 64
STRIDES = (4, 8, 16)  # stride of each feature map in pixels of the input
BLOCK = "image_encoder.trunk.blocks.{}"
DOWN = "memory_encoder.mask_downsampler.encoder.{}.weight"
ATTENTION = "sam_mask_decoder.transformer.final_attn_token_to_image"


class Architecture(NamedTuple):
    """The settings that the shapes of the weights do not determine.

    Attributes:
        windows: side of the attention windows, by stage.
        global_blocks: indices of the blocks with global attention.
        heads: number of heads in the first stage; each later stage has twice as many as the previous one.
        image_size: S of the stock config.
    """

    windows: tuple[int, ...]
    global_blocks: tuple[int, ...]
    heads: int
    image_size: int = 1024


ARCHITECTURES = {  # end of the stock config's name -> settings, equal for SAM 2.0 and 2.1
    "hiera_t": Architecture((8, 4, 14, 7), (5, 7, 9), 1),
    "hiera_s": Architecture((8, 4, 14, 7), (7, 10, 13), 1),
    "hiera_b+": Architecture((8, 4, 14, 7), (12, 16, 20), 2),
    "hiera_l": Architecture((8, 4, 16, 8), (23, 33, 43), 2),
    "nano": Architecture((8, 4, 8, 4), (4, 6), 1, 128),
}


def image_config(state: Mapping[str, Tensor], image_size: int | None = None) -> dict[str, Any]:
    """The arguments of `Sam2Config` (also the first three of `Sam2VideoConfig`) for a SAM 2 with these weights.

    Args:
        state: the state dict of a whole model, see `identify`.
        image_size: S, if it differs from the stock config's; a multiple of 32.

    Raises:
        UserError: the weights have no known size, or `image_size` is not a multiple of 32.
    """
    known = _architecture(state)
    size = known.image_size if image_size is None else image_size
    if size < 32 or size % 32:
        raise UserError(f"SAM 2 cannot use an input with a side of {size} pixels: give a multiple of 32")
    return {
        "vision_config": {"model_type": "sam2_vision_model", **_vision(state, known, size)},
        "prompt_encoder_config": {
            "hidden_size": _rows(state, "image_encoder.neck.convs.0.conv"),
            "image_size": size,
            "mask_input_channels": _rows(state, "sam_prompt_encoder.mask_downscaling.3"),
        },
        "mask_decoder_config": _decoder(state),
    }


def memory_width(state: Mapping[str, Tensor]) -> int:
    """M of a model; the memory attention of `Sam2VideoModel` supports only `MEMORY_WIDTH`."""
    return state["maskmem_tpos_enc"].shape[-1]


def video_config(state: Mapping[str, Tensor], image_size: int | None = None) -> dict[str, Any]:
    """The arguments of `Sam2VideoConfig`, see `image_config`, for a model whose `memory_width` is `MEMORY_WIDTH`."""
    size = _architecture(state).image_size if image_size is None else image_size
    return {**image_config(state, image_size), "image_size": size, **_memory(state, size)}


def _architecture(state: Mapping[str, Tensor]) -> Architecture:
    name = identify(state)
    if name is None:
        raise UserError(
            "the weights have no stock size of SAM 2 or 2.1, and their shapes alone do not determine the windows and "
            "heads for transformers' config: merge into a .pt file instead"
        )
    return next(known for end, known in ARCHITECTURES.items() if Path(name).stem.endswith(end))


def _vision(state: Mapping[str, Tensor], known: Architecture, size: int) -> dict[str, Any]:
    blocks = _count(state, BLOCK)
    starts = [0, *(block for block in range(blocks) if f"{BLOCK.format(block)}.proj.weight" in state)]
    widths = [_rows(state, f"{BLOCK.format(start)}.attn.proj") for start in starts]
    first = BLOCK.format(0)
    return {
        "backbone_config": {
            "model_type": "sam2_hiera_det_model",
            "hidden_size": widths[0],
            "num_attention_heads": known.heads,
            "image_size": [size, size],
            "blocks_per_stage": [end - start for start, end in zip(starts, [*starts[1:], blocks], strict=True)],
            "embed_dim_per_stage": widths,
            "num_attention_heads_per_stage": [known.heads * 2**stage for stage in range(len(starts))],
            "window_size_per_stage": list(known.windows),
            "window_positional_embedding_background_size": list(state["image_encoder.trunk.pos_embed"].shape[2:]),
            "global_attention_blocks": list(known.global_blocks),
            "mlp_ratio": _rows(state, f"{first}.mlp.layers.0") / widths[0],
        },
        "backbone_channel_list": widths[::-1],
        "backbone_feature_sizes": [[size // stride] * 2 for stride in STRIDES],
        "fpn_hidden_size": _rows(state, "image_encoder.neck.convs.0.conv"),
    }


def _decoder(state: Mapping[str, Tensor]) -> dict[str, Any]:
    inner, width = state[f"{ATTENTION}.q_proj.weight"].shape
    return {
        "hidden_size": width,
        "mlp_dim": _rows(state, "sam_mask_decoder.transformer.layers.0.mlp.layers.0"),
        "attention_downsample_rate": width // inner,
        "num_multimask_outputs": _rows(state, "sam_mask_decoder.mask_tokens") - 1,
        "iou_head_hidden_dim": _rows(state, "sam_mask_decoder.iou_prediction_head.layers.0"),
    }


def _memory(state: Mapping[str, Tensor], size: int) -> dict[str, Any]:
    """The arguments that only `Sam2VideoModel` uses."""
    width = _rows(state, "memory_attention.layers.0.self_attn.q_proj")
    out, into, kernel, _ = state[DOWN.format(0)].shape
    stride = math.isqrt(out // into)  # channels grow by the factor by which the area shrinks
    steps = max(int(key.split(".")[3]) for key in state if key.startswith("memory_encoder.mask_downsampler.")) // 3
    fuser = "memory_encoder.fuser.layers.{}"
    fused, _, fuser_kernel, _ = state[f"{fuser.format(0)}.dwconv.weight"].shape
    return {
        "num_maskmem": state["maskmem_tpos_enc"].shape[0],
        "enable_occlusion_spatial_embedding": "no_obj_embed_spatial" in state,
        "enable_temporal_pos_encoding_for_object_pointers": "obj_ptr_tpos_proj.weight" in state,
        "memory_attention_hidden_size": width,
        "memory_attention_num_layers": _count(state, "memory_attention.layers.{}"),
        "memory_attention_feed_forward_hidden_size": _rows(state, "memory_attention.layers.0.linear1"),
        "memory_attention_rope_feat_sizes": [size // STRIDES[-1]] * 2,
        "memory_encoder_hidden_size": _rows(state, "memory_encoder.pix_feat_proj"),
        "memory_encoder_output_channels": memory_width(state),
        "mask_downsampler_embed_dim": _rows(state, DOWN.format(3 * steps).removesuffix(".weight")),
        "mask_downsampler_kernel_size": kernel,
        "mask_downsampler_stride": stride,
        "mask_downsampler_padding": (kernel - stride + 1) // 2,  # so that each step divides the side by the stride
        "mask_downsampler_total_stride": stride**steps,
        "memory_fuser_num_layers": _count(state, fuser),
        "memory_fuser_embed_dim": fused,
        "memory_fuser_intermediate_dim": _rows(state, f"{fuser.format(0)}.pwconv1"),
        "memory_fuser_kernel_size": fuser_kernel,
        "memory_fuser_padding": fuser_kernel // 2,
    }


def _rows(state: Mapping[str, Tensor], module: str) -> int:
    return state[f"{module}.weight"].shape[0]


def _count(state: Mapping[str, Tensor], layers: str) -> int:
    """The number of modules whose names differ in the number at `{}`."""
    before = layers.removesuffix("{}")
    return len({key[len(before) :].split(".")[0] for key in state if key.startswith(before)})
