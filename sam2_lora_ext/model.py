"""SAM 2's training model with LoRA inside, prompts for clean strips, and the targets beside each output.

Legend: T frames, O objects, H W pixels of the model's square input.
"""

from collections.abc import Mapping
from typing import Any

import torch
from sam2.modeling.position_encoding import PositionEmbeddingSine
from torch import Tensor
from training.model.sam2 import SAM2Train
from training.utils.data_utils import BatchedVideoDatapoint

from sam2_lora_ext.data.ids import CLEAN, class_of
from sam2_lora_ext.errors import UserError
from sam2_lora_ext.lean.cast import cast_frozen
from sam2_lora_ext.lean.feature_cache import FeatureCache
from sam2_lora_ext.lean.maps import OfOneImage, UnreadPositions
from sam2_lora_ext.lean.memory import MemoryConfig, checkpointed, falls_due, make_lean
from sam2_lora_ext.lean.recompute import recomputing
from sam2_lora_ext.lean.shared import sharing
from sam2_lora_ext.lean.upscaling import by_corners
from sam2_lora_ext.lora import LoRAConfig, build_lora_model, lora_layers
from sam2_lora_ext.losses import SMALL_MASKS
from sam2_lora_ext.prompts import PromptSampler
from sam2_lora_ext.seeding import derive_seed

# Pixels below this are unexposed black (about 10 of 255 after SAM 2's ImageNet normalisation), not steel to click on.
BLACK_LEVEL = -1.85


class LoRASAM2Train(SAM2Train):
    """`SAM2Train` that freezes the base, trains adapters, and tells losses and meters what they need.

    Args:
        lora: the `LoRAConfig` as a mapping; None trains every parameter (the full fine-tuning baseline).
        memory: what a step keeps for backward: the name of one of `lean.memory.PRESETS`, or a `MemoryConfig` as a mapping.
            With its `weights`, the first forward pass under autocast casts frozen weights in place, for good.
        prompt_seed: draw the training clicks of each object from (prompt_seed, step, video, object), the step as a number of `rng`,
            which all ranks share, and not from the global generator of its rank: so they do not depend on what else is in the
            batch nor on the rank. None: from the global generator, as stock.
        feature_cache: `folder` and `max_gb` of a `FeatureCache`, for training with a frozen image encoder.
        **kwargs: everything that `SAM2Train` takes.
    """

    def __init__(
        self, *args: Any, lora: Mapping | LoRAConfig | None = None, memory: Mapping | MemoryConfig | str = "stock",
        prompt_seed: int | None = None, feature_cache: Mapping | None = None, **kwargs: Any,
    ):  # fmt: skip
        super().__init__(*args, **kwargs)
        self.memory = MemoryConfig.of(memory)
        make_lean(self, self.memory)
        encoding = self.image_encoder.neck.position_encoding
        if type(encoding) is not PositionEmbeddingSine:
            raise UserError("trainer.model.image_encoder.neck.position_encoding must be "
                            "sam2.modeling.position_encoding.PositionEmbeddingSine, as in SAM 2's own configs, got "
                            f"{type(encoding).__module__}.{type(encoding).__name__}")  # fmt: skip
        encoding.__class__ = UnreadPositions
        encoding.cache.clear()
        self.weights_dtype: torch.dtype | None = None  # of the frozen weights, once they are cast
        self.prompt_seed = prompt_seed
        self.predictions = 0  # of the forward pass that is running, or of the last one
        self.prompts: PromptSampler | None = None  # of the forward pass that is running
        self.prompted_by_points = True  # in the last forward pass
        if lora is not None:
            build_lora_model(self, lora)
        self.feature_cache: FeatureCache | None = None
        if feature_cache is not None:
            decoder = self.sam_mask_decoder
            parts = {"image_encoder": self.image_encoder, "conv_s0": decoder.conv_s0, "conv_s1": decoder.conv_s1}
            self.feature_cache = FeatureCache(feature_cache, parts)

    def forward(self, input: BatchedVideoDatapoint) -> list[dict[str, Any]]:
        """Stock's forward; each frame's outputs also carry `gt_masks` bool [O, 1, H, W] and `class_ids` int64 [O]."""
        self.hold_weights(input.img_batch.device.type)
        self.prompts = self._prompt_sampler(input)
        self.predictions = 0
        with self.prompts.installed(), sharing():
            outputs = super().forward(input)
        self.prompts = None
        class_ids = class_of(input.metadata.unique_objects_identifier[..., 1])  # T O
        for t, frame in enumerate(outputs):
            frame["gt_masks"] = input.masks[t].unsqueeze(1)
            frame["class_ids"] = class_ids[t]
            if not self.prompted_by_points:  # the large masks of a mask prompt are the prompt, not its small ones enlarged
                frame.pop(SMALL_MASKS)
        return outputs

    def hold_weights(self, kind: str) -> None:
        """Casts the frozen weights of an adapted model, the first time that autocast is on for devices of this kind.

        Without adapters the model itself is what a run exports, so its weights stay.
        """
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        if self.weights_dtype is None and dtype is not None and self.memory.weights and any(lora_layers(self)):
            cast_frozen(self, dtype)  # here, for by now the base is loaded
            self.weights_dtype = dtype
        if self.weights_dtype not in (None, dtype):
            raise UserError(f"the frozen weights are held in {self.weights_dtype} since a step under autocast, and this one is "
                            f"{'without' if dtype is None else f'under {dtype}'}: build the model anew, or set memory.weights to false")

    def forward_image(self, img_batch: Tensor) -> dict[str, Any]:
        """Stock's image features, without the position encodings of all levels but the last: nobody reads them.

        They have no channels here. Stock gathers 256 for each object and position, the largest tensors of its step.
        """
        def encode(images: Tensor) -> list[Tensor]:
            return super(LoRASAM2Train, self).forward_image(images)["backbone_fpn"]

        maps = encode(img_batch) if self.feature_cache is None else self.feature_cache(img_batch, encode)
        encoding = self.image_encoder.neck.position_encoding
        unread = [encoding(level) for level in maps[:-1]]
        position = encoding.positions(maps[-1]).to(maps[-1].dtype)
        return {"vision_features": maps[-1], "vision_pos_enc": [*unread, position], "backbone_fpn": maps}

    def _prepare_backbone_features(self, backbone_out: dict[str, Any]) -> tuple:
        """Stock's flat features and positions; of a single image, for tracking, what hands them to its objects."""
        backbone_out, features, positions, sizes = super()._prepare_backbone_features(backbone_out)
        tracking = "num_frames" in backbone_out  # and so indexed by the objects' images
        if self.memory.operations and tracking and features[0].shape[1] == 1:
            features, positions = ([OfOneImage(level) for level in levels] for levels in (features, positions))
        return backbone_out, features, positions, sizes

    def prepare_prompt_inputs(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Stock's choice of the first prompts; the clicks after it are corrections."""
        prepared = super().prepare_prompt_inputs(*args, **kwargs)
        self.prompts.correcting = True
        self.prompted_by_points = prepared["use_pt_input"]
        return prepared

    def track_step(self, *args: Any, num_frames: int, run_mem_encoder: bool = True, **kwargs: Any) -> dict[str, Any]:
        """Stock's step; the memory of a single frame is read by nobody, so it is not encoded."""
        return super().track_step(*args, num_frames=num_frames, run_mem_encoder=run_mem_encoder and num_frames > 1, **kwargs)

    def _forward_sam_heads(self, *args: Any, high_res_features: list[Tensor] | None = None, **kwargs: Any) -> tuple:
        """Stock's prediction step, keeping for backward what `memory` says."""
        heads = super()._forward_sam_heads
        kwargs["high_res_features"] = by_corners(self.sam_mask_decoder, high_res_features)
        self.predictions += 1
        share, selective = self.memory.decoder, self.memory.selective
        if self.use_act_ckpt_iterative_pt_sampling:  # SAM 2 computes them again itself, and so calls this once more
            share, selective = float(selective or share > 0), False
        if falls_due(self.predictions, share):
            return checkpointed(heads, *args, **kwargs)
        with recomputing(selective):
            return heads(*args, **kwargs)

    def _prompt_sampler(self, input: BatchedVideoDatapoint) -> PromptSampler:
        identifiers = input.metadata.unique_objects_identifier[0]  # O 3
        empty = class_of(identifiers[:, 1]) == CLEAN
        images = input.flat_img_batch[input.flat_obj_to_img_idx[0]] if empty.any() else input.flat_img_batch[:1]
        sound = images.mean(1) > BLACK_LEVEL  # O H W
        video_and_object = identifiers[:, :2].tolist()
        seeds = None
        if self.training and self.prompt_seed is not None:
            step = int(self.rng.integers(2**31))
            seeds = [derive_seed(self.prompt_seed, step, *pair) for pair in video_and_object]
        # A clean object's click is new each time in training and the same each time in validation.
        salt = int(torch.randint(2**31, (1,))) if self.training and seeds is None and empty.any() else 0
        fixed = [derive_seed(salt, *pair) for pair in video_and_object]
        return PromptSampler(empty, sound, seeds, fixed=fixed, exact_boxes=not self.training)
