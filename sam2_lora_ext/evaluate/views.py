"""Views of a strip: whole, resized to the model's square input, or in overlapping tiles at full resolution.

Both views take the same prompts, through the stock `SAM2ImagePredictor`. Legend: O objects, H W pixels of the strip,
P clicks, N tiles, w tile width. Coordinates are (x, y) in pixels of the strip.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from sam2.modeling.sam2_base import SAM2Base
from sam2.sam2_image_predictor import SAM2ImagePredictor
from torch import Tensor

from sam2_lora_ext.data.tiles import stitch, tile_starts
from sam2_lora_ext.evaluate.predictor import Prompter, make_predictor

NOTHING = -32.0  # logit without a prompt; the predictors clamp logits at this value too
BATCH = 16  # objects per batch of prompts

Clicks = tuple[Tensor, Tensor]
"""Coordinates float [P, 2] and labels int [P] (1 positive, 0 negative) of one object."""


@dataclass(frozen=True)
class Answer:
    """A mask bool [H, W], the object score (a logit), and the state to pass back with the next click."""

    mask: Tensor
    score: float
    memory: Any


class View(Protocol):
    """An image that can be prompted."""

    def clicks(self, clicks: Sequence[Clicks], memories: Sequence[Any]) -> list[Answer]:
        """Predicts from all clicks so far on each object; `memories` come from the previous call, None at first."""
        ...

    def boxes(self, boxes: Tensor) -> Tensor:
        """Masks bool [O, 1, H, W] for boxes float [O, 4] of (x0, y0, x1, y1)."""
        ...


class Scores:
    """Keeps the object scores float [O] of the decoder's last call, which the stock predictor discards."""

    def __init__(self, model: SAM2Base):
        self.last = torch.zeros(0)
        self.handle = model.sam_mask_decoder.register_forward_hook(self._keep)

    def _keep(self, module: torch.nn.Module, arguments: Any, outputs: tuple) -> None:
        self.last = outputs[3].detach()[:, 0].float().cpu()


class WholeView:
    """The strip as one image."""

    def __init__(self, predictor: SAM2ImagePredictor, scores: Scores, image: np.ndarray):
        self.prompter, self.scores = Prompter(predictor, image), scores

    def clicks(self, clicks: Sequence[Clicks], memories: Sequence[Any]) -> list[Answer]:
        answers = []
        for first in range(0, len(clicks), BATCH):
            part, before = clicks[first : first + BATCH], memories[first : first + BATCH]
            coords, labels = (torch.stack(column) for column in zip(*part))
            previous = torch.stack(list(before)) if before[0] is not None else None
            logits, low = self.prompter.points(coords, labels, previous)
            answers += [Answer(logits[o, 0] > 0, float(self.scores.last[o]), low[o]) for o in range(len(part))]
        return answers

    def boxes(self, boxes: Tensor) -> Tensor:
        return torch.cat([self.prompter.corners(part)[0] > 0 for part in boxes.split(BATCH)])


class TiledView:
    """The strip in tiles, each a separate image.

    Clicks prompt the tiles that contain them; a tile is prompted from its first positive click on. A box prompts all
    tiles that it intersects, each with its part of the box. Where tiles overlap, their logits are averaged as in
    `tiles.stitch`; without a prompted tile the mask is empty. An object across two tiles may need a click in each tile;
    both clicks count.
    """

    def __init__(
        self, predictors: Sequence[SAM2ImagePredictor], scores: Scores, image: np.ndarray, tile: int, overlap: int
    ):
        self.height, self.width = image.shape[:2]
        self.tile, self.scores = min(tile, self.width), scores
        self.starts = tile_starts(self.width, tile, overlap)
        self.prompters = [
            Prompter(predictor, np.ascontiguousarray(image[:, start : start + self.tile]))
            for predictor, start in zip(predictors, self.starts, strict=False)
        ]

    def clicks(self, clicks: Sequence[Clicks], memories: Sequence[Any]) -> list[Answer]:
        return [self._click(*history, memory or {}) for history, memory in zip(clicks, memories, strict=True)]

    def _click(self, coords: Tensor, labels: Tensor, known: dict[int, tuple]) -> Answer:
        known = dict(known)  # tile -> number of its clicks so far, logits [H, w], low-resolution logits, score
        for n, start in enumerate(self.starts):
            inside = (coords[:, 0] >= start) & (coords[:, 0] < start + self.tile)
            if not (labels[inside] == 1).any() or n in known and known[n][0] == int(inside.sum()):
                continue
            local = coords[inside] - torch.tensor([float(start), 0.0])
            previous = known[n][2] if n in known else None
            logits, low = self.prompters[n].points(local[None], labels[inside][None], previous)
            known[n] = int(inside.sum()), logits[0, 0], low, float(self.scores.last[0])
        logits = self._together({n: answer[1] for n, answer in known.items()})
        return Answer(logits > 0, max(answer[3] for answer in known.values()), known)

    def boxes(self, boxes: Tensor) -> Tensor:
        masks = []
        for x0, y0, x1, y1 in boxes.tolist():
            answers = {}
            for n, start in enumerate(self.starts):
                low, high = max(x0 - start, 0.0), min(x1 - start, self.tile - 1.0)
                if low <= high:
                    answers[n] = self.prompters[n].corners(torch.tensor([[low, y0, high, y1]]))[0][0, 0]
            masks.append(self._together(answers) > 0)
        return torch.stack(masks)[:, None]

    def _together(self, answers: dict[int, Tensor]) -> Tensor:
        """The logits [H, W] of the strip from the logits [H, w] of some of its tiles."""
        out = torch.full((self.height, self.width), NOTHING)
        covered = torch.zeros(self.width, dtype=torch.bool)
        for n in answers:
            covered[self.starts[n] : self.starts[n] + self.tile] = True
        edges = torch.diff(covered.int(), prepend=torch.zeros(1), append=torch.zeros(1)).nonzero()[:, 0].reshape(-1, 2)
        for left, right in edges.tolist():  # contiguous ranges
            inside = [n for n in sorted(answers) if left <= self.starts[n] < right]
            out[:, left:right] = stitch(
                torch.stack([answers[n] for n in inside]), [self.starts[n] - left for n in inside], right - left
            )
        return out


class Viewer:
    """Makes the views of one model.

    Args:
        model: a SAM 2 in eval mode.
        tile: tile width w, or None for whole strips.
        overlap: minimum overlap of neighbouring tiles in columns.
    """

    def __init__(self, model: SAM2Base, tile: int | None = None, overlap: int = 0):
        self.model, self.tile, self.overlap = model, tile, overlap
        self.scores = Scores(model)
        self.predictors: list[SAM2ImagePredictor] = []

    def __enter__(self) -> "Viewer":
        return self

    def __exit__(self, *error: object) -> None:
        self.scores.handle.remove()

    def look(self, image: np.ndarray) -> View:
        """Encodes an image uint8 [H, W, 3]; the view is valid until the next call."""
        needed = 1 if self.tile is None else len(tile_starts(image.shape[1], self.tile, self.overlap))
        while len(self.predictors) < needed:
            self.predictors.append(make_predictor(self.model))
        if self.tile is None:
            return WholeView(self.predictors[0], self.scores, image)
        return TiledView(self.predictors, self.scores, image, self.tile, self.overlap)
