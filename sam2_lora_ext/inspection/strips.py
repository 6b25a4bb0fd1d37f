"""Whole strips with their truth, for fitting the decision and for evaluating an inspection.

The truth of a class includes everything that is annotated, specks too. Images with a dropped mask are left out, since
their absent classes are unknown. Needs SAM 2's training code. Legend: C classes, H W pixels of a strip.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from sam2_lora_ext.adapters.class_prompts import ClassPrompts
from sam2_lora_ext.data.rle import decode_runs, union_runs
from sam2_lora_ext.data.source import Source
from sam2_lora_ext.utils.errors import UserError


@dataclass(frozen=True)
class TrueStrip:
    """One strip: its pixels uint8 [H, W, 3] and its truth bool [C, H, W]."""

    name: str
    image: np.ndarray
    truth: Tensor


class TrueStrips:
    """The strips of a data set, read lazily.

    Args:
        source: the data and its split.
        prompts: class prompts, whose classes the data must have.

    Raises:
        UserError: the data cannot be read, has other classes, or no strip is left.
    """

    def __init__(self, source: Source, prompts: ClassPrompts):
        dataset = replace(source, crop=None, stride=None, include_clean=True).dataset()
        self.index, self.bits, self.class_ids = dataset.index, dataset.bits, prompts.class_ids
        found, wanted = dict(self.index.class_names), dict(zip(prompts.class_ids, prompts.class_names, strict=True))
        if found != wanted:
            raise UserError(
                f"the class prompts have the classes {_table(wanted)}, but {source.data} has "
                f"{_table(found)}: use the data that they were trained for"
            )
        self.images = [int(image) for image in dataset.images if self.index.complete[image]]
        if not self.images:
            raise UserError(f"{source.data} has no usable strip: all have a dropped mask")

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[TrueStrip]:
        for image in self.images:
            yield TrueStrip(self.index.name(image), self.index.read(image, self.bits), self.truth(image))

    def truth(self, image: int) -> Tensor:
        """The annotated pixels, bool [C, H, W]."""
        size = self.index.sizes[image].tolist()
        masks = [
            decode_runs(union_runs([runs for number, runs in self.index.masks(image) if number == class_id]), *size)
            for class_id in self.class_ids
        ]
        return torch.from_numpy(np.ascontiguousarray(masks)).bool()

    def paths(self) -> list[str]:
        """The image files."""
        return [self.index.path(image) for image in self.images]


def _table(classes: dict[int, str]) -> str:
    return ", ".join(f"{number} {name}" for number, name in classes.items())
