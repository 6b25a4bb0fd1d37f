"""Validation metrics for SAM 2's Trainer: one row per object, gathered from all ranks, each object counted once.

Shapes: T frames, O objects of a batch, S prompt steps, H W pixels, N rows. The Trainer's `find_stages` are the model's
outputs, one dict per frame; its `find_metadatas` is the batch's metadata.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from sam2_lora_ext.data.ids import CLEAN, class_of
from sam2_lora_ext.evaluate.metrics import class_means, dice, exact_mean, iou, mask_counts, score_accuracy
from sam2_lora_ext.utils.errors import UserError

REPORTED_CLICKS = (1, 2, 4, 8)
LOSS_NAMES = ("core_loss", "loss_mask", "loss_dice", "loss_iou", "loss_class", "loss_tversky")


@dataclass(frozen=True)
class Rows:
    """One row per object and frame: on the device until a value is computed, then on the CPU."""

    ids: Tensor  # [N 3] int64: video, object, frame
    tracked: Tensor  # [N] bool: not the clip's first frame
    steps: Tensor  # [N] int64: prompt steps of this row, at most S
    counts: Tensor  # [N S 3] int64: intersection, prediction, target; zeros past `steps`
    scores: Tensor  # [N] float64: object-score logit at the first step
    last_scores: Tensor  # [N] float64: object-score logit at the last step
    losses: Tensor  # [N L] float64: columns named by `loss_names`
    loss_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)

    @staticmethod
    def concatenate(parts: "Sequence[Rows]") -> "Rows":
        """All rows of `parts` (at least one), with `counts` padded to the largest S."""
        parts = [part for part in parts if len(part)] or parts[:1]
        names = {part.loss_names for part in parts}
        if len(names) > 1:
            raise UserError(f"the loss reported different terms for parts of one phase ({names}): use one loss for it")
        most = max(part.counts.shape[1] for part in parts)
        padded = [replace(part, counts=F.pad(part.counts, (0, 0, 0, most - part.counts.shape[1]))) for part in parts]
        names_of_tensors = [field.name for field in fields(Rows) if field.name != "loss_names"]
        tensors = {name: torch.cat([getattr(part, name) for part in padded]) for name in names_of_tensors}
        return Rows(**tensors, loss_names=names.pop())

    def on_host(self) -> "Rows":
        """A copy on the CPU."""
        return replace(self, **{f.name: getattr(self, f.name).cpu() for f in fields(self) if f.name != "loss_names"})

    def unique(self) -> "Rows":
        """The first row of each identifier, sorted: samplers pad with repeated samples."""
        first = torch.from_numpy(np.unique(self.ids.numpy(), axis=0, return_index=True)[1])
        return replace(self, **{f.name: getattr(self, f.name)[first] for f in fields(self) if f.name != "loss_names"})


class SegmentationMeter:
    """IoU, Dice, object-score accuracy and loss as a meter of SAM 2's Trainer, exact over ranks.

    Batches with class prompts are ignored; `class_prompts.meter` measures them.

    Rows are identified by `(video, object, frame)` and counted once despite the sampler's padding; areas are
    integers and sums are correctly rounded, so the values do not depend on the number of ranks. Without rows the
    result is `{}`; a key without a value (an absent class, no clean sample) is left out.

    Keys, all Python floats (means over objects; a mask is `logit > 0`; both masks empty counts 1.0):
        `iou_1click`, `dice_1click`, likewise `2clicks`, `4clicks`, `8clicks` and the last step, if there are as many:
            defects (not clean objects) in the first frame of each clip. With `prompt="box"` the first step is
            `iou_box`, the later ones are `iou_box_1click`, ... .
        `iou_tracked`, `dice_tracked`: defects in later frames, at their first step (before any correction there),
            averaged over object and frame. An object that left the frame has an empty target: 1.0 if the predicted
            mask is empty too.
        `<each of these>_class_<c>`: the same over the defects of class c.
        `clean_accuracy`: share of clean objects whose object score predicts "absent" (logit <= 0) at the first step;
            `clean_accuracy_last` at the last. `defect_accuracy`: share of defects whose score predicts "present".
        `objects`, `clean`: number of defects and clean objects (in first frames).
        `loss`, `loss_mask`, ...: from the loss's `object_losses`, if it has them: summed over an object's frames and
            averaged over all objects, clean ones too. For one clip per object this equals stock's report on one rank.

    Args:
        classes: the classes with separate keys; others count in the overall means only.
        prompt: the prompt of the first step; it only affects the names of the keys.
        losses: report the loss too. Switch it off when the plain Trainer saves best checkpoints by this meter.
        distinct: count an object once even if it is repeated (validation); False counts each time (training).
    """

    def __init__(
        self,
        classes: Sequence[int] = (1, 2, 3, 4),
        prompt: Literal["click", "box"] = "click",
        losses: bool = True,
        distinct: bool = True,
    ):
        if prompt not in ("click", "box"):
            raise UserError(f"the meter's prompt is {prompt!r}: choose 'click' or 'box'")
        if CLEAN in classes:
            raise UserError(f"the meter's classes include {CLEAN}, but clean samples are always reported: remove it")
        self.classes = tuple(classes)
        self.prompt = prompt
        self.losses = losses
        self.distinct = distinct
        self.reset()

    def reset(self) -> None:
        """Removes all rows."""
        self._new: list[Rows] = []  # on the device of the outputs
        self._parts: list[Rows] = []  # on the CPU

    @torch.no_grad()
    def update(self, find_stages: Sequence[Mapping[str, Any]], find_metadatas: Any) -> None:
        """Adds the rows of a batch.

        Args:
            find_stages: T dicts of `LoRASAM2Train`'s outputs: `multistep_pred_masks_high_res` [O S H W],
                `multistep_object_score_logits` (S times [O 1]), `gt_masks` bool [O 1 H W], optionally `object_losses`.
            find_metadatas: has `unique_objects_identifier` [T O 3].
        """
        for index, (outputs, ids) in enumerate(zip(find_stages, find_metadatas.unique_objects_identifier, strict=True)):
            if outputs.get("class_prompt"):
                continue
            if "gt_masks" not in outputs:
                raise UserError("the model's outputs have no 'gt_masks': use sam2_lora_ext.model.LoRASAM2Train")
            self._new.append(_rows_of_frame(outputs, ids, tracked=index > 0, with_losses=self.losses))

    def compute(self) -> dict[str, float]:
        """The values over this rank's rows, for the progress display; ranks do not communicate."""
        self._compact()
        return self._summary(self._parts)

    def compute_synced(self) -> dict[str, float]:
        """The values over the rows of all ranks, equal on each; every rank must call it."""
        self._compact()
        gathered = [self._parts]
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            gathered = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, self._parts)
        return self._summary([part for parts in gathered for part in parts])

    @staticmethod
    def is_better(new: float, old: float) -> bool:
        """Higher is better. The plain Trainer calls this for every key without its name, so it is wrong for losses."""
        return new > old

    def keys(self, steps: int, tracked: bool = False) -> list[str]:
        """All possible keys for `steps` prompt steps, in order, for the columns of a table."""
        names = [f"{metric}_{self._step_name(step)}" for step in self._reported(steps) for metric in ("iou", "dice")]
        names += ["iou_tracked", "dice_tracked"] if tracked else []
        keys = [key for name in names for key in (name, *(f"{name}_class_{c}" for c in self.classes))]
        keys += ["clean_accuracy", "clean_accuracy_last", "defect_accuracy", "objects", "clean"]
        return keys + ([_loss_key(name) for name in LOSS_NAMES] if self.losses else [])

    def _compact(self) -> None:
        """Merges the parts into one, so that repeated calls are cheap; no other method waits for the device."""
        if self._new:
            self._parts = [Rows.concatenate([*self._parts, Rows.concatenate(self._new).on_host()])]
            self._new = []

    def _summary(self, parts: list[Rows]) -> dict[str, float]:
        if not any(len(part) for part in parts):
            return {}
        rows = Rows.concatenate(parts)
        rows = rows.unique() if self.distinct else rows
        classes = class_of(rows.ids[:, 1])
        prompted, defect = ~rows.tracked, classes != CLEAN

        values = {}
        for step in self._reported(int(rows.steps[prompted].max()) if prompted.any() else 0):
            chosen = prompted & defect & (rows.steps > step)
            values |= self._quality(self._step_name(step), rows.counts[chosen, step], classes[chosen])
        chosen = rows.tracked & defect
        values |= self._quality("tracked", rows.counts[chosen, 0], classes[chosen])

        clean, found = score_accuracy(rows.scores[prompted], classes[prompted])
        clean_last, _ = score_accuracy(rows.last_scores[prompted], classes[prompted])
        values |= {"clean_accuracy": clean, "clean_accuracy_last": clean_last, "defect_accuracy": found}
        values |= {"objects": float((prompted & defect).sum()), "clean": float((prompted & ~defect).sum())}

        frames_per_object = len(rows) / max(int(prompted.sum()), 1)  # every clip has one first frame
        for name, column in zip(rows.loss_names, rows.losses.unbind(1), strict=True):
            values[_loss_key(name)] = exact_mean(column) * frames_per_object
        return {key: value for key, value in values.items() if value is not None}

    def _quality(self, name: str, counts: Tensor, classes: Tensor) -> dict[str, float | None]:
        """Overall and per class of counts [N 3]."""
        values = {}
        for metric, function in (("iou", iou), ("dice", dice)):
            each = function(counts)
            values[f"{metric}_{name}"] = exact_mean(each)
            for class_id, mean in class_means(each, classes, self.classes).items():
                values[f"{metric}_{name}_class_{class_id}"] = mean
        return values

    def _clicks(self, step: int) -> int:
        return step + 1 if self.prompt == "click" else step

    def _reported(self, steps: int) -> list[int]:
        """The reported step indices: the first, those of 1, 2, 4 and 8 clicks, the last."""
        return [s for s in range(steps) if s in (0, steps - 1) or self._clicks(s) in REPORTED_CLICKS]

    def _step_name(self, step: int) -> str:
        clicks = self._clicks(step)
        words = [] if self.prompt == "click" else ["box"]
        return "_".join(words + ([f"{clicks}click{'s' if clicks > 1 else ''}"] if clicks else []))


def _loss_key(name: str) -> str:
    return "loss" if name == "core_loss" else name


def _rows_of_frame(outputs: Mapping[str, Any], ids: Tensor, tracked: bool, with_losses: bool) -> Rows:
    """The rows of one frame, on the device of the outputs: outputs as in `SegmentationMeter.update`, ids [O 3]."""
    counts = mask_counts(outputs["multistep_pred_masks_high_res"] > 0, outputs["gt_masks"])
    objects, steps = counts.shape[:2]
    scores = outputs["multistep_object_score_logits"]
    losses = outputs.get("object_losses", {}) if with_losses else {}
    columns = [loss.detach().double() for loss in losses.values()]
    return Rows(
        ids=ids.long(),
        tracked=torch.full((objects,), tracked),
        steps=torch.full((objects,), steps),
        counts=counts,
        scores=scores[0].detach()[:, 0].double(),
        last_scores=scores[-1].detach()[:, 0].double(),
        losses=torch.stack(columns, dim=1) if columns else torch.zeros(objects, 0, dtype=torch.float64),
        loss_names=tuple(losses),
    )
