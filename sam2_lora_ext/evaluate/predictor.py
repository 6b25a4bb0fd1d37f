"""Evaluates a SAM 2 as in production: through the stock `SAM2ImagePredictor`, at the strip's own resolution.

Legend: O objects, H W pixels of the (cropped) strip. Clicks are simulated as in SAM: the first in the middle of the
defect, each later one in the middle of the largest error.
"""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from sam2.modeling.sam2_base import SAM2Base
from sam2.modeling.sam2_utils import get_next_point, mask_to_box
from sam2.sam2_image_predictor import SAM2ImagePredictor
from torch import Tensor
from training.utils.data_utils import Frame, Object, VideoDatapoint

from sam2_lora_ext.data.dataset import SeverstalRawDataset
from sam2_lora_ext.data.ids import CLEAN, class_of
from sam2_lora_ext.data.transforms import FixedStripCrop
from sam2_lora_ext.deploy.predictors import fit_predictor
from sam2_lora_ext.evaluate.metrics import dice, exact_mean, iou, mask_counts


@dataclass(frozen=True)
class Sample:
    """A strip, or a crop of one, with its objects."""

    name: str
    image: np.ndarray  # uint8 [H, W, 3]
    object_ids: list[int]
    masks: Tensor  # bool [O, 1, H, W]

    @property
    def defects(self) -> list[int]:
        """The indices of the objects that are defects."""
        return [o for o, identifier in enumerate(self.object_ids) if class_of(identifier) != CLEAN]


@dataclass(frozen=True)
class Row:
    """The results of one defect as areas of intersection, prediction and target in pixels."""

    name: str
    object_id: int
    by_clicks: list[list[int]]  # after 1, 2, ... clicks
    by_box: list[int]


def read_samples(dataset: SeverstalRawDataset, crop_width: int | None) -> Iterator[Sample]:
    """The items of a data set built with `training=False`, cropped as in validation; None keeps whole strips."""
    for index in range(len(dataset)):
        yield read_sample(dataset, index, crop_width)


def read_sample(dataset: SeverstalRawDataset, index: int, crop_width: int | None) -> Sample:
    """One item of a data set, see `read_samples`.

    Raises:
        UserError: its image cannot be decoded, or a pixel value exceeds the data set's bits.
    """
    video, segments = dataset.get_video(index)
    frame_idx = video.frames[0].frame_idx
    start, stop = segments.windows[frame_idx]
    image = Image.fromarray(dataset.index.read(video.video_id, dataset.bits)[:, start:stop])
    masks = segments.load(frame_idx)
    objects = [Object(identifier, frame_idx, masks[identifier]) for identifier in masks.keys()]
    point = FixedStripCrop(crop_width)(
        VideoDatapoint([Frame(image, objects)], video.video_id, (image.height, image.width))
    )
    objects = point.frames[0].objects
    return Sample(
        name=video.video_name,
        image=np.array(point.frames[0].data),  # a copy, since PIL's own memory is read-only
        object_ids=[obj.object_id for obj in objects],
        masks=torch.stack([obj.segment.bool() for obj in objects])[:, None],
    )


def make_predictor(model: SAM2Base) -> SAM2ImagePredictor:
    """The stock predictor, also for models with an input size other than 1024 px."""
    with warnings.catch_warnings():
        # a warning from stock's transforms
        warnings.filterwarnings("ignore", message=".*torch.jit.script.*deprecated", category=FutureWarning)
        return fit_predictor(SAM2ImagePredictor(model))


class Prompter:
    """Prompts the predictor of one image for all of its objects at once."""

    def __init__(self, predictor: SAM2ImagePredictor, image: np.ndarray):
        predictor.set_image(image)
        self.predictor, self.size = predictor, image.shape[:2]

    def _scaled(self, coords: Tensor) -> Tensor:
        return self.predictor._transforms.transform_coords(
            coords.to(self.predictor.device), normalize=True, orig_hw=self.size
        )

    def points(
        self, coords: Tensor, labels: Tensor, previous: Tensor | None = None, *, all_masks: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Predicts masks for clicks.

        Args:
            coords: float [O, P, 2], (x, y) in pixels of the strip.
            labels: int [O, P]: 1 positive, 0 negative.
            previous: low-resolution logits [O, 1, h, w] of the previous prediction, or None for the first click.
            all_masks: return all three candidates of a first click instead of the one with the best predicted IoU.

        Returns:
            Logits [O, M, H, W] at the strip's resolution, on the CPU, and [O, M, h, w] at the model's resolution; M is
            1 or 3.
        """
        labels = labels.to(self.predictor.device)
        logits, scores, low = self.predictor._predict(
            self._scaled(coords), labels, mask_input=previous, multimask_output=previous is None, return_logits=True
        )
        if previous is None and not all_masks:
            rows, best = torch.arange(len(scores), device=scores.device), scores.argmax(1)
            logits, low = logits[rows, best, None], low[rows, best, None]
        return logits.cpu(), low

    def boxes(self, masks: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [O, 1, H, W] and [O, 1, h, w] for the exact box around each mask bool [O, 1, H, W]."""
        return self.corners(mask_to_box(masks)[:, 0].float())

    def corners(self, corners: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [O, 1, H, W] and [O, 1, h, w] for boxes float [O, 4] of (x0, y0, x1, y1)."""
        boxes = self._scaled(corners.reshape(-1, 2, 2)).reshape(-1, 4)
        logits, _, low = self.predictor._predict(None, None, boxes, multimask_output=False, return_logits=True)
        return logits.cpu(), low


@torch.inference_mode()
def evaluate(model: SAM2Base, samples: Iterable[Sample], clicks: int = 8) -> list[Row]:
    """One row per defect: its areas after each of `clicks` clicks, and with its box."""
    predictor = make_predictor(model.eval())
    rows: list[Row] = []
    for sample in samples:
        if not sample.defects:
            continue
        masks = sample.masks[sample.defects]
        prompter = Prompter(predictor, sample.image)
        coords, labels, low, steps = (
            torch.zeros(len(masks), 0, 2),
            torch.zeros(len(masks), 0, dtype=torch.int32),
            None,
            [],
        )
        pred = None
        for _ in range(clicks):
            new_coords, new_labels = get_next_point(masks, pred, "center")
            coords, labels = torch.cat([coords, new_coords], 1), torch.cat([labels, new_labels], 1)
            logits, low = prompter.points(coords, labels, low)
            pred = logits > 0
            steps.append(mask_counts(pred, masks)[:, 0])
        box = mask_counts(prompter.boxes(masks)[0] > 0, masks)[:, 0]
        by_clicks = torch.stack(steps, 1).tolist()
        rows += [
            Row(sample.name, sample.object_ids[o], by_clicks[position], box[position].tolist())
            for position, o in enumerate(sample.defects)
        ]
    return rows


def averages(rows: Sequence[Row]) -> dict[str, float]:
    """Means over defects: IoU and Dice after the first and the last click, and with a box."""
    counts = torch.tensor([row.by_clicks for row in rows])  # O clicks 3
    last = counts.shape[1]
    chosen = {"1click": counts[:, 0], f"{last}clicks": counts[:, -1], "box": torch.tensor([row.by_box for row in rows])}
    metrics = (("iou", iou), ("dice", dice))
    return {
        f"{metric}_{name}": exact_mean(function(areas))
        for metric, function in metrics
        for name, areas in chosen.items()
    }


@torch.inference_mode()
def max_logit_difference(one: SAM2Base, other: SAM2Base, samples: Iterable[Sample]) -> float:
    """The largest difference of low-resolution logits over all samples, for all masks of a click and a box."""
    largest = 0.0
    predictors = make_predictor(one.eval()), make_predictor(other.eval())
    for sample in samples:
        if not sample.defects:
            continue
        masks = sample.masks[sample.defects]
        coords, labels = get_next_point(masks, None, "center")
        answers = []
        for predictor in predictors:
            prompter = Prompter(predictor, sample.image)
            answers.append((prompter.points(coords, labels, all_masks=True)[1], prompter.boxes(masks)[1]))
        largest = max(largest, *[float((a - b).abs().max()) for a, b in zip(*answers, strict=True)])
    return largest


@torch.inference_mode()
def first_answers(model: SAM2Base, sample: Sample) -> tuple[Tensor, Tensor]:
    """The masks bool [O, H, W] of a sample's defects after one click each, and the clicks (x, y) [O, 2]."""
    masks = sample.masks[sample.defects]
    coords, labels = get_next_point(masks, None, "center")
    logits, _ = Prompter(make_predictor(model.eval()), sample.image).points(coords, labels)
    return logits[:, 0] > 0, coords[:, 0]
