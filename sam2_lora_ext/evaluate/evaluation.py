"""Evaluates one model on every object of a data set and keeps the results per object.

Legend: O objects, H W pixels. Areas are (intersection, prediction, target) in pixels.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from sam2.modeling.sam2_base import SAM2Base
from torch import Tensor

from sam2_lora_ext.data.rle import encode_mask
from sam2_lora_ext.evaluate.automatic import AutomaticMasks
from sam2_lora_ext.evaluate.boundary import boundary_f
from sam2_lora_ext.evaluate.clicks import click_rounds, exact_boxes, shifted_boxes, sound_clicks
from sam2_lora_ext.evaluate.metrics import mask_counts
from sam2_lora_ext.evaluate.predictor import Sample
from sam2_lora_ext.evaluate.protocol import Protocol, box_name, clicks_name
from sam2_lora_ext.evaluate.views import Clicks, View, Viewer
from sam2_lora_ext.utils.errors import UserError


@dataclass(frozen=True)
class ObjectResult:
    """The results of one defect."""

    image: str
    item: int  # of the data set
    object_id: int
    by_clicks: list[list[int]]  # areas after 1, 2, ... max_clicks clicks
    areas: dict[str, list[int]]  # by prompt
    boundary: dict[str, float]  # by prompt
    score: float  # object score at the first click
    runs: np.ndarray  # of the mask at the first click
    automatic: float | None  # IoU of the best automatic mask
    clicks: list[list[int]]  # (x, y, label) of each click


@dataclass(frozen=True)
class CleanResult:
    """The result of one click on a clean image."""

    image: str
    item: int
    click: tuple[float, float]
    score: float
    runs: np.ndarray


@dataclass
class ModelResult:
    """All results of one model."""

    objects: list[ObjectResult] = field(default_factory=list)
    clean: list[CleanResult] = field(default_factory=list)
    image_seconds: list[float] = field(default_factory=list)  # encoding of each image
    click_seconds: list[float] = field(default_factory=list)  # one click on one object, including upscaling
    box_seconds: list[float] = field(default_factory=list)  # one box
    automatic_seconds: list[float] = field(default_factory=list)  # all automatic masks of one image, with encoding
    automatic_counts: list[int] = field(default_factory=list)  # number of automatic masks of each image

    def clicks(self) -> dict[tuple[int, int], Clicks]:
        """The clicks on each object, by item and identifier, for prompting another model."""
        columns = {(row.item, row.object_id): torch.tensor(row.clicks).reshape(-1, 3) for row in self.objects}
        return {key: (clicks[:, :2].float(), clicks[:, 2].int()) for key, clicks in columns.items()}


Watcher = Callable[[Sample, str, Tensor], None]
"""Receives a sample, a prompt's name, and the masks bool [O, 1, H, W] of the sample's defects for this prompt."""


@torch.inference_mode()
def run_model(
    model: SAM2Base,
    samples: Iterable[Sample],
    protocol: Protocol,
    watch: Watcher | None = None,
    replay: Mapping[tuple[int, int], Clicks] | None = None,
) -> ModelResult:
    """Runs the evaluation of one model.

    Args:
        model: any SAM 2.
        samples: the data set's samples.
        protocol: the prompts and views.
        watch: receives every mask.
        replay: fixed clicks from `ModelResult.clicks` of another model; None: each click corrects the last mask.

    Raises:
        UserError: the model predicts NaN.
    """
    result = ModelResult()
    automatic = None
    if protocol.automatic:
        automatic = AutomaticMasks(
            model.eval(), protocol.automatic, protocol.thresholds, protocol.tile, protocol.overlap
        )
    with Viewer(model.eval(), protocol.tile, protocol.overlap) as viewer:
        for item, sample in enumerate(samples):
            began = time.perf_counter()
            view = viewer.look(sample.image)
            _synchronize(model)
            result.image_seconds.append(time.perf_counter() - began)
            if sample.defects:
                _evaluate_item(view, sample, item, protocol, automatic, result, watch or (lambda *_: None), replay)
            else:
                _ask_clean(view, sample, item, protocol, result)
            score = (result.objects if sample.defects else result.clean)[-1].score
            if not math.isfinite(score):
                raise UserError(f"the object score of {sample.name} is {score}: the weights are damaged or diverged")
    return result


def _ask_clean(view: View, sample: Sample, item: int, protocol: Protocol, result: ModelResult) -> None:
    """Single clicks on clean steel."""
    places = sound_clicks(sample.image, protocol.clean_clicks, sample.name, protocol.seed)
    positive = torch.ones(1, dtype=torch.int32)
    answers = view.clicks([(place[None], positive) for place in places], [None] * len(places))
    for place, answer in zip(places, answers, strict=True):
        runs = encode_mask(answer.mask.numpy())
        result.clean.append(CleanResult(sample.name, item, tuple(place.tolist()), answer.score, runs))


def _evaluate_item(
    view: View,
    sample: Sample,
    item: int,
    protocol: Protocol,
    automatic: AutomaticMasks | None,
    result: ModelResult,
    watch: Watcher,
    replay: Mapping[tuple[int, int], Clicks] | None,
) -> None:
    """Clicks, boxes and automatic masks for the defects of one sample."""
    truth = sample.masks[sample.defects]
    identifiers = [sample.object_ids[o] for o in sample.defects]
    steps, areas, boundary = [], {}, {}

    def note(prompt: str, masks: Tensor) -> None:
        areas[prompt] = mask_counts(masks, truth)[:, 0].tolist()
        pairs = zip(masks[:, 0].numpy(), truth[:, 0].numpy(), strict=True)
        boundary[prompt] = [boundary_f(mask, wanted, protocol.tolerance) for mask, wanted in pairs]
        watch(sample, prompt, masks)

    given = None if replay is None else [replay[item, identifier] for identifier in identifiers]
    began = time.perf_counter()
    rounds = click_rounds(view, truth, protocol.max_clicks, given)
    for count, (masks, scores, clicks) in enumerate(rounds, start=1):
        steps.append(mask_counts(masks, truth)[:, 0].tolist())
        if count == 1:
            result.click_seconds.append((time.perf_counter() - began) / len(truth))
            first, first_scores = masks, scores
        if count in protocol.clicks:
            note(clicks_name(count), masks)
    boxes = exact_boxes(truth)
    began = time.perf_counter()
    masks = view.boxes(boxes)
    result.box_seconds.append((time.perf_counter() - began) / len(truth))
    note("box", masks)
    for share in protocol.shifts:
        shifted = shifted_boxes(boxes, share, sample.image.shape[:2], sample.name, identifiers, protocol.seed)
        note(box_name(share), view.boxes(shifted))
    best: list[float | None] = [None] * len(truth)
    if automatic is not None:
        began = time.perf_counter()
        best, count = automatic.best_ious(sample.image, truth)
        result.automatic_seconds.append(time.perf_counter() - began)
        result.automatic_counts.append(count)
    for o, identifier in enumerate(identifiers):
        coords, labels = clicks[o]
        result.objects.append(
            ObjectResult(
                image=sample.name,
                item=item,
                object_id=identifier,
                by_clicks=[step[o] for step in steps],
                areas={prompt: rows[o] for prompt, rows in areas.items()},
                boundary={prompt: values[o] for prompt, values in boundary.items()},
                score=float(first_scores[o]),
                runs=encode_mask(first[o, 0].numpy()),
                automatic=best[o],
                clicks=torch.cat([coords.int(), labels[:, None]], 1).tolist(),
            )
        )


def _synchronize(model: SAM2Base) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
