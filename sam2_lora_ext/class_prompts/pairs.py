"""Mean losses and presence accuracy over the (image, class) pairs of class steps, in training and in validation.

Legend: O pairs of a batch, S predictions of each (more than one if clicks follow), N pairs so far, L loss terms.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from sam2_lora_ext.evaluate.metrics import exact_mean
from sam2_lora_ext.meters import SegmentationMeter

TERMS = ("loss_mask", "loss_dice", "loss_iou", "loss_tversky", "loss_class")
PREFIX = "class_prompts_"


class PairRows:
    """A meter of class steps; click steps are ignored.

    Keys, Python floats: `class_prompts_<term>` for each term of the loss, a mean over predictions and pairs (for mask
    terms over present pairs), class weights included; `class_prompts_presence`, the share of pairs whose first presence
    score is right: above 0 if the class is present, else at most 0. Keys without a value are left out.

    Args:
        distinct: count a pair of a tile once, even if the tile is repeated.
    """

    def __init__(self, distinct: bool):
        self.distinct = distinct
        self.reset()

    def reset(self) -> None:
        """Forgets all rows."""
        self._parts: list[tuple[Tensor, Tensor]] = []  # ids int64 [O 3]; present, right, terms float64 [O 2+L]

    @torch.no_grad()
    def update(self, find_stages: Sequence[Mapping[str, Any]], find_metadatas: Any) -> None:
        """Adds a batch, like `SegmentationMeter.update`, without synchronising with the device."""
        outputs = find_stages[0]
        if not outputs.get("class_prompt"):
            return
        scores = outputs["multistep_object_score_logits"]
        present = outputs["gt_masks"].flatten(1).any(1)
        given = outputs.get("object_losses", {})
        none = torch.full_like(scores[0][:, 0], torch.nan, dtype=torch.float64)
        terms = [given[name].double() / len(scores) if name in given else none for name in TERMS]
        right = (scores[0][:, 0] > 0) == present
        table = torch.stack([present.double(), right.double(), *terms], 1)
        self._parts.append((find_metadatas.unique_objects_identifier[0].long(), table))

    def compute(self) -> dict[str, float]:
        """The values over this rank's rows."""
        return self._summary(self._compact())

    def compute_synced(self) -> dict[str, float]:
        """The values over the rows of all ranks, the same on each; every rank must call it."""
        gathered = [self._compact()]
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            gathered = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, self._compact())
        return self._summary([part for parts in gathered for part in parts])

    @staticmethod
    def keys() -> list[str]:
        """All possible keys."""
        return [f"{PREFIX}{name}" for name in (*TERMS, "presence")]

    def _compact(self) -> list[tuple[Tensor, Tensor]]:
        """All parts joined into one on the CPU; empty if there are none."""
        if self._parts:
            ids, tables = zip(*self._parts, strict=True)
            self._parts = [(torch.cat([part.cpu() for part in ids]), torch.cat([part.cpu() for part in tables]))]
        return self._parts

    def _summary(self, parts: Sequence[tuple[Tensor, Tensor]]) -> dict[str, float]:
        if not parts:
            return {}
        ids, table = (torch.cat(column) for column in zip(*parts, strict=True))
        if self.distinct:
            table = table[torch.from_numpy(np.unique(ids.numpy(), axis=0, return_index=True)[1])]
        present, right, *terms = table.unbind(1)
        means = {
            name: exact_mean(term if name == "loss_class" else term[present > 0])
            for name, term in zip(TERMS, terms, strict=True)
        } | {"presence": exact_mean(right)}
        return {f"{PREFIX}{name}": mean for name, mean in means.items() if mean is not None and not math.isnan(mean)}


class TrainingWindow:
    """The meters of the training steps since the last row of metrics.csv: one for click steps, one for class steps."""

    def __init__(self) -> None:
        self.meters = SegmentationMeter(distinct=False), PairRows(distinct=False)

    def reset(self) -> None:
        """Forgets all rows."""
        for meter in self.meters:
            meter.reset()

    def update(self, find_stages: Sequence[Mapping[str, Any]], find_metadatas: Any) -> None:
        """Adds a batch to the meter of its kind."""
        for meter in self.meters:
            meter.update(find_stages, find_metadatas)

    def compute(self) -> dict[str, float]:
        """The values over this rank's rows."""
        return self.meters[0].compute() | self.meters[1].compute()

    def compute_synced(self) -> dict[str, float]:
        """The values over the rows of all ranks; every rank must call it."""
        return self.meters[0].compute_synced() | self.meters[1].compute_synced()
