"""SAM 2's training loss with a weight per defect class and an optional focal-Tversky term for thin defects.

Shapes: O objects, M mask channels of one click step, H W pixels.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from training.loss_fns import MultiStepMultiMasksAndIous, dice_loss, iou_loss, sigmoid_focal_loss
from training.trainer import CORE_LOSS_KEY

from sam2_lora_ext.activations.mask_sums import MaskSums, mask_sums
from sam2_lora_ext.class_prompts.loss import checked_focal, class_factors, class_shares
from sam2_lora_ext.tversky import checked_numbers, focal_tversky, tversky_of_sums
from sam2_lora_ext.utils.errors import UserError

REQUIRED = ("loss_mask", "loss_dice", "loss_iou")
TVERSKY = "loss_tversky"
CHOICES = (*REQUIRED, "loss_class", TVERSKY)
IMPLEMENTATIONS = ("plain", "lean")
# Lists over the click steps. The lean loss reads the masks before they are enlarged to the model's input.
STEP_OUTPUTS = ("multistep_pred_multimasks_high_res", "multistep_pred_ious", "multistep_object_score_logits")
SMALL_MASKS = "multistep_pred_multimasks"
Terms = dict[str, Tensor]


class MaskTerms(NamedTuple):
    """Focal, Dice and IoU loss of one click step, [O M] each, not divided by the number of objects."""

    focal: Tensor
    dice: Tensor
    iou: Tensor


class SeverstalLoss(MultiStepMultiMasksAndIous):
    """Stock `MultiStepMultiMasksAndIous` with class weights; with the defaults its values are stock's to the bit.

    An object of class c adds `class_weights[c]` times its stock loss, in all terms; the divisor stays stock's number of
    objects, so weights scale the loss. The Tversky term is computed on the channel that stock selects (least focal +
    Dice) and, like the other mask terms, not for an absent object. For class steps see `class_prompts.loss`.

    The forward pass reads `class_ids` (int64 [O]) of each frame's outputs when some weight differs from 1, and writes
    `object_losses` there: each term and `core_loss` as detached float [O], class weights included, summed over the
    click steps and not divided by the number of objects. Their mean over O is the frame's loss on one rank (in class
    steps, mask terms are averaged over the present objects).

    Args:
        weight_dict: `loss_mask`, `loss_dice`, `loss_iou`, and optionally `loss_class`, `loss_tversky` (0 or absent:
            the Tversky term is neither computed nor reported).
        class_weights: class -> weight, at least 0; class 0 is a clean sample. Other classes have weight 1.
        tversky_alpha, tversky_beta, tversky_gamma: see `focal_tversky`.
        absent_focal: weight of the focal term of absent classes, in class steps.
        implementation: "plain" calls stock's functions; "lean" computes the same up to rounding from
            `activations.mask_sums`, for all masks at once, and saves only the logits for backward.
        stock: the other arguments of `MultiStepMultiMasksAndIous`.

    Raises:
        UserError: a term is unknown or missing, or a number is out of its range.
    """

    def __init__(
        self,
        weight_dict: Mapping[str, float],
        class_weights: Mapping[int, float] | None = None,
        tversky_alpha: float = 0.7,
        tversky_beta: float = 0.3,
        tversky_gamma: float = 4 / 3,
        absent_focal: float = 0.0,
        implementation: str = "plain",
        **stock,
    ):
        super().__init__(_checked_terms(weight_dict), **stock)
        if implementation not in IMPLEMENTATIONS:
            raise UserError(f"the loss's implementation must be one of {list(IMPLEMENTATIONS)}, got {implementation!r}")
        self.lean = implementation == "lean"
        self.absent_focal = checked_focal(absent_focal)
        self.names = [*REQUIRED, "loss_class", *([TVERSKY] if TVERSKY in self.weight_dict else [])]  # of the terms
        self.class_weights = _checked_classes(class_weights or {})
        self.tversky = checked_numbers(tversky_alpha, tversky_beta, tversky_gamma)

    def mask_terms(self, masks: Tensor, targets: Tensor, ious: Tensor) -> MaskTerms:
        """The stock terms of every mask channel.

        Args:
            masks: logits [O M H W].
            targets: [O 1 H W], 0.0 or 1.0.
            ious: predicted IoU [O M].
        """
        targets = targets.expand_as(masks)
        return MaskTerms(
            sigmoid_focal_loss(masks, targets, 1, self.focal_alpha, self.focal_gamma, loss_on_multimask=True),
            dice_loss(masks, targets, 1, loss_on_multimask=True),
            iou_loss(masks, targets, ious, 1, loss_on_multimask=True, use_l1_loss=self.iou_use_l1_loss),
        )

    def selected_terms(self, masks: Tensor, targets: Tensor, ious: Tensor, num_objects: float) -> dict[str, Tensor]:
        """The lean terms [O] of one prediction step, for the channel that stock selects; only it gets a gradient.

        Args:
            masks: logits [O M h w], as large as the targets or smaller.
            targets: [O 1 H W], 0 or 1 in any type.
            ious: predicted IoU [O M].
            num_objects: stock's divisor; rounding after this division can decide between nearly equal channels.
        """
        rule = self.focal_alpha, self.focal_gamma
        several = masks.shape[1] > 1
        with torch.set_grad_enabled(torch.is_grad_enabled() and not several):
            sums = mask_sums(masks, targets, *rule)
        area = targets.sum((2, 3))  # O 1
        error = ious - sums.hits / (sums.positives + area - sums.hits).clamp(min=1)
        iou = error.abs() if self.iou_use_l1_loss else error.square()
        if several:
            best = self._best_channel(MaskTerms(sums.focal, _dice(sums, area), iou), num_objects)
            chosen = best[:, None] == torch.arange(masks.shape[1], device=best.device)  # O M; one_hot may synchronise
            sums = mask_sums((masks * chosen[..., None, None]).sum(1, keepdim=True), targets, *rule)
            iou = iou.mean(1, keepdim=True) if self.supervise_all_iou else (iou * chosen).sum(1, keepdim=True)
        terms = {"loss_mask": sums.focal, "loss_dice": _dice(sums, area), "loss_iou": iou}
        if TVERSKY in self.names:
            terms[TVERSKY] = tversky_of_sums(sums.overlap, sums.drawn, area, **self.tversky)
        return {name: term[:, 0] for name, term in terms.items()}

    def tversky_term(self, masks: Tensor, targets: Tensor, best: Tensor) -> Tensor:
        """The Tversky loss [O] of channel `best` [O] of the logits [O M H W]."""
        chosen = masks[torch.arange(len(best), device=best.device), best]
        return focal_tversky(chosen, targets[:, 0], **self.tversky)

    def class_term(self, score_logits: Tensor, present: Tensor) -> Tensor:
        """The object-score loss [O] of score logits [O 1], or zeros when the scores are not trained."""
        if not self.pred_obj_scores:
            return torch.zeros_like(present)
        shape = (-1, 1, 1, 1)  # for one-pixel masks the stock function returns the loss of each object
        alpha, gamma = self.focal_alpha_obj_score, self.focal_gamma_obj_score
        return sigmoid_focal_loss(
            score_logits.view(shape), present.view(shape), 1, alpha, gamma, loss_on_multimask=True
        )[:, 0]

    def object_weights(self, outputs: Mapping, like: Tensor) -> Tensor:
        """The class weight of each object, shaped and typed as `like` [O]."""
        weights = torch.ones_like(like)
        if self.class_weights and "class_ids" not in outputs:
            raise UserError(
                "class_weights need the class of each object, but the model's outputs have no 'class_ids': "
                "use sam2_lora_ext.model.LoRASAM2Train, or leave class_weights out"
            )
        for class_id, weight in self.class_weights.items():
            weights = torch.where(outputs["class_ids"] == class_id, weight, weights)
        return weights

    def _forward(self, outputs: dict, targets: Tensor, num_objects: float) -> dict[str, Tensor]:
        """The losses of one frame (targets [O H W]), divided by `num_objects`; stock's `forward` adds up the frames."""
        targets = targets.unsqueeze(1)
        found = targets.flatten(1).any(1).float()
        present = (
            found if self.pred_obj_scores else torch.ones_like(found)
        )  # as stock: without scores every object counts
        weights = self.object_weights(outputs, found)
        names = [name for name in self.names if name != "loss_class"]
        factors, by_class = dict.fromkeys(names, present * weights), bool(outputs.get("class_prompt"))
        if by_class:
            shares = class_shares(found, num_objects)
            factors = class_factors(found, shares, weights, names, self.absent_focal)
        terms = self._lean_terms if self.lean else self._plain_terms
        losses, rows = terms(outputs, targets, num_objects, found, factors, weights)
        if by_class:  # an object's own losses do not depend on the batch
            rows |= {name: rows[name] / shares for name in names}
        losses[CORE_LOSS_KEY] = self.reduce_loss(losses)
        rows[CORE_LOSS_KEY] = torch.zeros_like(found) + self.reduce_loss(rows)
        outputs["object_losses"] = rows
        return losses

    def _lean_terms(
        self, outputs: dict, targets: Tensor, num_objects: float, found: Tensor, factors: Terms, weights: Tensor
    ) -> tuple[Terms, Terms]:
        """The terms summed over objects and steps and divided by `num_objects`; and per object [O], detached."""
        masks = outputs[SMALL_MASKS if SMALL_MASKS in outputs else STEP_OUTPUTS[0]]
        ious, scores = (outputs[key] for key in STEP_OUTPUTS[1:])
        steps = [
            self.selected_terms(*step, num_objects) for step in zip(masks, [targets] * len(masks), ious, strict=True)
        ]
        classes = self.class_term(torch.cat(scores), found.repeat(len(steps))).view(len(steps), -1)  # S O
        sums = {
            name: classes.sum(0) * weights
            if name == "loss_class"
            else torch.stack([step[name] for step in steps]).sum(0) * factors[name]
            for name in self.names
        }
        losses = {name: term.sum() / num_objects for name, term in sums.items()}
        return losses, {name: term.detach() for name, term in sums.items()}

    def _plain_terms(
        self, outputs: dict, targets: Tensor, num_objects: float, found: Tensor, factors: Terms, weights: Tensor
    ) -> tuple[Terms, Terms]:
        """Like `_lean_terms`, with stock's functions and stock's order of summation."""
        targets = targets.float()
        losses = dict.fromkeys(self.names, 0)
        rows = {name: torch.zeros_like(found) for name in self.names}
        for masks, ious, scores in zip(*(outputs[key] for key in STEP_OUTPUTS), strict=True):
            terms = self.mask_terms(masks, targets, ious)
            best = self._best_channel(terms, num_objects)
            for name, term in zip(REQUIRED, terms, strict=True):
                losses[name] += (self._select(name, term / num_objects, best) * factors[name]).sum()
                rows[name] += self._select(name, term.detach(), best) * factors[name]
            if TVERSKY in self.names:
                term = self.tversky_term(masks, targets, best) * factors[TVERSKY]
                losses[TVERSKY] += (term / num_objects).sum()
                rows[TVERSKY] += term.detach()
            term = self.class_term(scores, found) * weights
            losses["loss_class"] += term.sum() / num_objects
            rows["loss_class"] += term.detach()
        return losses, rows

    def _best_channel(self, terms: MaskTerms, num_objects: float) -> Tensor:
        """The channel [O] with the least focal + Dice loss; divides first, as stock does, so that ties break alike."""
        focal = terms.focal / num_objects * self.weight_dict["loss_mask"]
        return torch.argmin(focal + terms.dice / num_objects * self.weight_dict["loss_dice"], dim=-1)

    def _select(self, name: str, term: Tensor, best: Tensor) -> Tensor:
        """One value per object [O] of a term [O M]."""
        if name == "loss_iou" and self.supervise_all_iou:
            return term.mean(dim=-1)
        return term.gather(1, best[:, None])[:, 0]


def _dice(sums: MaskSums, area: Tensor) -> Tensor:
    """The Dice loss [O M] of sums [O M] and target areas [O 1]."""
    return 1 - (2 * sums.overlap + 1) / (sums.drawn + area + 1)


def _checked_terms(weight_dict: Mapping[str, float]) -> dict[str, float]:
    """A checked copy without a Tversky term of weight 0; stock adds a key to the dict it receives."""
    for name in weight_dict:
        if name not in CHOICES:
            raise UserError(f"unknown loss term {name!r} in weight_dict: choose from {', '.join(CHOICES)}")
    missing = [name for name in REQUIRED if name not in weight_dict]
    if missing:
        raise UserError(f"weight_dict lacks {', '.join(missing)}: give each a weight, 0 to switch a term off")
    return {name: weight for name, weight in weight_dict.items() if name != TVERSKY or weight != 0}


def _checked_classes(class_weights: Mapping[int, float]) -> dict[int, float]:
    """Class -> weight, for the weights that differ from 1."""
    for class_id, weight in class_weights.items():
        if not isinstance(class_id, int) or class_id < 0:
            raise UserError(f"class_weights has the key {class_id!r}: expected a class number, 0 for clean samples")
        if not (math.isfinite(weight) and weight >= 0):
            raise UserError(f"class_weights[{class_id}] is {weight}: expected a finite weight of at least 0")
    return {class_id: float(weight) for class_id, weight in class_weights.items() if weight != 1}
