"""For tests of class steps: batches whose objects are classes of images, made by hand, their loss and gradients."""

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from training.trainer import CORE_LOSS_KEY
from training.utils.data_utils import BatchedVideoDatapoint

from helpers.small_runs import make_batch, make_model
from sam2_lora_ext.data.ids import class_prompt_id
from sam2_lora_ext.losses import SeverstalLoss

CLASSES = {1: "pit", 2: "line", 255: "scratch"}
LOSS = {"loss_mask": 20, "loss_dice": 1, "loss_iou": 1, "loss_class": 1}
STOCKS = {"pred_obj_scores": True, "supervise_all_iou": True, "iou_use_l1_loss": True}


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


def loss_of(batch: object, outputs: dict, **settings: object) -> Tensor:
    loss = SeverstalLoss(LOSS | settings.pop("weights", {}), implementation="lean", **STOCKS, **settings)
    return loss([outputs], batch.masks)[CORE_LOSS_KEY]


def gradients_of_ranks(rank: int) -> dict:
    """Of a class step whose last class is on rank 1 alone, then of a click step, through DDP."""
    model = class_model(activations="stock").train()  # makes and ends a process group of its own
    dist.init_process_group("gloo")
    wrapped = DistributedDataParallel(model, find_unused_parameters=False)
    found = {}
    for kind, batch in (
        ("classes", class_batch([[1], [255]][rank : rank + 1], seed=rank)),
        ("clicks", make_batch([[1_000_001]], seed=rank)),
    ):
        model.zero_grad()
        loss_of(batch, wrapped(batch)[0]).backward()
        found[kind] = {name: value.grad for name, value in model.named_parameters() if value.requires_grad}
    return found
