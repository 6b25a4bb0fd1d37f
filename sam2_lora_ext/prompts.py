"""Clicks and boxes for training and validation: stock's sampling, made right for clean objects and repeatable.

Stock SAM 2 gives an object with an empty mask a *negative* click (in validation always at (0, 0)) and an inverted box.
Here a clean object gets one *positive* click on sound steel, never a box, and negative clicks afterwards: the question
"is there something here?", whose answer the object score learns.

Legend: O objects, H W pixels, P points. Coordinates are (x, y) in pixels of the model's input. Labels: 1 positive
click, 0 negative click, 2 and 3 the corners of a box, -1 padding.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import training.model.sam2 as host
from sam2.modeling.sam2_utils import get_next_point, sample_box_points
from torch import Tensor

TRIES = 2**12  # pixels of the frame that are tried for a click, before those of its region are counted


class PromptSampler:
    """Samples the prompts of the O objects of one batch; stands in for the two functions that `SAM2Train` calls.

    Args:
        empty: bool [O], which objects are clean (no pixel in the frame that is prompted first).
        sound: bool [O, H, W], where a clean object may be clicked.
        seeds: one integer per object: its clicks come from a generator of its own, whatever else is in the batch and on
            whichever rank. None: real objects draw from the global generator, as stock does.
        exact_boxes: boxes without the stock jitter of 10 % (for validation).
    """

    def __init__(self, empty: Tensor, sound: Tensor, seeds: list[int] | None, *, fixed: list[int], exact_boxes: bool):
        self.empty, self.sound, self.exact_boxes = empty, sound, exact_boxes
        self.seeded = seeds is not None
        self.any_clean = bool(empty.any())
        self.correcting = False  # set once the first prompts are there
        self.generators = [torch.Generator().manual_seed(seed) for seed in (seeds or fixed)]

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Puts this sampler where `SAM2Train` looks its sampling functions up, and takes it away again."""
        saved = host.get_next_point, host.sample_box_points
        host.get_next_point, host.sample_box_points = self.next_point, self.box
        try:
            yield
        finally:
            host.get_next_point, host.sample_box_points = saved

    def next_point(self, gt_masks: Tensor, pred_masks: Tensor | None, method: str) -> tuple[Tensor, Tensor]:
        """One click per object: stock's for defects, ours for clean objects.

        Args:
            gt_masks: bool [O, 1, H, W].
            pred_masks: bool [O, 1, H, W], or None for the first click and for one that looks at the target alone.
            method: "uniform" over the error region, or "center" (the pixel deepest inside it).

        Returns:
            Coordinates float32 [O, 1, 2] and labels int32 [O, 1].
        """
        if self.seeded and method == "uniform":
            points, labels = self._seeded_points(gt_masks, pred_masks)
        else:
            points, labels = get_next_point(gt_masks=gt_masks, pred_masks=pred_masks, method=method)
        for o in self._clean(gt_masks):
            if pred_masks is not None and pred_masks[o].any():
                continue  # stock already clicks negatively on what was wrongly found
            points[o, 0] = self._draw(o, self.sound[o]).to(points)
            labels[o, 0] = int(not self.correcting)
        return points, labels

    def box(self, masks: Tensor) -> tuple[Tensor, Tensor]:
        """A box per defect as its two corners; for a clean object a positive click and one padding point.

        Args:
            masks: bool [O, 1, H, W].

        Returns:
            Coordinates float32 [O, 2, 2] and labels int32 [O, 2].
        """
        jittered = not (self.exact_boxes or self.seeded)
        points, labels = sample_box_points(masks, **({} if jittered else {"noise": 0.0}))
        points, labels = points.float(), labels.clone()
        if self.seeded and not self.exact_boxes:
            points = self._seeded_boxes(masks)
        for o in self._clean(masks):
            points[o, 0] = self._draw(o, self.sound[o]).to(points)
            points[o, 1] = 0.0
            labels[o] = torch.tensor([1, -1]).to(labels)
        return points, labels

    def _clean(self, gt_masks: Tensor) -> list[int]:
        if not self.any_clean:
            return []
        return (self.empty.to(gt_masks.device) & ~gt_masks.flatten(1).any(1)).nonzero().flatten().tolist()

    def _draw(self, o: int, region: Tensor) -> Tensor:
        """A uniformly drawn pixel (x, y) of a bool [H, W] region, of the whole frame where the region is empty."""
        return drawn_pixels(self._numbers([o]), region[None])[0]

    def _numbers(self, objects: Iterable[int]) -> Tensor:
        """The next random integers below 2**62 of each object's generator: [O, 1 + TRIES]."""
        return torch.stack([torch.randint(2**62, (1 + TRIES,), generator=self.generators[o]) for o in objects])

    def _seeded_points(self, gt_masks: Tensor, pred_masks: Tensor | None) -> tuple[Tensor, Tensor]:
        """Stock's uniform rule from each object's own generator: a pixel of the error region, else of the background.

        Of a mask that fills the frame and was found exactly any pixel, which is positive; stock's is (0, 0), and negative.
        """
        wrong = gt_masks if pred_masks is None else gt_masks ^ pred_masks
        points = drawn_pixels(self._numbers(range(len(wrong))), wrong[:, 0], ~gt_masks[:, 0])
        x, y = points.unbind(1)
        return points[:, None].float(), gt_masks.flatten(1).gather(1, (y * gt_masks.shape[3] + x)[:, None]).int()

    def _seeded_boxes(self, masks: Tensor) -> Tensor:
        """Stock's jittered boxes, object by object, from each object's own generator."""
        corners = []
        for o in range(len(masks)):
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(int(torch.randint(2**62, (1,), generator=self.generators[o])))
                corners.append(sample_box_points(masks[o : o + 1].cpu())[0])
        return torch.cat(corners).float().to(masks.device)


def drawn_pixels(numbers: Tensor, *regions: Tensor) -> Tensor:
    """A pixel (x, y) int64 [O, 2] of each object's region: uniform, where the numbers are.

    It is the first of the frame's pixels `numbers[:, 1:]` that lies inside, so that a pixel at the region's edge that rounding
    turns hardly ever changes it; where none does, the region's own pixel `numbers[:, 0]`. Both are modulo how many there are.
    No value is read back, for which the host would wait for a GPU.

    Args:
        numbers: int64 [O, N], not negative.
        regions: bool [O, H, W] each; an object's is the first that is not empty, else the whole frame.
    """
    choices = torch.stack([*regions, torch.ones_like(regions[0])])  # R O H W
    filled = choices.view(torch.uint8).flatten(2).amax(2)  # R O; `any` is slow on a CPU
    empty_before = (filled.cumsum(0) == 0).sum(0)  # O
    region = choices[empty_before, torch.arange(len(empty_before), device=choices.device)]
    numbers = numbers.to(region.device, non_blocking=True)
    height, width = region.shape[1:]
    tried = numbers[:, 1:] % (height * width)
    inside = region.flatten(1).gather(1, tried)
    first = tried.gather(1, inside.int().argmax(1)[:, None])[:, 0]
    first = torch.stack([first % width, first // width], 1)
    return torch.where(inside.any(1)[:, None], first, pixels_in_order(numbers[:, 0], region))


def pixels_in_order(numbers: Tensor, regions: Tensor) -> Tensor:
    """Of regions bool [O, H, W], none empty, the pixels (x, y) int64 [O, 2] in place `numbers` [O] modulo their count, row by row."""
    objects, in_row = torch.arange(len(regions), device=regions.device), regions.sum(2)  # O H
    up_to = in_row.cumsum(1)
    place = numbers % up_to[:, -1]
    y = torch.searchsorted(up_to, place[:, None], right=True)[:, 0]
    place = place - (up_to - in_row)[objects, y]
    x = torch.searchsorted(regions[objects, y].cumsum(1), place[:, None], right=True)[:, 0]
    return torch.stack([x, y], 1)
