"""Kaggle's mean Dice of the Severstal competition and a submission.csv, where a prompt gives each defect's class.

The score is the mean over all (image, class) pairs, 1 where both masks are empty. Here a user says which classes are in an
image (by prompting them), so the many empty pairs are right by construction: `empty_submission` is what these alone give, and
`dice_present` leaves them out. Legend: I images, C classes, H W pixels.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sam2_lora_ext.data.ids import class_of
from sam2_lora_ext.data.index import AnnotationIndex
from sam2_lora_ext.data.rle import NO_RUNS, decode_runs, encode_mask, format_rle, union_runs
from sam2_lora_ext.evaluation import Sample
from sam2_lora_ext.files import write_atomic
from sam2_lora_ext.metrics import dice, exact_mean, mask_counts

HEADER = "ImageId,ClassId,EncodedPixels"


class KaggleTally:
    """Collects masks by image and class; given to `run_model` as `watch`, for whole images only.

    Args:
        index: the annotations.
        images: places in the index of the images that are evaluated, without defects too.
        submitted: the prompt whose masks go into the submission.
    """

    def __init__(self, index: AnnotationIndex, images: Sequence[int], submitted: str):
        self.index, self.submitted = index, submitted
        self.places = {index.name(image): int(image) for image in images}
        self.scores: dict[str, dict[tuple[str, int], float]] = {}  # prompt -> (image, class) -> Dice
        self.runs: dict[tuple[str, int], np.ndarray] = {}

    def __call__(self, sample: Sample, prompt: str, masks: Tensor) -> None:
        """Takes the masks bool [O, 1, H, W] of a sample's defects."""
        classes = torch.tensor([class_of(sample.object_ids[o]) for o in sample.defects])
        for class_id in classes.unique().tolist():
            union = masks[classes == class_id, 0].any(0)
            truth = self.truth(sample.name, class_id)
            value = float(dice(mask_counts(union, truth)))
            assert (sample.name, class_id) not in self.scores.setdefault(prompt, {}), "an image came in two parts"
            self.scores[prompt][sample.name, class_id] = value
            if prompt == self.submitted:
                self.runs[sample.name, class_id] = encode_mask(union.numpy())

    def truth(self, name: str, class_id: int) -> Tensor:
        """The whole mask bool [H, W] of a class, specks included that are too small to be objects."""
        image = self.places[name]
        runs = union_runs([runs for number, runs in self.index.masks(image) if number == class_id])
        return torch.from_numpy(np.ascontiguousarray(decode_runs(runs, *self.index.sizes[image].tolist()))).bool()

    def summary(self) -> dict[str, dict[str, float | int | None]]:
        """For each prompt: `dice` over all pairs, `dice_present` over those with a defect, `empty_submission`."""
        present = {
            (name, number)
            for name, image in self.places.items()
            for number, runs in self.index.masks(image)
            if len(runs)
        }
        pairs = len(self.places) * len(self.index.class_names)
        result = {}
        for prompt, scores in self.scores.items():
            values = [scores.get(pair, 0.0) for pair in sorted(present)]
            result[prompt] = {
                "dice": (sum(values) + pairs - len(present)) / pairs,
                "dice_present": exact_mean(torch.tensor(values, dtype=torch.float64)),
                "empty_submission": 1 - len(present) / pairs,
                "pairs": pairs,
            }
        return result

    def write(self, path: str | Path, force: bool) -> None:
        """Writes a row for every image and class, with an empty field where nothing was segmented."""
        rows = [HEADER]
        for name in sorted(self.places):
            rows += [
                f"{name},{number},{format_rle(self.runs.get((name, number), NO_RUNS))}"
                for number in sorted(self.index.class_names)
            ]
        write_atomic(
            path, lambda temporary: temporary.write_text("\n".join(rows) + "\n", encoding="utf-8"), force=force
        )
