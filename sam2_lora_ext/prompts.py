"""Clicks and boxes for training and validation: stock's sampling, corrected for clean objects and reproducible.

Stock SAM 2 gives an object with an empty mask a *negative* click (in validation always at (0, 0)) and an inverted box.
Here a clean object gets one *positive* click on clean steel, never a box, and negative clicks afterwards, so that the
object score learns to predict "absent".

Legend: O objects, H W pixels, P points. Coordinates are (x, y) in pixels of the model's input. Labels: 1 positive
click, 0 negative click, 2 and 3 the corners of a box, -1 padding.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import training.model.sam2 as host
from sam2.modeling.sam2_utils import get_next_point, sample_box_points
from torch import Tensor

from sam2_lora_ext.run.seeding import mixed

TRIES = 2**12  # random pixels of the frame tried for a click before a pixel is chosen by its index in the region
GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # splitmix64's increment, as a signed integer


class PromptSampler:
    """Samples the prompts of the O objects of one batch; replaces the two functions that `SAM2Train` calls.

    All objects are sampled at once on their device, without synchronisation.

    Args:
        empty: bool [O], whether an object has no pixels (clean samples and absent classes).
        sound: bool [O, H, W], pixels on which a clean object may be clicked.
        keys: int64 [O], the start of each object's own random numbers, independent of batch and rank.
        seeded: whether clicks on defects use these numbers too, instead of the global generator as in stock.
        exact_boxes: boxes without the stock jitter of 10 % (for validation).
        first: coordinates [O, P, 2] and labels [O, P] of prompts before the clicks; with them, even the first click
            of an object without pixels is negative.
    """

    def __init__(
        self,
        empty: Tensor,
        sound: Tensor,
        keys: Tensor,
        *,
        seeded: bool,
        exact_boxes: bool,
        first: tuple[Tensor, Tensor] | None = None,
    ):
        self.empty, self.sound, self.keys = empty, sound, keys
        self.seeded, self.exact_boxes, self.first = seeded, exact_boxes, first
        self.correcting = False  # set after the first prompts
        self.draws = 0  # number of random numbers that each object has used

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Within the block, `SAM2Train` uses this sampler instead of its sampling functions."""
        saved = host.get_next_point, host.sample_box_points
        host.get_next_point, host.sample_box_points = self.next_point, self.box
        try:
            yield
        finally:
            host.get_next_point, host.sample_box_points = saved

    def next_point(self, gt_masks: Tensor, pred_masks: Tensor | None, method: str) -> tuple[Tensor, Tensor]:
        """One click per object: by stock's rule for defects, on clean steel for clean objects.

        Args:
            gt_masks: bool [O, 1, H, W].
            pred_masks: bool [O, 1, H, W], or None for the first click and for one that depends on the target only.
            method: "uniform" over the error region, or "center" (the pixel deepest inside it).

        Returns:
            Coordinates float32 [O, 1, 2] and labels int32 [O, 1].
        """
        if self.first is not None and not self.correcting:
            return self.first
        drawn = self._drawn(gt_masks, pred_masks)
        if self.seeded and method == "uniform":
            return drawn
        stocks = get_next_point(gt_masks=gt_masks, pred_masks=pred_masks, method=method)
        # stock already places negative clicks on false positives
        ours = self.empty if pred_masks is None else self.empty & ~pred_masks.flatten(1).any(1)
        return tuple(torch.where(_like(ours, new), new.to(old), old) for new, old in zip(drawn, stocks))

    def box(self, masks: Tensor) -> tuple[Tensor, Tensor]:
        """A box per defect as its two corners; for a clean object a positive click and one padding point.

        Args:
            masks: bool [O, 1, H, W].

        Returns:
            Coordinates float32 [O, 2, 2] and labels int32 [O, 2].
        """
        if self.first is not None:
            return self.first
        jittered = not (self.exact_boxes or self.seeded)
        points, labels = sample_box_points(masks, **({} if jittered else {"noise": 0.0}))
        points = points.float()
        if self.seeded and not self.exact_boxes:
            points = self._jittered(points, masks.shape[2:])
        click, _ = self._drawn(masks, None)
        points = torch.where(_like(self.empty, points), torch.cat([click, torch.zeros_like(click)], 1), points)
        return points, torch.where(_like(self.empty, labels), labels.new_tensor([1, -1]), labels)

    def numbers(self, count: int) -> Tensor:
        """The next `count` random integers below 2**62 of each object: [O, count]."""
        places = torch.arange(self.draws, self.draws + count, device=self.keys.device)
        self.draws += count
        return mixed(self.keys[:, None] + GOLDEN * places) & (2**62 - 1)

    def _drawn(self, gt_masks: Tensor, pred_masks: Tensor | None) -> tuple[Tensor, Tensor]:
        """Stock's uniform rule from each object's own numbers: a pixel of the error region, else of the background.

        For a clean object the background is its clean steel, and its first click is positive. For a mask that fills the
        frame and has no error, the click is positive, on any pixel; stock's is negative, at (0, 0).
        """
        wrong = gt_masks if pred_masks is None else gt_masks ^ pred_masks
        background = torch.where(_like(self.empty, self.sound), self.sound, ~gt_masks[:, 0])
        x, y = drawn_pixels(self.numbers(1 + TRIES), wrong[:, 0], background).unbind(1)
        labels = gt_masks.flatten(1).gather(1, (y * gt_masks.shape[3] + x)[:, None]).int()
        if not self.correcting:
            labels = labels + self.empty[:, None]
        return torch.stack([x, y], 1)[:, None].float(), labels

    def _jittered(self, corners: Tensor, size: tuple[int, int]) -> Tensor:
        """Boxes [O, 2, 2] with stock's jitter from each object's own numbers: 10 % of a side, at most 20 pixels."""
        drawn = (self.numbers(4).float() / 2**62).view(-1, 2, 2)
        most = ((corners[:, 1:] - corners[:, :1]) * 0.1).clamp(max=20)
        last = corners.new_tensor([size[1] - 1, size[0] - 1])
        return (corners + (2 * drawn - 1) * most).clamp(min=0).minimum(last)


def _like(flags: Tensor, other: Tensor) -> Tensor:
    """Flags [O], shaped to broadcast over `other` [O, ...]."""
    return flags.view(-1, *[1] * (other.dim() - 1))


def drawn_pixels(numbers: Tensor, *regions: Tensor) -> Tensor:
    """A pixel (x, y) int64 [O, 2] of each object's region, drawn uniformly if `numbers` are uniform.

    `numbers[:, 1:]` index the frame's pixels, and the first pixel inside the region is chosen, so that an edge pixel
    that flips by rounding hardly ever changes the choice. If none is inside, `numbers[:, 0]` indexes the region's
    pixels. Indices are taken modulo the number of pixels. No value is read back, so a GPU is not synchronised.

    Args:
        numbers: int64 [O, N], not negative.
        regions: bool [O, H, W] each; an object's region is the first that is not empty, else the whole frame.
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
    """The pixels (x, y) int64 [O, 2] with the row-major indices `numbers` [O] in non-empty regions bool [O, H, W];
    indices are taken modulo the region's number of pixels."""
    objects, in_row = torch.arange(len(regions), device=regions.device), regions.sum(2)  # O H
    up_to = in_row.cumsum(1)
    position = numbers % up_to[:, -1]
    y = torch.searchsorted(up_to, position[:, None], right=True)[:, 0]
    position = position - (up_to - in_row)[objects, y]
    x = torch.searchsorted(regions[objects, y].cumsum(1), position[:, None], right=True)[:, 0]
    return torch.stack([x, y], 1)
