"""SAM 2's training model with LoRA, prompts for clean strips, and the targets in its outputs.

Legend: T frames, O objects, H W pixels of the model's square input.
"""

from collections.abc import Mapping
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor
from training.model.sam2 import SAM2Train
from training.utils.data_utils import BatchedVideoDatapoint

from sam2_lora_ext.activations.cast import cast_frozen
from sam2_lora_ext.activations.feature_cache import FeatureCache
from sam2_lora_ext.activations.maps import UnreadPositions
from sam2_lora_ext.activations.policy import ActivationsConfig, falls_due, make_lean, renamed
from sam2_lora_ext.class_prompts.steps import ClassStep, new_tokens, raw_heads, steel_without_objects
from sam2_lora_ext.data.ids import class_of
from sam2_lora_ext.host.class_encoder import install_class_prompts
from sam2_lora_ext.lora import LoRAConfig, build_lora_model, lora_layers
from sam2_lora_ext.lora.class_tokens import TOKENS
from sam2_lora_ext.lora.shared import checkpointed, sharing
from sam2_lora_ext.losses import SMALL_MASKS
from sam2_lora_ext.prompts import PromptSampler
from sam2_lora_ext.run.seeding import derive_seed, mixed
from sam2_lora_ext.utils.errors import UserError

# Pixels below this are unexposed black (about 10 of 255 after SAM 2's ImageNet normalisation), not steel to click on.
BLACK_LEVEL = -1.85


class LoRASAM2Train(SAM2Train):
    """`SAM2Train` that freezes the base, trains adapters, and adds targets and classes to its outputs.

    Args:
        lora: the `LoRAConfig` as a mapping; None trains every parameter (the full fine-tuning baseline).
        activations: what a step saves for backward: the name of one of `activations.policy.PRESETS`, or an
            `ActivationsConfig` as a mapping. With its `weights`, the first forward pass under autocast casts frozen
            weights in place, permanently.
        prompt_seed: draw the training clicks of each object from (prompt_seed, step, video, object), so that they
            depend neither on the rest of the batch nor on the rank. The step is a number drawn from `rng`, which all
            ranks share. None: from the rank's global generator, as stock does.
        class_prompts: learned tokens for classes, see `class_prompts.steps.new_tokens`; None: clicks and boxes only.
        feature_cache: `folder` and `max_gb` of a `FeatureCache`, for training with a frozen image encoder.
        memory: the name of `activations` in version 0.1.
        **kwargs: everything that `SAM2Train` takes.
    """

    def __init__(
        self,
        *args: Any,
        lora: Mapping | LoRAConfig | None = None,
        activations: Mapping | ActivationsConfig | str = "stock",
        prompt_seed: int | None = None,
        class_prompts: Mapping | None = None,
        feature_cache: Mapping | None = None,
        memory: Mapping | str | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.activations = ActivationsConfig.of(activations if memory is None else renamed(memory))
        make_lean(self, self.activations)
        self.weights_dtype: torch.dtype | None = None  # of the frozen weights, once they are cast
        self.prompt_seed = prompt_seed
        self.predictions = 0  # prediction steps of the current or last forward pass
        self.prompts: PromptSampler | None = None  # of the current forward pass
        self.prompted_by_points = True  # in the last forward pass
        if lora is not None:
            build_lora_model(self, lora)
        if class_prompts is not None:
            install_class_prompts(self, *new_tokens(class_prompts, self.sam_prompt_embed_dim, prompt_seed or 0))
        self.class_step: ClassStep | None = None  # of the last forward pass; recomputation in backward reads it
        self.feature_cache: FeatureCache | None = None
        if feature_cache is not None:
            decoder = self.sam_mask_decoder
            parts = {"image_encoder": self.image_encoder, "conv_s0": decoder.conv_s0, "conv_s1": decoder.conv_s1}
            self.feature_cache = FeatureCache(feature_cache, parts)

    def forward(self, input: BatchedVideoDatapoint) -> list[dict[str, Any]]:
        """Stock's forward; each frame's outputs also carry `gt_masks` bool [O, 1, H, W], `class_ids` int64 [O] and
        `class_prompt` (whether the prompts were class prompts)."""
        self.hold_weights(input.img_batch.device.type)
        tokens = getattr(self.sam_prompt_encoder, TOKENS, None)
        self.class_step = ClassStep.of(input.metadata.unique_objects_identifier[..., 1], tokens)
        self.prompts = self._prompt_sampler(input)
        self.predictions = 0
        with self.prompts.installed(), sharing():
            outputs = super().forward(input)
        self.prompts = None
        class_ids = class_of(input.metadata.unique_objects_identifier[..., 1])  # T O
        for t, frame in enumerate(outputs):
            frame["gt_masks"] = input.masks[t].unsqueeze(1)
            frame["class_ids"] = class_ids[t]
            frame["class_prompt"] = self.class_step is not None
            # with a mask prompt, the high-resolution masks are the prompt itself, not the enlarged small masks
            if not self.prompted_by_points:
                frame.pop(SMALL_MASKS)
        return outputs

    def hold_weights(self, kind: str) -> None:
        """Casts the frozen weights of an adapted model, the first time that autocast is on for devices of this kind.

        Without adapters a run exports the model itself, so its weights are not cast.
        """
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        if self.weights_dtype is None and dtype is not None and self.activations.weights and any(lora_layers(self)):
            cast_frozen(self, dtype)  # not in __init__, where the base is not loaded yet
            self.weights_dtype = dtype
        if self.weights_dtype not in (None, dtype):
            raise UserError(
                f"the frozen weights were cast to {self.weights_dtype} in an earlier step under autocast, "
                f"but this step runs {'without' if dtype is None else f'under {dtype}'} autocast: "
                "build the model again, or set activations.weights to false"
            )

    def forward_image(self, img_batch: Tensor) -> dict[str, Any]:
        """Stock's image features; `activations` can limit the position encodings to those of the last level.

        The other levels are never read; they have no channels then, where stock gathers 256 per object and position.
        """
        encoding = self.image_encoder.neck.position_encoding
        if type(encoding) is not UnreadPositions and self.feature_cache is None:
            return super().forward_image(img_batch)

        def encode(images: Tensor) -> list[Tensor]:
            return super(LoRASAM2Train, self).forward_image(images)["backbone_fpn"]

        maps = encode(img_batch) if self.feature_cache is None else self.feature_cache(img_batch, encode)
        unread = [encoding(level) for level in maps[:-1]]
        position = getattr(encoding, "positions", encoding)(maps[-1]).to(maps[-1].dtype)
        return {"vision_features": maps[-1], "vision_pos_enc": [*unread, position], "backbone_fpn": maps}

    def prepare_prompt_inputs(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Stock's choice of the first prompts; all later clicks are corrections."""
        prepared = super().prepare_prompt_inputs(*args, **kwargs)
        self.prompts.correcting = True
        self.prompted_by_points = prepared["use_pt_input"]
        if self.class_step is not None and not self.class_step.corrected:
            prepared["frames_to_add_correction_pt"] = []
        return prepared

    def track_step(self, *args: Any, num_frames: int, run_mem_encoder: bool = True, **kwargs: Any) -> dict[str, Any]:
        """Stock's step; the memory of a single frame is never read, so it is not encoded."""
        return super().track_step(
            *args, num_frames=num_frames, run_mem_encoder=run_mem_encoder and num_frames > 1, **kwargs
        )

    def _use_multimask(self, *args: Any) -> bool:
        """Stock's choice, except that a class prompt always has a single mask, whatever its number of tokens."""
        return self.class_step is None and super()._use_multimask(*args)

    def _forward_sam_heads(self, *args: Any, **kwargs: Any) -> tuple:
        """Stock's prediction step, recomputed in backward where `activations` sets it."""
        heads = super()._forward_sam_heads
        if self.class_step is not None:
            heads = partial(raw_heads, self, heads)
        self.predictions += 1
        if not self.use_act_ckpt_iterative_pt_sampling and falls_due(self.predictions, self.activations.decoder):
            return checkpointed(heads, *args, **kwargs)
        return heads(*args, **kwargs)

    def _prompt_sampler(self, input: BatchedVideoDatapoint) -> PromptSampler:
        video, identifier = input.metadata.unique_objects_identifier[0, :, :2].unbind(1)
        images = input.flat_obj_to_img_idx[0]
        sound = (input.flat_img_batch.mean(1) > BLACK_LEVEL)[images]  # O H W
        empty = ~input.masks.view(torch.uint8).flatten(2).amax((0, 2)).bool()  # O; `any` is slow on a CPU
        first = None
        if self.class_step is not None:
            first = self.class_step.prompt
            if self.class_step.corrected:  # otherwise there are no clicks
                sound = steel_without_objects(sound, input.masks[0], images)
        seeded = self.training and self.prompt_seed is not None
        # Clicks differ from step to step in training and are always the same in validation.
        rng = self.rng if seeded else deepcopy(self.rng)  # the copy leaves stock's own draws unchanged
        step = int(rng.integers(2**31)) if self.training else 0
        keys = mixed(mixed(video + derive_seed(self.prompt_seed or 0, step)) + identifier)
        return PromptSampler(empty, sound, keys, seeded=seeded, exact_boxes=not self.training, first=first)
