"""Selective activation recomputation: what a training step saves for backward and what it recomputes.

The settings are frozen convolutions that save no input, max-pooling that saves small indices, norms in one operation,
and activation checkpointing (arXiv 1604.06174) of trunk blocks and prediction steps. Classes of modules are swapped in
place and no module is added, so the keys of a checkpoint stay Meta's.
"""

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from sam2.modeling.backbones.hieradet import MultiScaleBlock
from sam2.modeling.position_encoding import PositionEmbeddingSine
from sam2.modeling.sam2_utils import LayerNorm2d
from torch import Tensor, nn

from sam2_lora_ext.activations.conv import LeanConv2d, LeanConvTranspose2d
from sam2_lora_ext.activations.maps import LeanLayerNorm2d, UnreadPositions
from sam2_lora_ext.activations.pool import LeanMaxPool2d
from sam2_lora_ext.lora.shared import checkpointed
from sam2_lora_ext.utils.errors import UserError, check_keys

SWITCHES = ("pool", "conv", "norms", "positions", "weights")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ActivationsConfig:
    """An `activations:` block.

    Attributes:
        encoder: share, 0 to 1, of the trunk's activations that backward recomputes.
        decoder: share, 0 to 1, of the prediction steps (prompt encoder, mask decoder) that backward recomputes.
        pool: max-pooling of the trunk saves one byte for each result.
        conv: frozen convolutions save no input.
        norms: norms over channels are one operation.
        positions: the neck computes position encodings only for the last level, the only one that is read.
        weights: under autocast, frozen weights are stored in its dtype (see `activations.cast`).
    """

    encoder: float = 0.0
    decoder: float = 0.0
    pool: bool = False
    conv: bool = False
    norms: bool = False
    positions: bool = False
    weights: bool = False

    def __post_init__(self) -> None:
        for name in ("encoder", "decoder"):
            share = getattr(self, name)
            if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
                raise UserError(f"activations.{name} must be a number from 0 to 1, got {share!r}")
        for name in SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"activations.{name} must be true or false, got {getattr(self, name)!r}")

    @classmethod
    def of(cls, config: "ActivationsConfig | Mapping[str, Any] | str") -> "ActivationsConfig":
        """A preset by name, or a policy from a mapping of settings.

        Raises:
            UserError: there is no such preset or setting, or a value is wrong.
        """
        if isinstance(config, cls):
            return config
        if isinstance(config, str):
            if config not in PRESETS:
                raise UserError(f"there is no preset {config!r} of activations: choose from {', '.join(PRESETS)}")
            return PRESETS[config]
        check_keys("activations", config, [field.name for field in fields(cls)])
        return cls(**config)


_ON = dict.fromkeys(SWITCHES, True)
PRESETS = {
    "stock": ActivationsConfig(),
    "fast": ActivationsConfig(decoder=0.125, **_ON),
    "default": ActivationsConfig(encoder=0.56, decoder=0.625, **_ON),
    "low": ActivationsConfig(encoder=1.0, decoder=1.0, **_ON),
}


def renamed(memory: Mapping[str, Any] | str) -> ActivationsConfig:
    """The settings of a `memory:` block of version 0.1 under their current names; a warning names the removed ones."""
    if isinstance(memory, str):
        return ActivationsConfig.of(memory)
    check_keys("memory", memory, ("encoder", "decoder", "pool", "conv", "operations", "selective", "weights"))
    operations = memory.get("operations", False)
    kept = {key: value for key, value in memory.items() if key not in ("operations", "selective")}
    log.warning(
        "trainer.model.memory is called trainer.model.activations now; its `operations` became `norms` and "
        "`positions`, and `selective` was removed"
    )
    return ActivationsConfig.of({**kept, "norms": operations, "positions": operations})


class CheckpointedBlock(MultiScaleBlock):
    """A block of Hiera that saves only its input for backward."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpointed(super().forward, x)


def make_lean(model: nn.Module, config: ActivationsConfig) -> None:
    """Swaps the classes of modules of a SAM 2 in place, as `config` sets."""
    encoder, prompts, decoder = model.image_encoder, model.sam_prompt_encoder, model.sam_mask_decoder
    if config.pool:
        _swap(encoder.trunk.modules(), {nn.MaxPool2d: LeanMaxPool2d})
    if config.conv:
        convolutions = {nn.Conv2d: LeanConv2d, nn.ConvTranspose2d: LeanConvTranspose2d}
        _swap((*encoder.neck.modules(), *prompts.modules(), *decoder.modules()), convolutions)
    if config.norms:
        _swap((*prompts.modules(), *decoder.modules()), {LayerNorm2d: LeanLayerNorm2d})
    if config.positions:
        _swap((encoder.neck.position_encoding,), {PositionEmbeddingSine: UnreadPositions})
    blocks = encoder.trunk.blocks
    _swap(blocks[: blocks_for_share(blocks, config.encoder)], {MultiScaleBlock: CheckpointedBlock})


def _swap(modules: Iterable[nn.Module], classes: Mapping[type, type]) -> None:
    for module in modules:
        module.__class__ = classes.get(type(module), type(module))


def falls_due(count: int, share: float) -> bool:
    """Whether element `count` (from 1) of a series is in an evenly spaced `share` of it that begins with the first."""
    return math.ceil(count * share) > math.ceil((count - 1) * share)


def blocks_for_share(blocks: nn.ModuleList, share: float) -> int:
    """How many blocks, from the first on, hold at most `share` of the activations of a Hiera's blocks.

    A block counts as tokens times width; from one stage to the next the tokens are a quarter and the width doubles.
    """
    held, size = [0.0], 1.0
    for block in blocks:
        held.append(held[-1] + size)  # the first block of a stage still works at the resolution of the previous stage
        size = size / 2 if block.q_stride else size
    return sum(count <= share * held[-1] for count in held[1:])
