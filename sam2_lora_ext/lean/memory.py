"""What a training step keeps for backward and what it computes again, by part of a stock SAM 2.

Three ways, from much memory to little and from no time to much:

- A part keeps what stock keeps, but for operations that are done with less (`pool`, `conv`, `operations`).
- A part keeps the results of its products and attentions, and computes its norms, activations, padded windows and the image's
  tokens with their positions again, and what these get of a prompt's attention, a small product (`selective`).
- A part keeps its input and computes all of itself again, of a trunk block two thirds of the FLOPs (of its MLP the hidden
  layer alone, see `lean.mlp`): a tenth of the first (`encoder`, `decoder`). A block of Hiera's first stages holds more
  numbers than a late one at equal FLOPs, so blocks are taken from the first on.

No module is added, so the keys of the checkpoint stay Meta's.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from sam2.modeling.backbones.hieradet import Hiera, MultiScaleBlock
from sam2.modeling.sam2_utils import LayerNorm2d
from sam2.modeling.sam.mask_decoder import MaskDecoder
from sam2.modeling.sam.transformer import Attention, TwoWayAttentionBlock, TwoWayTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sam2_lora_ext.errors import UserError
from sam2_lora_ext.lean.attention import LeanAttention
from sam2_lora_ext.lean.blocks import LeanBlock, LeanHiera
from sam2_lora_ext.lean.conv import LeanConv2d, LeanConvTranspose2d
from sam2_lora_ext.lean.high_res import pair_convolutions
from sam2_lora_ext.lean.maps import LeanGELU, LeanLayerNorm2d
from sam2_lora_ext.lean.pool import LeanMaxPool2d
from sam2_lora_ext.lean.recompute import recomputing
from sam2_lora_ext.lean.transformer import LeanTwoWayBlock, LeanTwoWayTransformer
from sam2_lora_ext.lean.upscaling import CornerGELU, CornerMaskDecoder, CornerUpscaling


@dataclass(frozen=True)
class MemoryConfig:
    """A `memory:` block.

    Attributes:
        encoder: share, 0 to 1, of the trunk's activations that is computed again in backward; the rest is kept.
        decoder: share, 0 to 1, of the prediction steps (prompt encoder, mask decoder, upscaling) that is computed again.
        pool: keep two bytes for each result of the trunk's max-pooling, not its input and an index of eight bytes.
        conv: keep no inputs of frozen convolutions in the neck, the prompt encoder and the mask decoder.
        operations: the same numbers, to rounding, by fewer operations or with less kept (see `lean.blocks`, `lean.transformer`,
            `lean.maps`, `lean.attention`, `lean.upscaling`, `lean.high_res`, `lean.mlp`; the last four only where the mask decoder's
            attention or its upscaling, the neck or an MLP is frozen, so a model that trains them rounds otherwise).
        selective: of the blocks and prediction steps that are not computed again, compute again the norms, the activations,
            the image's tokens with their positions and what else costs little (arXiv 2205.05198; see `lean.recompute`). Needs `operations`.
        weights: under autocast, hold frozen weights in its type (see `lean.cast`).
    """

    encoder: float = 0.0
    decoder: float = 0.0
    pool: bool = False
    conv: bool = False
    operations: bool = False
    selective: bool = False
    weights: bool = False

    def __post_init__(self) -> None:
        for name in ("encoder", "decoder"):
            share = getattr(self, name)
            if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
                raise UserError(f"memory.{name} must be a number from 0 to 1, got {share!r}")
        for name in ("pool", "conv", "operations", "selective", "weights"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"memory.{name} must be true or false, got {getattr(self, name)!r}")
        if self.selective and not self.operations:
            raise UserError("memory.selective needs memory.operations: set both to true, or selective to false")

    @classmethod
    def of(cls, config: "MemoryConfig | Mapping[str, Any] | str") -> "MemoryConfig":
        """A preset by name, or what a mapping says.

        Raises:
            UserError: there is no such preset or setting, or a value is wrong.
        """
        if isinstance(config, cls):
            return config
        if isinstance(config, str):
            if config not in PRESETS:
                raise UserError(f"there is no memory preset {config!r}: choose from {', '.join(PRESETS)}")
            return PRESETS[config]
        names = [field.name for field in fields(cls)]
        for key in config:
            if key not in names:
                raise UserError(f"memory has no setting {key!r}: there are {', '.join(names)}")
        return cls(**config)


PRESETS = {
    "stock": MemoryConfig(),
    "fast": MemoryConfig(pool=True, conv=True, operations=True, weights=True),  # what costs next to no time
    "default": MemoryConfig(encoder=0.56, pool=True, conv=True, operations=True, selective=True, weights=True),
    "low": MemoryConfig(encoder=0.98, decoder=0.625, pool=True, conv=True, operations=True, selective=True, weights=True),
}


def falls_due(count: int, share: float) -> bool:
    """Whether the `count`-th of a series, from 1 on, is among the `share` of it that is taken: the first, then evenly."""
    return math.ceil(count * share) > math.ceil((count - 1) * share)


class CheckpointedBlock(MultiScaleBlock):
    """A block of Hiera that keeps its input alone."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpointed(super().forward, x)


class CheckpointedLeanBlock(CheckpointedBlock, LeanBlock):
    """A `LeanBlock` that keeps its input alone."""

    keeps_hidden = False


class SelectiveLeanBlock(LeanBlock):
    """A `LeanBlock` that keeps its input, what products and the attention make of it, and the sum in its middle."""

    def forward(self, x: Tensor) -> Tensor:
        with recomputing():
            return super().forward(x)


def checkpointed(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """`function(*args, **kwargs)`, of which backward keeps the arguments alone."""
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    return checkpoint(function, *args, use_reentrant=False, **kwargs)


def make_lean(model: nn.Module, memory: MemoryConfig) -> None:
    """Changes the classes of parts of a SAM 2, in place, to those that `memory` asks for."""
    trunk = model.image_encoder.trunk
    if memory.pool:
        for module in trunk.modules():
            if type(module) is nn.MaxPool2d:
                module.__class__ = LeanMaxPool2d
    if memory.conv:
        downscaling = model.sam_prompt_encoder.mask_downscaling
        for module in (*model.image_encoder.neck.modules(), *downscaling, *model.sam_mask_decoder.children()):
            if type(module) is nn.Conv2d and module.padding_mode == "zeros":
                module.__class__ = LeanConv2d
        _swap(model.sam_mask_decoder.output_upscaling, {nn.ConvTranspose2d: LeanConvTranspose2d})
    if memory.operations:
        _swap((trunk, *trunk.blocks), {Hiera: LeanHiera, MultiScaleBlock: LeanBlock})
        heads = (*model.sam_prompt_encoder.modules(), *model.sam_mask_decoder.modules())
        lean = {TwoWayTransformer: LeanTwoWayTransformer, TwoWayAttentionBlock: LeanTwoWayBlock, Attention: LeanAttention}
        _swap(heads, {**lean, LayerNorm2d: LeanLayerNorm2d})
        upscaling = model.sam_mask_decoder.output_upscaling
        _swap(upscaling[-1:], {nn.GELU: CornerGELU})
        _swap(upscaling, {nn.GELU: LeanGELU})
        if model.sam_mask_decoder.use_high_res_features:
            _swap((model.sam_mask_decoder,), {MaskDecoder: CornerMaskDecoder})
            _swap(upscaling, {nn.ConvTranspose2d: CornerUpscaling, LeanConvTranspose2d: CornerUpscaling})
        pair_convolutions(model)
    again = trunk.blocks[: blocks_for_share(trunk.blocks, memory.encoder)]
    _swap(again, {MultiScaleBlock: CheckpointedBlock, LeanBlock: CheckpointedLeanBlock})
    if memory.selective:
        _swap(trunk.blocks, {LeanBlock: SelectiveLeanBlock})


def _swap(modules: Iterable[nn.Module], classes: Mapping[type, type]) -> None:
    for module in modules:
        module.__class__ = classes.get(type(module), type(module))


def blocks_for_share(blocks: nn.ModuleList, share: float) -> int:
    """How many blocks, from the first on, hold at most `share` of the activations of a Hiera's blocks.

    A block counts as tokens times width; from one stage to the next the tokens are a quarter and the width doubles.
    """
    held, size = [0.0], 1.0
    for block in blocks:
        held.append(held[-1] + size)  # the first block of a stage still works at the resolution before it
        size = size / 2 if block.q_stride else size
    return sum(count <= share * held[-1] for count in held[1:])
