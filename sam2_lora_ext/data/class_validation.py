"""Validation with class prompts: the usual click samples, and every strip in fixed tiles with all classes.

Tiles have fixed columns (`tiles.tile_starts`), independent of the truth. A tile's objects have the unique identifiers
(image, class prompt id, tile), where the image is the row in the index as in click samples. Images with a dropped mask
are not used, since their absent classes are unknown. Legend: H rows of a strip, w columns of a tile.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from training.dataset.sam2_datasets import MixedDataLoader, TorchTrainMixedDataset
from training.utils.data_utils import VideoDatapoint

from sam2_lora_ext.data.class_targets import class_runs, datapoint
from sam2_lora_ext.data.dataset import SeverstalRawDataset
from sam2_lora_ext.data.phases import rank_and_ranks
from sam2_lora_ext.data.rle import NO_RUNS, crop_columns
from sam2_lora_ext.data.tiles import tile_starts
from sam2_lora_ext.utils.errors import UserError


class ClassTiles(Dataset):
    """The tiles of the strips of a data set, strip by strip from left to right.

    Args:
        raw: the strips; clean ones are used if it includes them.
        width: w, equal to the training windows; None makes each strip one tile.
        overlap: minimum number of columns that neighbouring tiles share.
        transforms: applied after the cut, as in `VOSDataset`.

    Raises:
        UserError: no strip is left, the strips are clips, or the overlap is impossible.
    """

    def __init__(self, raw: SeverstalRawDataset, width: int | None, overlap: int, transforms: Sequence[Callable]):
        if not isinstance(raw, SeverstalRawDataset) or raw.windows is not None:
            raise UserError("tiles need a SeverstalRawDataset of single frames: set dataset.windows to null")
        self.raw, self.width, self.overlap, self.transforms = raw, width, overlap, list(transforms)
        index = raw.index
        taken = index.complete if raw.include_clean else index.complete & ~index.clean()
        self.images = [int(image) for image in raw.images if taken[image]]
        if not self.images:
            raise UserError(f"{index.image_dir} has no strip to validate class prompts on: all have a dropped mask")
        self.tiles = [(image, tile) for image in self.images for tile in range(len(self.starts(image)))]
        self._strip: tuple[int, Image.Image] | None = None  # the last one, since its tiles are read consecutively

    def starts(self, image: int) -> list[int]:
        """The first column of each tile of an image."""
        columns = int(self.raw.index.sizes[image, 1])
        return tile_starts(columns, columns if self.width is None else self.width, self.overlap)

    def tile_width(self, image: int) -> int:
        """The width of an image's tiles; a narrower strip is one tile."""
        columns = int(self.raw.index.sizes[image, 1])
        return min(self.width or columns, columns)

    def __len__(self) -> int:
        return len(self.tiles)

    def __getitem__(self, position: int) -> VideoDatapoint:
        image, tile = self.tiles[position]
        if self._strip is None or self._strip[0] != image:
            self._strip = image, Image.fromarray(self.raw.index.read(image, self.raw.bits))
        start = self.starts(image)[tile]
        stop, height = start + self.tile_width(image), int(self.raw.index.sizes[image, 0])
        runs = class_runs(self.raw.objects, image)
        targets = {
            class_id: crop_columns(runs.get(class_id, NO_RUNS), height, start, stop)
            for class_id in sorted(self.raw.class_names)
        }
        sample = datapoint(self._strip[1].crop((start, 0, stop, height)), targets, image, part=tile)
        for transform in self.transforms:
            sample = transform(sample)
        return sample

    def batches(self, size: int, rank: int, ranks: int) -> list[list[int]]:
        """This rank's batches of at most `size` tiles.

        All tiles of a strip are consecutive on one rank, which stitches them. SAM 2's validation loop needs the same
        number of batches on all ranks, so ranks with fewer repeat some.
        """
        by_image: dict[int, list[int]] = {image: [] for image in self.images}
        for position, (image, _) in enumerate(self.tiles):
            by_image[image].append(position)
        strips = list(by_image.values())
        mine = [_cut(strips[first::ranks] or strips[:1], size) for first in range(ranks)]
        longest = max(map(len, mine))
        return [mine[rank][number % len(mine[rank])] for number in range(longest)]


class ClassValidation(TorchTrainMixedDataset):
    """Stock's validation data, interleaved with batches of tiles of the same strips.

    Args:
        datasets: exactly one `VOSDataset` over a `SeverstalRawDataset`, for click samples.
        batch_sizes: its batch size.
        tile_width: see `ClassTiles`.
        overlap: see `ClassTiles`.
        tile_transforms: see `ClassTiles`.
        tiles_per_batch: maximum number of tiles in a batch, each with all classes.
        **stock: the other arguments of `TorchTrainMixedDataset`.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        batch_sizes: Sequence[int],
        tile_width: int | None,
        overlap: int,
        tile_transforms: Sequence[Callable],
        tiles_per_batch: int = 4,
        **stock: Any,
    ):
        raw = getattr(datasets[0], "video_dataset", None)
        if len(datasets) != 1 or raw is None:
            raise UserError(
                "ClassValidation needs exactly one VOSDataset over SeverstalRawDataset: set trainer.data.val.datasets "
                "to it"
            )
        if tiles_per_batch < 1:
            raise UserError(f"tiles_per_batch must be at least 1, got {tiles_per_batch}")
        self.class_tiles = ClassTiles(raw, tile_width, overlap, tile_transforms)
        self.tiles_per_batch = tiles_per_batch
        super().__init__(datasets, batch_sizes, **stock)

    def get_loader(self, epoch: int) -> MixedDataLoader:
        """This rank's batches, each of click samples only or of tiles only."""
        tiles = DataLoader(
            self.class_tiles,
            batch_sampler=self.class_tiles.batches(self.tiles_per_batch, *rank_and_ranks()),
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            collate_fn=self.collate_fn,
            worker_init_fn=self.worker_init_fn,
        )
        return MixedDataLoader([*super().get_loader(epoch).dataloaders, tiles], torch.tensor([0.5, 0.5]))


def _cut(strips: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """Batches of at most `size` tiles from all tiles of some strips."""
    tiles = np.concatenate(strips).tolist()
    return [tiles[first : first + size] for first in range(0, len(tiles), size)]
