"""The compared training methods, on one fixed batch: SAM 2 of some size, its loss and its optimizer.

Shapes: T = 1 frame, O objects, H = W = the resolution.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import hydra
import numpy as np
import sam2  # noqa: F401  (initialises Hydra with its configs and ours)
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor
from training.loss_fns import MultiStepMultiMasksAndIous
from training.trainer import CORE_LOSS_KEY
from training.utils.data_utils import BatchedVideoDatapoint, BatchedVideoMetaData

from sam2_lora_ext.lora.config import DEFAULT_TARGETS
from sam2_lora_ext.losses import SeverstalLoss

COMPARED = ("full", "peft", "lean_fast", "lean_channels", "lean", "lean_memory")
METHODS = (*COMPARED, "decoder", "decoder_lean")
CONFIGS = {
    "nano": "configs/sam2_nano.yaml",
    "tiny": "configs/sam2.1/sam2.1_hiera_t.yaml",
    "base_plus": "configs/sam2.1/sam2.1_hiera_b+.yaml",
    "large": "configs/sam2.1/sam2.1_hiera_l.yaml",
}
RANK, ALPHA, DROPOUT, PROMPT_SEED = 8, 16, 0.05, 42  # as in configs/base/severstal.yaml; the last is its seed_value
PRESETS = {"plain": "stock", "lean_fast": "fast", "lean_channels": "fast", "lean": "default", "lean_memory": "low"}
DECODER_TARGETS = [target for target in DEFAULT_TARGETS if target.startswith("sam_mask_decoder")]
SAMPLING = {  # as in configs/base/severstal.yaml, but always a click first, so that all steps are alike
    "prob_to_use_pt_input_for_train": 1.0,
    "prob_to_use_pt_input_for_eval": 1.0,
    "prob_to_use_box_input_for_train": 0.0,
    "num_correction_pt_per_frame": 7,
}
LOSS = {
    "weight_dict": {"loss_mask": 20, "loss_dice": 1, "loss_iou": 1, "loss_class": 1},
    "supervise_all_iou": True,
    "iou_use_l1_loss": True,
    "pred_obj_scores": True,
    "focal_gamma_obj_score": 0.0,
    "focal_alpha_obj_score": -1.0,
}


class Setup(NamedTuple):
    """A model with its loss and optimizer."""

    model: torch.nn.Module
    loss: torch.nn.Module
    optimizer: torch.optim.Optimizer

    def step_loss(self, batch: BatchedVideoDatapoint) -> Tensor:
        """Forward pass and loss; the outputs are dropped, as in the Trainer."""
        return self.loss_of(self.model(batch), batch)

    def seed(self) -> None:
        """Makes the next step draw the same clicks and dropout each time."""
        torch.manual_seed(3)
        self.model.rng = np.random.default_rng(3)

    def seeded_loss(self, batch: BatchedVideoDatapoint) -> Tensor:
        """`step_loss` with the same draws each time."""
        self.seed()
        return self.step_loss(batch)

    def loss_of(self, outputs: Any, batch: BatchedVideoDatapoint) -> Tensor:
        """The loss of the model's outputs."""
        return self.loss(outputs, batch.masks)[CORE_LOSS_KEY]


def build(
    method: str,
    size: str,
    resolution: int,
    dropout: float = DROPOUT,
    activations: str | Mapping[str, Any] | None = None,
    feature_cache: Mapping[str, Any] | None = None,
    implementations: Mapping[str, str] | None = None,
) -> Setup:
    """The setup of one of `METHODS` (or of "plain", "decoder_plain"), randomly initialised from a fixed seed.

    This package's are presets of `activations`; "lean_channels" is "lean_fast" with `dropout_on: channels`; the plain
    ones are `activations: stock` with the plain layer and the plain loss.

    Args:
        method: name of the training method.
        size: one of `CONFIGS`.
        resolution: the side of the model's input in pixels.
        dropout: of the adapters.
        activations: a preset or an `activations:` block that replaces the method's own.
        feature_cache: for a decoder-only method of this package, see `FeatureCache`.
        implementations: of `lora` and `loss`; they replace those of a method of this package.
    """
    targets = DECODER_TARGETS if method.startswith("decoder") else list(DEFAULT_TARGETS)
    torch.manual_seed(0)
    if (name := method.removeprefix("decoder_")) in PRESETS:
        kind = "plain" if name == "plain" else "lean"
        kinds = {"lora": kind, "loss": kind, **(implementations or {})}
        lora = {
            "targets": targets,
            "rank": RANK,
            "alpha": ALPHA,
            "dropout": dropout,
            "implementation": kinds["lora"],
            "dropout_on": "channels" if name == "lean_channels" else "inputs",
        }
        settings = {"lora": lora, "activations": activations or PRESETS[name], "prompt_seed": PROMPT_SEED}
        model = _model(size, resolution, "sam2_lora_ext.model.LoRASAM2Train", **settings, feature_cache=feature_cache)
        loss = SeverstalLoss(**LOSS, implementation=kinds["loss"])
    else:
        model = _model(size, resolution, "training.model.sam2.SAM2Train")
        loss = MultiStepMultiMasksAndIous(**{**LOSS, "weight_dict": dict(LOSS["weight_dict"])})
        if method != "full":
            _add_peft(model, targets, dropout)
    return Setup(model.train(), loss, make_optimizer(model))


def make_optimizer(model: torch.nn.Module, foreach: bool | None = None) -> torch.optim.Optimizer:
    """AdamW over all parameters, as in the Trainer; `foreach`: many tensors at once, the default on CUDA."""
    return torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, foreach=foreach)


def make_batch(resolution: int, images: int = 1, objects: int = 2) -> BatchedVideoDatapoint:
    """A fixed batch: noise, with `objects` rectangles as the masks of each image."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(1, images, 3, resolution, resolution, generator=generator)
    masks = torch.zeros(1, images * objects, resolution, resolution, dtype=torch.bool)
    for o in range(images * objects):
        start = resolution * (o % objects + 1) // (objects + 2)
        masks[0, o, start : start + resolution // 4, resolution // 4 : resolution // 2] = True
    rows = [(image, o) for image in range(images) for o in range(objects)]
    return BatchedVideoDatapoint(
        img_batch=pixels,
        obj_to_frame_idx=torch.tensor([[(0, image) for image, _ in rows]], dtype=torch.int),
        masks=masks,
        metadata=BatchedVideoMetaData(
            unique_objects_identifier=torch.tensor([[(image, 1_000_000 + o, 0) for image, o in rows]]),
            frame_orig_size=torch.tensor([[(resolution, resolution)] * len(rows)]),
            batch_size=[1],
        ),
        dict_key="severstal",
        batch_size=[1],
    )


def tensors_of(batch: BatchedVideoDatapoint) -> list[Tensor]:
    """The tensors of a batch."""
    return [batch.img_batch, batch.masks, batch.obj_to_frame_idx, batch.metadata.unique_objects_identifier]


def _model(size: str, resolution: int, target: str, **settings: Any) -> torch.nn.Module:
    config = hydra.compose(CONFIGS[size]).model
    config = {**OmegaConf.to_container(config, resolve=True), **SAMPLING, **settings}
    return instantiate({**config, "_target_": target, "image_size": resolution})


def _add_peft(model: torch.nn.Module, targets: list[str], dropout: float) -> Mapping:
    from fnmatch import fnmatchcase

    from peft import LoraConfig, inject_adapter_in_model

    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and any(fnmatchcase(name, target) for target in targets)
    ]
    return inject_adapter_in_model(
        LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=names), model
    )
