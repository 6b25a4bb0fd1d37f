"""SAM 2's `collate_fn` with images normalised directly into the batch.

At 1024 px an image is 12 MB, and SAM 2 copies it three times before it reaches the Trainer's process: it stacks frames,
then videos, then moves the batch into shared memory. This function writes it there once.
Legend: B videos, T frames, S side of the model's input.
"""

import math
from collections.abc import Sequence

import torch
from torch.utils.data import get_worker_info
from training.utils import data_utils
from training.utils.data_utils import BatchedVideoDatapoint, Frame, VideoDatapoint

from sam2_lora_ext.data.pixels import MEAN, STD, level_table, write_normalised


def collate_fn(
    batch: list[VideoDatapoint], dict_key: str, mean: Sequence[float] = MEAN, std: Sequence[float] = STD
) -> BatchedVideoDatapoint:
    """Builds the same batch as SAM 2's `collate_fn` from the same samples.

    Args:
        batch: B samples of T frames, with images uint8 [S, S, 3] (`ModelInput(normalise=False)`); samples with float
            images are passed to SAM 2's unchanged.
        dict_key: selects the loss and meters of this batch.
        mean: of R, G, B in 0..1; SAM 2's by default.
        std: of R, G, B in 0..1.
    """
    first = batch[0].frames[0].data
    if first.dtype != torch.uint8:
        return data_utils.collate_fn(batch, dict_key)
    images = mappable(len(batch), len(batch[0].frames), 3, *first.shape[:2])
    table = level_table(mean, std)
    for position, video in enumerate(batch):
        for t, frame in enumerate(video.frames):
            write_normalised(frame.data.numpy(), table, images[position, t].numpy())
    blank = torch.empty(0, 0, 0)
    rest = [
        VideoDatapoint([Frame(blank, frame.objects) for frame in video.frames], video.video_id, video.size)
        for video in batch
    ]
    collated = data_utils.collate_fn(rest, dict_key)
    collated.img_batch = images.permute(1, 0, 2, 3, 4)
    return collated


def mappable(*shape: int) -> torch.Tensor:
    """An uninitialised float32 tensor; workers allocate it in shared memory, as torch's `default_collate` does."""
    if get_worker_info() is None:
        return torch.empty(shape)
    return torch.empty(0).set_(torch.UntypedStorage._new_shared(4 * math.prod(shape)), 0, shape)
