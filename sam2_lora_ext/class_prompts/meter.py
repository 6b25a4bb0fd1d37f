"""The Trainer's metrics of class prompts: Kaggle's mean Dice, false alarms and recall of whole strips.

The tiles of a strip are stitched (`stitching.merge_tiles`; a class's score is the maximum over tiles), and `decide`
applies the default decision, with thresholds of 0. Masks are compared at the size of the stored strip with everything
that is annotated, specks included.

    Dice(strip, class) = 2 |P and T| / (|P| + |T|), 1 where both are empty

Legend: C classes, N strips, H W pixels of a strip, h w of a model's small mask, O objects of a batch.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from sam2_lora_ext.adapters.decision import Decision
from sam2_lora_ext.class_prompts.decide import decide
from sam2_lora_ext.class_prompts.pairs import PairRows
from sam2_lora_ext.class_prompts.stitching import Tiles, merge_tiles
from sam2_lora_ext.data.class_targets import class_runs
from sam2_lora_ext.data.class_validation import ClassTiles
from sam2_lora_ext.data.ids import class_of
from sam2_lora_ext.data.rle import NO_RUNS, decode_runs
from sam2_lora_ext.evaluate.metrics import dice, exact_mean, mask_counts
from sam2_lora_ext.utils.errors import UserError

OVERALL = ("kaggle_dice", "kaggle_dice_empty", "dice_present", "false_alarms", "recall", "strips", "clean_strips")
BY_CLASS = ("kaggle_dice", "dice_present", "recall")


class ClassPromptMeter:
    """Metrics in the form that SAM 2's Trainer expects, exact over ranks; click batches are ignored.

    A strip is counted once, by its row in the index, even if ranks repeat its tiles. Without any strip the result is
    `{}`; a key whose mean would be over nothing is left out.

    Keys, all Python floats:
        `kaggle_dice`: mean Dice over all (strip, class) pairs; `kaggle_dice_empty`: the score of empty masks, which is
            the share of pairs without a defect; `dice_present`: mean over the pairs with a defect.
        `false_alarms`: share of clean strips with a predicted pixel.
        `recall`: share of pairs with a defect that have a predicted pixel.
        `<kaggle_dice, dice_present, recall>_class_<c>`: the same over the pairs of class c.
        `strips`, `clean_strips`: how many.
        `class_prompts_loss_mask`, ..., `class_prompts_presence`: of the tiles, see `pairs.PairRows`.

    Args:
        exclusive: a pixel has at most one class, that with the largest logit.
    """

    def __init__(self, exclusive: bool = True):
        self.exclusive = exclusive
        self.tiles: ClassTiles | None = None
        self.pairs = PairRows(distinct=True)
        self.reset()

    def bind(self, tiles: ClassTiles) -> None:
        """Sets the tiles that the batches come from; `LoRATrainer` calls it once the data is read."""
        self.tiles = tiles

    @property
    def classes(self) -> list[int]:
        """The class ids, ascending; empty before `bind`."""
        return [] if self.tiles is None else sorted(self.tiles.raw.class_names)

    def reset(self) -> None:
        """Forgets all strips."""
        self.pairs.reset()
        self._counts: dict[int, Tensor] = {}  # image -> int64 [C 3]: intersection, prediction, target
        self._open: dict[int, dict[int, tuple[Tensor, Tensor]]] = {}  # image -> tile -> logits [C h w], scores [C]

    @torch.no_grad()
    def update(self, find_stages: Sequence[Mapping[str, Any]], find_metadatas: Any) -> None:
        """Adds the tiles of a batch, and evaluates each strip once all its tiles are there.

        Args:
            find_stages: one dict of outputs: `class_prompt`, `multistep_pred_masks` [O S h w] and
                `multistep_object_score_logits` (S times [O 1]), of which the first step counts.
            find_metadatas: has `unique_objects_identifier` [1 O 3]: image, object, tile.
        """
        outputs = find_stages[0]
        if not outputs.get("class_prompt"):
            return
        if self.tiles is None:
            raise UserError(
                "ClassPromptMeter was not bound to the validation strips: use sam2_lora_ext.trainer.LoRATrainer, and "
                "sam2_lora_ext.data.class_validation.ClassValidation as trainer.data.val"
            )
        self.pairs.update(find_stages, find_metadatas)
        ids = find_metadatas.unique_objects_identifier[0].cpu()
        masks, scores = outputs["multistep_pred_masks"][:, 0], outputs["multistep_object_score_logits"][0][:, 0]
        for image, tile in dict.fromkeys(map(tuple, ids[:, [0, 2]].tolist())):
            rows = torch.nonzero((ids[:, 0] == image) & (ids[:, 2] == tile))[:, 0]
            rows = rows[class_of(ids[rows, 1]).argsort()]
            assert class_of(ids[rows, 1]).tolist() == self.classes, "a tile has each class once"
            self._add(image, tile, masks[rows.to(masks.device)].float(), scores[rows.to(scores.device)].float())

    def _add(self, image: int, tile: int, logits: Tensor, scores: Tensor) -> None:
        """Adds the logits [C h w] and scores [C] of a tile."""
        if image in self._counts:
            return
        starts = self.tiles.starts(image)
        parts = self._open.setdefault(image, {})
        parts[tile] = logits, scores
        if len(parts) < len(starts):
            return
        found = [parts[number] for number in range(len(starts))]
        logits, scores = (torch.stack(row) for row in zip(*found, strict=True))
        size = tuple(self.tiles.raw.index.sizes[image].tolist())
        decision = Decision.default(scores.shape[1], self.exclusive)
        strip, highest = merge_tiles(Tiles(logits, scores, tuple(starts), self.tiles.tile_width(image), size), decision)
        drawn = decide(strip, highest, decision)
        self._counts[image] = mask_counts(drawn, self._truth(image).to(drawn.device)).cpu()
        del self._open[image]

    def _truth(self, image: int) -> Tensor:
        """All annotated pixels of each class, bool [C H W]."""
        raw = self.tiles.raw
        runs, size = class_runs(raw.objects, image), raw.index.sizes[image].tolist()
        masks = [decode_runs(runs.get(class_id, NO_RUNS), *size) for class_id in self.classes]
        return torch.from_numpy(np.ascontiguousarray(masks)).bool()

    def compute(self) -> dict[str, float]:
        """The values over this rank's complete strips, without communication, for the progress display."""
        return self._summary(self._counts) | self.pairs.compute()

    def compute_synced(self) -> dict[str, float]:
        """The values over the strips of all ranks, the same on each; every rank must call it.

        Raises:
            UserError: a strip lacks tiles.
        """
        gathered = [(self._counts, list(self._open))]
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            gathered = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, (self._counts, list(self._open)))
        counts = {image: rows for part, _ in gathered for image, rows in part.items()}
        if lacking := sorted({image for _, images in gathered for image in images} - set(counts)):
            raise UserError(
                f"{len(lacking)} strips lack tiles, such as {self.tiles.raw.index.name(lacking[0])}: all tiles of a "
                "strip must be on one rank, so use sam2_lora_ext.data.class_validation.ClassValidation"
            )
        return self._summary(counts) | self.pairs.compute_synced()

    @staticmethod
    def is_better(new: float, old: float) -> bool:
        """Whether a value is higher. SAM 2's own Trainer does not pass the key, so it is wrong for `false_alarms`."""
        return new > old

    def keys(self, steps: int = 1, tracked: bool = False) -> list[str]:
        """All possible keys of a validation, in order; the arguments are those of the click meter.

        Without a clean strip there is no `false_alarms`, so a run that monitors it fails before its first step.
        """
        none = self.tiles is not None and not self.tiles.raw.index.clean()[self.tiles.images].any()
        overall = [name for name in OVERALL if not (none and name == "false_alarms")]
        by_class = [f"{name}_class_{class_id}" for name in BY_CLASS for class_id in self.classes]
        return [*overall, *by_class, *self.pairs.keys()]

    def _summary(self, by_image: Mapping[int, Tensor]) -> dict[str, float]:
        if not by_image:
            return {}
        counts = torch.stack([by_image[image] for image in sorted(by_image)])  # N C 3
        quality, (_, drawn, truth) = dice(counts), (counts > 0).unbind(-1)
        clean = ~truth.any(1)
        values = {
            "kaggle_dice": exact_mean(quality.flatten()),
            "kaggle_dice_empty": exact_mean((~truth).double().flatten()),
            "dice_present": exact_mean(quality[truth]),
            "false_alarms": exact_mean(drawn[clean].any(1).double()),
            "recall": exact_mean(drawn[truth].double()),
            "strips": float(len(counts)),
            "clean_strips": float(clean.sum()),
        }
        for place, class_id in enumerate(self.classes):
            there = truth[:, place]
            values |= {
                f"kaggle_dice_class_{class_id}": exact_mean(quality[:, place]),
                f"dice_present_class_{class_id}": exact_mean(quality[there, place]),
                f"recall_class_{class_id}": exact_mean(drawn[there, place].double()),
            }
        return {key: value for key, value in values.items() if value is not None}
