"""Masks per second: the objects of 500 real strips from the index's arrays, and from the csv by a naive decoder."""

import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage
from tqdm import tqdm

from benchmarks.data_index import table
from sam2_lora_ext.data.dataset import SeverstalRawDataset
from sam2_lora_ext.data.kaggle import KaggleReader

ROUNDS = 3


def mask_figures(path: Path) -> dict[str, float]:
    """Masks a second: of objects (`naive`: decoded, then split by scipy), of whole classes (`naive`: only decoded)."""
    rows = list(table(path))
    names = sorted({row["ImageId"] for row in rows})
    texts = {name: [row["EncodedPixels"] for row in rows if row["ImageId"] == name] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        blank = Image.new("L", (1600, 256))
        for name in names:
            blank.save(Path(folder) / name)
        objects, classes = (
            SeverstalRawDataset(KaggleReader(folder, path), training=False, objects=kind)
            for kind in ("components", "classes")
        )
    random.Random(0).shuffle(names)

    def ours(dataset: SeverstalRawDataset) -> Iterator[int]:
        for item in range(len(dataset)):
            yield sum(1 for _ in dataset.get_video(item)[1].load(0).items())

    def naive_objects() -> Iterator[int]:
        for name in names:
            masks = []
            for text in texts[name]:
                labels, count = ndimage.label(naive_decode(text), np.ones((3, 3)))
                masks += [(labels == number).astype(np.uint8) for number in range(1, count + 1)]
            yield len(masks)

    def naive_classes() -> Iterator[int]:
        for name in names:
            yield sum(1 for text in texts[name] if naive_decode(text) is not None)

    loops = {
        "rate": lambda: ours(objects),
        "naive_rate": naive_objects,
        "class_rate": lambda: ours(classes),
        "naive_class_rate": naive_classes,
    }
    speed = dict.fromkeys(loops, 0.0)
    for _ in tqdm(range(ROUNDS), desc="rounds", leave=False):
        for name, loop in loops.items():
            start = time.perf_counter()
            count = sum(loop())
            speed[name] = max(speed[name], count / (time.perf_counter() - start))
    return speed | {
        "ratio": speed["rate"] / speed["naive_rate"],
        "class_ratio": speed["class_rate"] / speed["naive_class_rate"],
    }


def naive_decode(text: str) -> np.ndarray:
    """The usual decoder of notebooks: one slice assignment per run, uint8 [256, 1600]."""
    numbers = text.split()
    starts, lengths = (np.asarray(part, dtype=int) for part in (numbers[::2], numbers[1::2]))
    flat = np.zeros(256 * 1600, dtype=np.uint8)
    for start, end in zip(starts - 1, starts - 1 + lengths):
        flat[start:end] = 1
    return flat.reshape(1600, 256).T
