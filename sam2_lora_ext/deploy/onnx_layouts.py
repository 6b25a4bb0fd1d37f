"""Inputs, outputs and their order in the two ONNX files, for user code or for labelling tools.

Legend: S pixels of a side of the input · B prompts · N points of each.

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
MANY = 1 << 16  # prompts, or points of one, in a call


@dataclass(frozen=True)
class Layout:
    """One pair of files.

    Attributes:
        halves: the modules, by file.
        inputs: names in order, by file.
        outputs: the same.
        image: RGB in [0, 1] (1, 3, S, S) as the encoder takes it.
        prompt: points (B, N, 2), labels (B, N) and S as the decoder takes them, in the order of its inputs.
        masks: stock's mask outputs (of four) that the decoder returns.
        configs: name -> text of a tool's config file, from the model's name and S.
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
        """The dynamic axes of each input of a half: prompts, points of a prompt, flags of prompts."""
        from torch.export import Dim

        # torch.export treats traced sizes of 0 and 1 as constants, so the examples have others
        prompts, points, flags = (Dim(axis, min=1, max=MANY) for axis in ("prompts", "points", "flags"))
        point = {0: prompts, 1: points}
        axes = {"point_coords": point, "point_labels": point, "mask_input": {0: prompts}, "has_mask_input": {0: flags}}
        return [axes.get(key) for key in self.inputs[name]]


def config_text(kind: str, with_size: bool, name: str, size: int) -> str:
    """The YAML with which a labelling tool loads the pair as a custom model.

    Args:
        kind: the tool's name of the type of the model.
        with_size: AnyLabeling needs the size too.
        name: shown in the tool's list.
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
    """Labels as floats, and no mask."""
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
    """Config files of other layouts that this one does not have."""
    return sorted({name for other in LAYOUTS.values() for name in other.configs} - set(layout.configs))
