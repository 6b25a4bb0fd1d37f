"""Segments a strip into a mask for each defect class, without clicks.

    segmenter = load_segmenter("configs/sam2.1/sam2.1_hiera_l.yaml", "steel.pt")
    inspection = segmenter(image)            # uint8 [H, W, 3]
    inspection.masks, inspection.scores      # bool [C, H, W], float32 [C]

Legend: C classes in the order of their ids, H W pixels of the strip, N tiles, S pixels of a side of the model's input.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sam2_lora_ext.adapters.class_binding import tokens_of
from sam2_lora_ext.adapters.class_prompts import ClassPrompts, load_class_prompts
from sam2_lora_ext.adapters.decision import Decision, calibrated
from sam2_lora_ext.adapters.sources import read_adapter
from sam2_lora_ext.adapters.weights import weights_id
from sam2_lora_ext.class_prompts.decide import decide
from sam2_lora_ext.class_prompts.stitching import Tiles, merge_tiles
from sam2_lora_ext.data.tiles import cut, tile_starts
from sam2_lora_ext.host.class_encoder import install_class_prompts
from sam2_lora_ext.inspection.network import ClassNetwork
from sam2_lora_ext.inspection.objects import Found, find_objects
from sam2_lora_ext.utils.errors import UserError

OVERLAP = 4  # neighbouring tiles share at least 1 / OVERLAP of their columns
BATCH = 8  # tiles at once


@dataclass(frozen=True)
class Inspection:
    """The result for one strip.

    Args:
        masks: bool [C, H, W].
        scores: presence scores (logits) [C], the maximum over the tiles.
        logits: calibrated, [C, H, W]; `decision.ABSENT` where no tile has the class.
        objects: the components of the masks, by class.
    """

    masks: Tensor
    scores: Tensor
    logits: Tensor
    objects: tuple[Found, ...]


class Segmenter:
    """Finds the defects of a strip.

    Args:
        model: stock SAM 2 in eval mode, with the tokens installed.
        prompts: the class prompts; their decision may be replaced at any time.
        overlap: minimum number of columns that neighbouring tiles share; None for a quarter of a tile.
        batch_size: maximum number of tiles in one call.
        half: compute in bfloat16 on a GPU, as training does.

    Raises:
        UserError: the model has no tokens or another input size than in training, or the overlap is too large.
    """

    def __init__(
        self,
        model: nn.Module,
        prompts: ClassPrompts,
        overlap: int | None = None,
        batch_size: int = BATCH,
        half: bool = False,
    ):
        self.network = ClassNetwork(model)
        if self.network.size != prompts.resolution:
            raise UserError(
                f"the class prompts were trained at {prompts.resolution} pixels, but the model takes "
                f"{self.network.size}: build it with image_size={prompts.resolution}"
            )
        if overlap is not None and not 0 <= overlap < (prompts.crop or overlap + 1):
            most = "" if prompts.crop is None else f" and at most {prompts.crop - 1}"
            raise UserError(f"tiles of {prompts.crop} columns cannot share {overlap}: give at least 0{most}")
        self.prompts, self.overlap, self.batch_size, self.half = prompts, overlap, batch_size, half

    @property
    def decision(self) -> Decision:
        """The decision in use."""
        return self.prompts.decision

    @decision.setter
    def decision(self, decision: Decision) -> None:
        self.prompts = replace(self.prompts, decision=decision)

    def __call__(self, image: np.ndarray) -> Inspection:
        """Inspects a strip uint8 [H, W, 3] in RGB."""
        return self.judge(self.look(image))

    @torch.inference_mode()
    def look(self, image: np.ndarray) -> Tiles:
        """The network's outputs for the tiles of a strip uint8 [H, W, 3], before the decision.

        Raises:
            UserError: it is not such an array, or an output is NaN or infinite.
        """
        if (
            not isinstance(image, np.ndarray)
            or image.dtype != np.uint8
            or image.ndim != 3
            or image.shape[2] != 3
            or 0 in image.shape
        ):
            raise UserError("an image must be an array uint8 [height, width, 3] of RGB, see data.images.read_rgb")
        height, width = image.shape[:2]
        tile = min(self.prompts.crop or width, width)
        overlap = tile // OVERLAP if self.overlap is None else min(self.overlap, tile - 1)
        starts = tile_starts(width, tile, overlap)
        strip = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
        answers = [self._predict(part) for part in cut(strip, starts, tile).split(self.batch_size)]
        logits, scores = (torch.cat(column) for column in zip(*answers, strict=True))
        if not bool(scores.isfinite().all()) or not bool(logits.isfinite().all()):
            raise UserError("the model outputs NaN or infinity: the weights are damaged or training diverged")
        return Tiles(logits, scores, tuple(starts), tile, (height, width))

    @torch.inference_mode()
    def judge(self, tiles: Tiles) -> Inspection:
        """Stitches the tiles and applies the decision."""
        logits, scores = merge_tiles(tiles, self.decision)
        masks, z = decide(logits, scores, self.decision).cpu(), calibrated(logits, self.decision).cpu()
        scores = scores.cpu()
        return Inspection(masks, scores, z, find_objects(masks, z, scores, self.prompts.class_ids))

    def _predict(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and scores of tiles uint8 [n, 3, H, w], squashed to the model's input size as in training."""
        pixels = tiles.to(self.network.device).float() / 255
        size = (self.network.size, self.network.size)
        pixels = F.interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=True)
        with self._precision():
            return self.network(pixels)

    @contextlib.contextmanager
    def _precision(self) -> Iterator[None]:
        half = self.half and self.network.device.type == "cuda"
        with torch.autocast(self.network.device.type, torch.bfloat16, enabled=half):
            yield


def load_segmenter(
    config: str | None,
    path: str | Path,
    *,
    base: str | Path | None = None,
    device: str | torch.device | None = None,
    overlap: int | None = None,
    batch_size: int = BATCH,
    half: bool = False,
) -> Segmenter:
    """Builds stock SAM 2 with the class prompts of a file.

    Args:
        config: a stock config's name; None identifies it from the weights.
        path: merged weights with class prompts, an adapter folder, or a run.
        base: of an adapter; by default the file that it was trained on, if it still exists.
        device: by default the GPU if there is one, else the CPU.
        overlap: see `Segmenter`.
        batch_size: see `Segmenter`.
        half: see `Segmenter`.

    Raises:
        UserError: a file is missing or damaged, has no class prompts, or they belong to other weights.
    """
    from sam2_lora_ext.evaluate.models import build, candidate  # imports SAM 2

    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    wanted = candidate(str(path), None if base is None else Path(base), config)
    source = wanted.adapter or wanted.weights
    prompts = load_class_prompts(source) if wanted.adapter is None else read_adapter(source).class_prompts
    if prompts is None:
        raise UserError(
            f"{source} has no class prompts, so it needs clicks: train with a config that has "
            "class_prompts, such as severstal_lora_classes, and merge that adapter"
        )
    model, _ = build(wanted, "cpu", prompts.resolution)
    beside = wanted.adapter is None and source.suffix == ".safetensors"
    if beside and prompts.digest and prompts.digest != weights_id(model.state_dict()):
        raise UserError(f"the class prompts next to {source} belong to other weights: copy both files again")
    install_class_prompts(model, tokens_of(prompts))
    return Segmenter(model.to(device), prompts, overlap, batch_size, half)
