"""Strips with their truth, whole, for fitting the decision and for evaluating an inspection.

The truth of a class is all that is annotated of it, specks included. Images of which a mask was lost take no part:
nobody knows what is absent on them. Needs SAM 2's training code. Legend: C classes, H W pixels of a strip.
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
    """One strip: its pixels uint8 [H, W, 3] and what is there, bool [C, H, W]."""

    name: str
    image: np.ndarray
    truth: Tensor


class TrueStrips:
    """The strips of a data set, read when they are asked for.

    Args:
        source: the data and its split.
        prompts: whose classes are looked for.

    Raises:
        UserError: the data cannot be read, has other classes, or no strip is left.
    """

    def __init__(self, source: Source, prompts: ClassPrompts):
        dataset = replace(source, crop=None, stride=None, include_clean=True).dataset()
        self.index, self.bits, self.class_ids = dataset.index, dataset.bits, prompts.class_ids
        found, wanted = dict(self.index.class_names), dict(zip(prompts.class_ids, prompts.class_names, strict=True))
        if found != wanted:
            raise UserError(
                f"the class prompts are of the classes {_table(wanted)}, but {source.data} has "
                f"{_table(found)}: take the data that they were trained for"
            )
        self.images = [int(image) for image in dataset.images if self.index.complete[image]]
        if not self.images:
            raise UserError(f"{source.data} leaves no strip: each of them lost a mask")

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[TrueStrip]:
        for image in self.images:
            yield TrueStrip(self.index.name(image), self.index.read(image, self.bits), self.truth(image))

    def truth(self, image: int) -> Tensor:
        """What is annotated, bool [C, H, W]."""
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
