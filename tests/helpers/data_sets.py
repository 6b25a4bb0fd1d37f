"""Small data sets for the tests of `sam2_lora_ext.data`: 40 x 200 strips in Kaggle's layout."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from training.dataset.vos_dataset import VOSDataset
from training.utils.data_utils import Frame, Object, VideoDatapoint, collate_fn

from sam2_lora_ext.data.dataset import SeverstalRawDataset
from sam2_lora_ext.data.kaggle import KaggleReader
from sam2_lora_ext.data.rle import encode_mask, format_rle
from sam2_lora_ext.data.sampler import ObjectSampler

HEIGHT, WIDTH = 40, 200
Boxes = Sequence[tuple[int, int, int, int, int]]  # class, x0, y0, x1, y1

STRIPS: Mapping[str, Boxes] = {
    "a.jpg": [(1, 2, 3, 12, 9), (1, 150, 20, 170, 40), (3, 60, 0, 64, 40)],
    "b.jpg": [(4, 100, 10, 190, 30)],
    "c.jpg": [],
    "d.jpg": [(3, 0, 0, 1, 1), (3, 5, 5, 6, 6), (3, 30, 10, 45, 30), (2, 180, 0, 200, 20)],
    "e.jpg": [],
    "f.jpg": [(3, 20, 2, 40, 12)],
}
OBJECTS = 9  # 8-connected, in all of STRIPS


def class_masks(boxes: Boxes) -> dict[int, np.ndarray]:
    """Class -> mask bool [H, W]."""
    masks: dict[int, np.ndarray] = {}
    for class_id, x0, y0, x1, y1 in boxes:
        masks.setdefault(class_id, np.zeros((HEIGHT, WIDTH), bool))[y0:y1, x0:x1] = True
    return masks


def rows_of(strips: Mapping[str, Boxes]) -> list[str]:
    """Lines of a Kaggle csv, without its header."""
    return [
        f"{name},{class_id},{format_rle(encode_mask(mask))}"
        for name, boxes in strips.items()
        for class_id, mask in sorted(class_masks(boxes).items())
    ]


def write_image(path: Path, shade: int = 120, size: tuple[int, int] = (WIDTH, HEIGHT)) -> None:
    """A grey image whose columns and rows are all different."""
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    Image.fromarray(((x + 3 * y + shade) % 200 + 30).astype(np.uint8)).convert("RGB").save(path)


def write_kaggle(folder: Path, strips: Mapping[str, Boxes] = STRIPS) -> Path:
    """`images/` and `train.csv`; returns the folder."""
    (folder / "images").mkdir(parents=True)
    for number, name in enumerate(strips):
        write_image(folder / "images" / name, 17 * number)
    (folder / "train.csv").write_text("\n".join(["ImageId,ClassId,EncodedPixels", *rows_of(strips)]) + "\n")
    return folder


def reader(folder: Path, **kwargs) -> KaggleReader:
    """The reader for `write_kaggle`."""
    return KaggleReader(folder / "images", folder / "train.csv", **{"size": (HEIGHT, WIDTH), **kwargs})


def video_dataset(raw: SeverstalRawDataset, transforms: Sequence = (), **sampler) -> VOSDataset:
    """Stock `VOSDataset` over ours."""
    return VOSDataset(list(transforms), raw.training, raw, ObjectSampler(training=raw.training, **sampler), 1)


def identifiers(dataset: VOSDataset) -> list[tuple[int, int]]:
    """(video_id, object_id) of all samples."""
    return [
        (sample.video_id, obj.object_id)
        for sample in (dataset[item] for item in range(len(dataset)))
        for obj in sample.frames[0].objects
    ]


def datapoint(
    masks: Mapping[int, np.ndarray], frames: int = 1, size: tuple[int, int] = (HEIGHT, WIDTH)
) -> VideoDatapoint:
    """A sample with these objects (id -> mask) on each frame; the image shows column and row in red and green."""
    height, width = size
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.arange(width) % 256
    pixels[..., 1] = np.arange(height)[:, None] % 256
    return VideoDatapoint(
        [
            Frame(
                Image.fromarray(pixels),
                [Object(number, t, torch.from_numpy(mask.astype(np.uint8))) for number, mask in masks.items()],
            )
            for t in range(frames)
        ],
        7,
        size,
    )


batch_of = partial(collate_fn, dict_key="severstal")


def noise(seed, size=(200, 40)):
    """A smooth random strip."""
    small = np.random.default_rng(seed).integers(40, 220, (9, 31)).astype(np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)
