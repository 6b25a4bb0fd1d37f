"""Simulates users: clicks in the middle of the largest error, shifted boxes, clicks on clean steel.

First prompts depend only on the image, the object and the seed, so they are the same for every model; later clicks
correct a model's own errors, or replay the clicks of another model. Legend: O objects, H W pixels, P clicks.
Coordinates are (x, y) in pixels of the strip.
"""

import zlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from sam2.modeling.sam2_utils import get_next_point, mask_to_box
from torch import Tensor

from sam2_lora_ext.data.transforms import DARK
from sam2_lora_ext.evaluate.views import Clicks, View


def click_rounds(
    view: View, truth: Tensor, count: int, replay: Sequence[Clicks] | None = None
) -> Iterator[tuple[Tensor, Tensor, list[Clicks]]]:
    """Prompts with 1, 2, ... `count` clicks, as SAM's training does: each in the middle of the largest error.

    An object whose mask has no error gets no more clicks and keeps its mask.

    Args:
        view: the image.
        truth: bool [O, 1, H, W], O >= 1, no mask empty.
        count: number of clicks.
        replay: fixed clicks for each object, independent of its masks; after its last click an object keeps its mask.

    Yields:
        Masks bool [O, 1, H, W], object scores (logits) float [O], and the clicks so far on each object.
    """
    prediction, scores = torch.zeros_like(truth), torch.zeros(len(truth))
    histories: list[Clicks] = [(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int32)) for _ in truth]
    memories: list = [None] * len(truth)
    for step in range(count):
        if replay is None:
            asked = (prediction != truth).flatten(1).any(1).nonzero()[:, 0].tolist()
            if asked:
                previous = prediction[asked] if step else None
                coords, labels = get_next_point(truth[asked], previous, "center")
                for o, *click in zip(asked, coords, labels, strict=True):
                    histories[o] = tuple(torch.cat([old, new]) for old, new in zip(histories[o], click))
        else:
            asked = [o for o, (_, labels) in enumerate(replay) if len(labels) > step]
            for o in asked:
                histories[o] = tuple(column[: step + 1] for column in replay[o])
        if asked:
            answers = view.clicks([histories[o] for o in asked], [memories[o] for o in asked])
            for o, answer in zip(asked, answers, strict=True):
                prediction[o, 0], scores[o], memories[o] = answer.mask, answer.score, answer.memory
        yield prediction.clone(), scores.clone(), list(histories)


def exact_boxes(truth: Tensor) -> Tensor:
    """float [O, 4] of (x0, y0, x1, y1), the outermost pixels of non-empty masks bool [O, 1, H, W]."""
    return mask_to_box(truth)[:, 0].float()


def shifted_boxes(
    boxes: Tensor, share: float, size: tuple[int, int], image: str, object_ids: Sequence[int], seed: int = 0
) -> Tensor:
    """Boxes shifted by `share` of their width and height, each along a diagonal drawn for its object.

    Args:
        boxes: float [O, 4], see `exact_boxes`.
        share: 0.1 moves a box of 50 x 20 pixels by 5 and 2 pixels.
        size: (H, W); boxes are clipped to the image, but keep at least one pixel.
        image: name of the image, part of the seed.
        object_ids: part of the seed.
        seed: seed of the diagonals.
    """
    signs = torch.tensor([_diagonal(seed, image, identifier) for identifier in object_ids], dtype=torch.float32)  # O 2
    step = share * (boxes[:, 2:] - boxes[:, :2] + 1) * signs
    last = torch.tensor([size[1] - 1, size[0] - 1], dtype=torch.float32)
    return torch.cat([corner.clamp(min=0).minimum(last) for corner in (boxes[:, :2] + step, boxes[:, 2:] + step)], 1)


def sound_clicks(image: np.ndarray, count: int, name: str, seed: int = 0) -> Tensor:
    """float [count, 2]: points on exposed steel of a clean image uint8 [H, W, 3]; its middle if it is all black."""
    height, width = image.shape[:2]
    exposed = np.flatnonzero(image.mean(axis=2) > DARK)
    if not len(exposed):
        return torch.tensor([[width // 2, height // 2]], dtype=torch.float32).repeat(count, 1)
    drawn = np.random.default_rng(_seed(seed, name)).choice(exposed, count)
    return torch.tensor(np.stack([drawn % width, drawn // width], 1), dtype=torch.float32)


def _seed(*parts: object) -> int:
    return zlib.crc32("|".join(map(str, parts)).encode("utf-8", "surrogateescape"))


def _diagonal(*parts: object) -> tuple[int, int]:
    drawn = np.random.default_rng(_seed(*parts)).integers(2, size=2) * 2 - 1
    return int(drawn[0]), int(drawn[1])
