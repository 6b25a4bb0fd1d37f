"""For tests of class steps: batches whose objects are classes of images, made by hand."""

from collections.abc import Sequence

from torch import nn
from training.utils.data_utils import BatchedVideoDatapoint

from helpers.small_runs import make_batch, make_model
from sam2_lora_ext.data.ids import class_prompt_id

CLASSES = {1: "pit", 2: "line", 255: "scratch"}


def class_batch(
    present: Sequence[Sequence[int]], *, corrected: bool = False, classes: Sequence[int] = tuple(CLASSES), seed: int = 0
) -> BatchedVideoDatapoint:
    """One image for each entry of `present`, the classes that it has; all `classes` are its objects."""
    batch = make_batch([[class_prompt_id(number, corrected) for number in classes] for _ in present], seed=seed)
    for image, there in enumerate(present):
        for place, number in enumerate(classes):
            if number not in there:
                batch.masks[0, image * len(classes) + place] = False
    return batch


def class_model(tokens: int = 4, init: str = "clicks", **changes: object) -> nn.Module:
    """The small `LoRASAM2Train` with tokens for `CLASSES` and two correction clicks."""
    settings = {"classes": CLASSES, "tokens": tokens, "init": init, "crop": 128}
    return make_model(**{"class_prompts": settings, "num_correction_pt_per_frame": 2, **changes})
