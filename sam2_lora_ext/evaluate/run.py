"""Asks one model about every object of a data set and keeps what came out, object by object.

Legend: O objects, H W pixels. Areas are (intersection, prediction, target) in pixels.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from sam2.modeling.sam2_base import SAM2Base
from torch import Tensor

from sam2_lora_ext.data.rle import encode_mask
from sam2_lora_ext.evaluate.automatic import AutomaticMasks
from sam2_lora_ext.evaluate.boundary import boundary_f
from sam2_lora_ext.evaluate.clicks import click_rounds, exact_boxes, shifted_boxes, sound_clicks
from sam2_lora_ext.evaluate.views import Viewer
from sam2_lora_ext.evaluation import Sample
from sam2_lora_ext.metrics import mask_counts


@dataclass(frozen=True)
class Protocol:
    """What is asked; the same for every model of a comparison.

    Args:
        clicks: the numbers of clicks that are reported.
        max_clicks: clicks that a user makes at most (for clicks to reach an IoU); at least the largest of `clicks`.
        shifts: shares by which boxes are moved.
        tolerance: of the boundary F, in pixels.
        clean_clicks: clicks on each clean image.
        tile: w of tiles, None for whole strips.
        overlap: of tiles, in columns.
        crop: columns around the objects that are cut out first, as in the run's own validation; None for all.
        automatic: points per side for automatic masks; None leaves them out.
        seed: of box shifts and clean clicks.
    """

    clicks: tuple[int, ...] = (1, 2, 4, 8)
    max_clicks: int = 8
    shifts: tuple[float, ...] = (0.05, 0.10, 0.20)
    tolerance: int = 2
    clean_clicks: int = 4
    tile: int | None = None
    overlap: int = 0
    crop: int | None = None
    automatic: int | None = None
    seed: int = 0

    @property
    def prompts(self) -> list[str]:
        """The names of what is asked: 1click, 2clicks, ..., box, box_5, ... ."""
        names = [f"{count}click{'s' if count > 1 else ''}" for count in self.clicks]
        return [*names, "box", *[f"box_{round(100 * share)}" for share in self.shifts]]


@dataclass(frozen=True)
class ObjectResult:
    """What came out for one defect."""

    image: str
    item: int  # of the data set
    object_id: int
    by_clicks: list[list[int]]  # areas after 1, 2, ... max_clicks clicks
    areas: dict[str, list[int]]  # by prompt
    boundary: dict[str, float]  # by prompt
    score: float  # object score at the first click
    runs: np.ndarray  # of the mask at the first click
    automatic: float | None  # IoU of the best automatic mask


@dataclass(frozen=True)
class CleanResult:
    """What came out for one click on a clean image."""

    image: str
    item: int
    click: tuple[float, float]
    score: float
    runs: np.ndarray


@dataclass
class ModelResult:
    """Everything about one model."""

    objects: list[ObjectResult] = field(default_factory=list)
    clean: list[CleanResult] = field(default_factory=list)
    image_seconds: list[float] = field(default_factory=list)  # encoding, one an image
    click_seconds: list[float] = field(default_factory=list)  # one click on one object, upscaling included
    automatic_counts: list[int] = field(default_factory=list)  # automatic masks, one an image


Watcher = Callable[[Sample, str, Tensor], None]
"""Gets the masks bool [O, 1, H, W] of a sample's defects for each prompt's name."""


@torch.inference_mode()
def run_model(
    model: SAM2Base, samples: Iterable[Sample], protocol: Protocol, watch: Watcher | None = None
) -> ModelResult:
    """Asks a model everything; `watch` sees every mask."""
    result = ModelResult()
    automatic = (
        AutomaticMasks(model.eval(), protocol.automatic, protocol.tile, protocol.overlap)
        if protocol.automatic
        else None
    )
    with Viewer(model.eval(), protocol.tile, protocol.overlap) as viewer:
        for item, sample in enumerate(samples):
            began = time.perf_counter()
            view = viewer.look(sample.image)
            _synchronize(model)
            result.image_seconds.append(time.perf_counter() - began)
            if not sample.defects:
                places = sound_clicks(sample.image, protocol.clean_clicks, sample.name, protocol.seed)
                positive = torch.ones(1, dtype=torch.int32)
                answers = view.clicks([(place[None], positive) for place in places], [None] * len(places))
                result.clean += [
                    CleanResult(
                        sample.name, item, tuple(place.tolist()), answer.score, encode_mask(answer.mask.numpy())
                    )
                    for place, answer in zip(places, answers, strict=True)
                ]
                continue
            _ask(view, sample, item, protocol, automatic, result, watch or (lambda *_: None))
    return result


def _ask(
    view,
    sample: Sample,
    item: int,
    protocol: Protocol,
    automatic: AutomaticMasks | None,
    result: ModelResult,
    watch: Watcher,
) -> None:
    """Clicks, boxes and automatic masks for the defects of one sample."""
    truth = sample.masks[sample.defects]
    identifiers = [sample.object_ids[o] for o in sample.defects]
    steps, areas, boundary = [], {}, {}

    def note(prompt: str, masks: Tensor) -> None:
        areas[prompt] = mask_counts(masks, truth)[:, 0].tolist()
        boundary[prompt] = [
            boundary_f(mask[0].numpy(), wanted[0].numpy(), protocol.tolerance)
            for mask, wanted in zip(masks, truth, strict=True)
        ]
        watch(sample, prompt, masks)

    began = time.perf_counter()
    for count, (masks, scores) in enumerate(click_rounds(view, truth, protocol.max_clicks), start=1):
        steps.append(mask_counts(masks, truth)[:, 0].tolist())
        if count == 1:
            result.click_seconds.append((time.perf_counter() - began) / len(truth))
            first, first_scores = masks, scores
        if count in protocol.clicks:
            note(f"{count}click{'s' if count > 1 else ''}", masks)
    boxes = exact_boxes(truth)
    note("box", view.boxes(boxes))
    for share in protocol.shifts:
        shifted = shifted_boxes(boxes, share, sample.image.shape[:2], sample.name, identifiers, protocol.seed)
        note(f"box_{round(100 * share)}", view.boxes(shifted))
    best: list[float | None] = [None] * len(truth)
    if automatic is not None:
        best, count = automatic.best_ious(sample.image, truth)
        result.automatic_counts.append(count)
    for o, identifier in enumerate(identifiers):
        result.objects.append(
            ObjectResult(
                sample.name,
                item,
                identifier,
                [step[o] for step in steps],
                {prompt: rows[o] for prompt, rows in areas.items()},
                {prompt: values[o] for prompt, values in boundary.items()},
                float(first_scores[o]),
                encode_mask(first[o, 0].numpy()),
                best[o],
            )
        )


def _synchronize(model: SAM2Base) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
