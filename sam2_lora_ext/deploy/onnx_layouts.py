"""Defines the inputs and outputs of the two ONNX files and their order, for user code or labelling tools.

Legend: S side of the input in pixels · B prompts · N points per prompt.

`plain` is for user code; see `onnx_models.py`. `samexporter` is the interface of samexporter's runner for SAM 2, which
AnyLabeling and X-AnyLabeling include too: they identify inputs and outputs by position and not by name, scale points to
the input's pixels, and show the mask with the best predicted IoU. The two tools also get a config file.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from sam2_lora_ext.deploy.onnx_models import ImageHalf, LabellingImageHalf, LabellingPromptHalf, PromptHalf
from sam2_lora_ext.deploy.stock import normalised

FEATURES = ("image_embed", "high_res_feats_0", "high_res_feats_1")
PAIR = ("image_encoder", "mask_decoder")  # the files' names, without .onnx
MANY = 1 << 16  # largest number of prompts, and of points per prompt, in a call


@dataclass(frozen=True)
class Layout:
    """The interface of one pair of files.

    Attributes:
        halves: the modules, by file.
        inputs: names of the inputs in order, by file.
        outputs: names of the outputs in order, by file.
        image: RGB in [0, 1] (1, 3, S, S) -> the encoder's input.
        prompt: points (B, N, 2), labels (B, N) and S -> the decoder's inputs, in order.
        masks: which of stock's four mask outputs the decoder returns.
        configs: file name -> function from the model's name and S to the text of a tool's config file.
    """

    halves: dict[str, Callable[[nn.Module], nn.Module]]
    inputs: dict[str, tuple[str, ...]]
    outputs: dict[str, tuple[str, ...]]
    image: Callable[[Tensor], Tensor]
    prompt: Callable[[Tensor, Tensor, int], tuple[Tensor, ...]]
    masks: slice
    configs: dict[str, Callable[[str, int], str]] = field(default_factory=dict)

    def examples(self, model: nn.Module, pixels: Tensor) -> dict[str, tuple[Tensor, ...]]:
        """Example inputs for tracing the two halves: an image (1, 3, S, S), and B = 3 prompts of N = 2 points."""
        size = pixels.shape[-1]
        with torch.no_grad():
            outputs = self.halves["image_encoder"](model)(self.image(pixels))
        features = dict(zip(self.outputs["image_encoder"], outputs, strict=True))
        coords = torch.tensor([[[0.2, 0.3], [0.7, 0.8]]]).repeat(3, 1, 1) * size
        prompt = self.prompt(coords, torch.tensor([[2, 3], [1, 0], [1, -1]]), size)
        return {"image_encoder": (self.image(pixels),), "mask_decoder": (*map(features.get, FEATURES), *prompt)}

    def open_sizes(self, name: str) -> list[dict[int, Any] | None]:
        """The dynamic axes of each input of a half: prompts, points per prompt, flags of prompts."""
        from torch.export import Dim

        # torch.export treats traced sizes of 0 and 1 as constants, so the examples have larger sizes
        prompts, points, flags = (Dim(axis, min=1, max=MANY) for axis in ("prompts", "points", "flags"))
        point = {0: prompts, 1: points}
        axes = {"point_coords": point, "point_labels": point, "mask_input": {0: prompts}, "has_mask_input": {0: flags}}
        return [axes.get(key) for key in self.inputs[name]]


def config_text(kind: str, with_size: bool, name: str, size: int) -> str:
    """The YAML config of the pair as a custom model of a labelling tool.

    Args:
        kind: the tool's name for this type of model.
        with_size: write the size too, which AnyLabeling needs.
        name: the name in the tool's list.
        size: S.
    """
    encoder, decoder = (f"{half}.onnx" for half in PAIR)
    config = {
        "type": kind,
        "name": re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._") or "sam2",  # the tool's folder
        "display_name": f"SAM 2 ({name})",
        "encoder_model_path": encoder,
        "decoder_model_path": decoder,
        **({"input_size": size, "max_width": size, "max_height": size} if with_size else {}),
    }
    return yaml.safe_dump(config, sort_keys=False)


def _plain_prompt(coords: Tensor, labels: Tensor, size: int) -> tuple[Tensor, ...]:
    return coords, labels


def _labelling_prompt(coords: Tensor, labels: Tensor, size: int) -> tuple[Tensor, ...]:
    """Points, labels as floats, and an unused mask."""
    prompts = len(coords)
    return coords, labels.float(), torch.zeros(prompts, 1, size // 4, size // 4), torch.zeros(prompts)


LAYOUTS = {
    "plain": Layout(
        halves=dict(zip(PAIR, (ImageHalf, PromptHalf))),
        inputs=dict(zip(PAIR, (("pixels",), (*FEATURES, "point_coords", "point_labels")))),
        outputs=dict(zip(PAIR, (FEATURES, ("masks", "iou_predictions", "object_score")))),
        image=lambda pixels: pixels,
        prompt=_plain_prompt,
        masks=slice(0, 4),
    ),
    "samexporter": Layout(
        halves=dict(zip(PAIR, (LabellingImageHalf, LabellingPromptHalf))),
        inputs=dict(
            zip(
                PAIR,
                (
                    ("image",),
                    (*FEATURES, "point_coords", "point_labels", "mask_input", "has_mask_input"),
                ),
            )
        ),
        outputs=dict(zip(PAIR, ((*FEATURES[1:], FEATURES[0]), ("masks", "iou_predictions")))),
        image=normalised,
        prompt=_labelling_prompt,
        masks=slice(1, 4),
        configs={
            "x_anylabeling.yaml": partial(config_text, "segment_anything_2", False),
            "anylabeling.yaml": partial(config_text, "segment_anything", True),
        },
    ),
}


def configs_of_others(layout: Layout) -> Iterable[str]:
    """The names of config files that only other layouts write."""
    return sorted({name for other in LAYOUTS.values() for name in other.configs} - set(layout.configs))
