"""Computes Kaggle's mean Dice of the Severstal competition and writes submission.csv; prompts give the classes.

The score is the mean over all (image, class) pairs, 1 where both masks are empty. Here the prompts determine which
classes are in an image, so the many empty pairs are right by construction: `empty_submission` is the score that they
alone give, and `dice_present` excludes them. Legend: H W pixels.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sam2_lora_ext.data.ids import class_of
from sam2_lora_ext.data.index import AnnotationIndex
from sam2_lora_ext.data.rle import NO_RUNS, decode_runs, encode_mask, format_rle, union_runs
from sam2_lora_ext.evaluate.bootstrap import bootstrap_interval
from sam2_lora_ext.evaluate.metrics import dice, mask_counts
from sam2_lora_ext.evaluate.predictor import Sample
from sam2_lora_ext.evaluate.tables import interval
from sam2_lora_ext.utils.csv_text import csv_text
from sam2_lora_ext.utils.files import write_atomic

HEADER = ("ImageId", "ClassId", "EncodedPixels")


class KaggleTally:
    """Collects masks by image and class as the `watch` of `run_model`, for whole images only.

    Args:
        index: the annotations.
        images: positions in the index of the evaluated images, including those without defects.
        submitted: the prompt of the masks in the submission.
    """

    def __init__(self, index: AnnotationIndex, images: Sequence[int], submitted: str):
        self.index, self.submitted = index, submitted
        self.places = {index.name(image): int(image) for image in images}
        self.scores: dict[str, dict[tuple[str, int], float]] = {}  # prompt -> (image, class) -> Dice
        self.runs: dict[tuple[str, int], np.ndarray] = {}

    def __call__(self, sample: Sample, prompt: str, masks: Tensor) -> None:
        """Adds the masks bool [O, 1, H, W] of a sample's defects."""
        classes = torch.tensor([class_of(sample.object_ids[o]) for o in sample.defects])
        for class_id in classes.unique().tolist():
            union = masks[classes == class_id, 0].any(0)
            truth = self.truth(sample.name, class_id)
            value = float(dice(mask_counts(union, truth)))
            assert (sample.name, class_id) not in self.scores.setdefault(prompt, {}), "an image was evaluated in parts"
            self.scores[prompt][sample.name, class_id] = value
            if prompt == self.submitted:
                self.runs[sample.name, class_id] = encode_mask(union.numpy())

    def truth(self, name: str, class_id: int) -> Tensor:
        """The full mask bool [H, W] of a class, including parts that are too small to be objects."""
        image = self.places[name]
        runs = union_runs([runs for number, runs in self.index.masks(image) if number == class_id])
        return torch.from_numpy(np.ascontiguousarray(decode_runs(runs, *self.index.sizes[image].tolist()))).bool()

    def pairs(self, prompt: str) -> tuple[list[str], np.ndarray, np.ndarray]:
        """Image, Dice (float64) and presence of a defect (bool) of each (image, class) pair, in a fixed order.

        Images that may lack masks are excluded, since their empty classes are unknown.
        """
        images, values, present = [], [], []
        for name in sorted(name for name, image in self.places.items() if self.index.complete[image]):
            defects = {number for number, runs in self.index.masks(self.places[name]) if len(runs)}
            for number in sorted(self.index.class_names):
                images.append(name)
                present.append(number in defects)
                values.append(self.scores[prompt].get((name, number), 0.0) if present[-1] else 1.0)
        return images, np.array(values), np.array(present)

    def summary(self) -> dict[str, dict[str, Any]]:
        """For each prompt, the mean Dice over all pairs (`dice`) and over pairs with a defect (`dice_present`).

        Each has its 95 % interval by image (`_ci95`); `empty_submission` is the score without any mask.
        """
        result = {}
        for prompt in self.scores:
            images, values, present = self.pairs(prompt)
            ill = [image for image, there in zip(images, present, strict=True) if there]
            result[prompt] = {
                "dice": float(values.mean()),
                "dice_ci95": list(bootstrap_interval(values, images)),
                "dice_present": float(values[present].mean()),
                "dice_present_ci95": list(bootstrap_interval(values[present], ill)),
                "empty_submission": float((~present).mean()),
                "pairs": len(values),
            }
        return result

    def difference(self, other: "KaggleTally") -> dict[str, dict[str, float | int]]:
        """`other - self` of the mean Dice over all pairs, by prompt (`kaggle_<prompt>`), with its interval by image."""
        result = {}
        for prompt in self.scores:
            images, before, _ = self.pairs(prompt)
            result[f"kaggle_{prompt}"] = interval(other.pairs(prompt)[1] - before, images)
        return result

    def write(self, path: str | Path, force: bool) -> None:
        """Writes submission.csv: a row for every image and class, with an empty field for an empty mask."""
        rows = [
            (name, number, format_rle(self.runs.get((name, number), NO_RUNS)))
            for name in sorted(self.places)
            for number in sorted(self.index.class_names)
        ]
        text = csv_text(HEADER, rows)
        write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"), force=force)
