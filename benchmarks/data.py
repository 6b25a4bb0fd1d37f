"""What the data costs: the index of a full-size set, samples and masks per second; `python -m benchmarks.data`.

Needs the real data (`SAM2_LORA_REAL_DATA`, default `../shared/data` beside the repository). Prints a table and writes
`runs/data/data.json`.
"""

import argparse
import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from torch.utils.data import DataLoader
from training.dataset.transforms import ComposeAPI, NormalizeAPI, RandomResizeAPI, ToTensorAPI
from training.dataset.vos_dataset import VOSDataset
from training.dataset.vos_raw_dataset import PNGRawDataset
from training.dataset.vos_sampler import EvalSampler
from training.utils.data_utils import collate_fn

from benchmarks.data_index import IMAGES, index_figures, table
from sam2_lora_ext.data.dataset import SeverstalRawDataset
from sam2_lora_ext.data.kaggle import KaggleReader
from sam2_lora_ext.data.pixels import ModelInput, resize_image, resize_mask
from sam2_lora_ext.data.sampler import ObjectSampler
from sam2_lora_ext.errors import UserError, run_cli
from sam2_lora_ext.files import write_json

REPOSITORY = Path(__file__).resolve().parent.parent
SIDE = 1024


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=__doc__)
    parser.add_argument("--images", type=int, default=IMAGES, help="images of the synthetic full-size set")
    parser.add_argument("--samples", type=int, default=120, help="samples per loader and run")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "runs/data/data.json")
    args = parser.parse_args(argv)
    data = Path(os.environ.get("SAM2_LORA_REAL_DATA", REPOSITORY.parent / "shared/data"))
    if not (data / "severstal").is_dir():
        raise UserError(f"there is no real data in {data}; set SAM2_LORA_REAL_DATA")
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        figures = {"index": index_figures(data / "severstal", Path(folder), args.images)}
        figures["samples"] = sample_figures(data / "severstal", Path(folder), args.samples)
    figures["masks"] = mask_figures(data / "severstal/annotations_only_500.csv")
    for part, values in figures.items():
        for name, value in values.items():
            print(
                f"{part:8} {name:44} {value:12.4g}" if isinstance(value, float) else f"{part:8} {name:44} {value:>12}"
            )
    write_json(args.out, figures)
    print(f"written to {args.out}")


def sample_figures(data: Path, folder: Path, samples: int) -> dict[str, float]:
    """Samples per second of our path and of SAM 2's `PNGRawDataset` path, one worker each, on the same real strips."""
    with redirect_stdout(StringIO()):
        ours = SeverstalRawDataset(
            KaggleReader(data / "train_images", data / "train.csv"), training=False, include_clean=False
        )
        write_png_layout(ours, folder)
        normal = NormalizeAPI(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
        stock_steps = ComposeAPI([RandomResizeAPI(SIDE, True, square=True), ToTensorAPI(), normal])
        stock = VOSDataset([stock_steps], False, PNGRawDataset(folder / "img", folder / "gt"), EvalSampler(), 1)
        plugin = VOSDataset([ModelInput(SIDE)], False, ours, ObjectSampler(training=False), 1)
    image_difference = mask_difference = 0.0
    for item in range(len(plugin)):
        mine, theirs = plugin[item].frames[0], stock[item].frames[0]
        image_difference = max(image_difference, float((mine.data - theirs.data).abs().max()))
        masks = {obj.object_id: obj.segment for obj in theirs.objects}
        assert len(masks) == len(mine.objects)
        mask_difference = max(
            mask_difference,
            max(float((obj.segment != masks[number]).sum()) for number, obj in enumerate(mine.objects, 1)),
        )
    rates: dict[str, list[float]] = {"plugin": [], "stock": []}
    costs: dict[str, list[float]] = {"plugin": [], "stock": []}
    for _ in range(3):  # in turns, so that both meet the same neighbours on the machine
        for name, dataset in (("plugin", plugin), ("stock", stock)):
            rates[name].append(rate(dataset, samples))
            costs[name].append(cost(dataset))
    speed = {name: max(values) for name, values in rates.items()}
    cpu = {name: min(values) for name, values in costs.items()}
    figures = {
        "samples/s, this package": speed["plugin"],
        "samples/s, PNGRawDataset": speed["stock"],
        "ratio (at least 2)": speed["plugin"] / speed["stock"],
        "CPU ms per sample, this package": cpu["plugin"],
        "CPU ms per sample, PNGRawDataset": cpu["stock"],
        "ratio of CPU time": cpu["stock"] / cpu["plugin"],
        "largest image difference (1 grey level: 0.0175)": image_difference,
        "most mask pixels that differ": mask_difference,
    }
    return figures | where_time_goes(ours)


def write_png_layout(dataset: SeverstalRawDataset, folder: Path) -> None:
    """The same strips and objects as SAM 2's `PNGRawDataset` wants them: a folder and a palette PNG for each."""
    for item in range(len(dataset)):
        video, loader = dataset.get_video(item)
        for kind in ("img", "gt"):
            (folder / kind / f"{item:03d}").mkdir(parents=True)
        shutil.copy(video.frames[0].image_path, folder / "img" / f"{item:03d}/00000.jpg")
        label = np.zeros(loader.load(0).size, dtype=np.uint8)
        for number, (_, mask) in enumerate(loader.load(0).items(), 1):
            label[mask.numpy() > 0] = number
        image = Image.fromarray(label).convert("P")
        image.putpalette([value for number in range(256) for value in (number, 255 - number, 128)])
        image.save(folder / "gt" / f"{item:03d}/00000.png")


def rate(dataset: VOSDataset, samples: int) -> float:
    """Samples per second of one worker process, without its start."""
    order = [item % len(dataset) for item in range(samples + 5)]
    loader = DataLoader(
        dataset,
        sampler=order,
        num_workers=1,
        collate_fn=partial(collate_fn, dict_key="bench"),
        worker_init_fn=single_thread,
        prefetch_factor=2,
    )
    batches = iter(loader)
    for _ in range(5):
        next(batches)
    start = time.perf_counter()
    count = sum(1 for _ in batches)
    return count / (time.perf_counter() - start)


def cost(dataset: VOSDataset, rounds: int = 4) -> float:
    """CPU milliseconds of one sample in this process: hardly moved by what else the machine does."""
    start = time.process_time()
    for item in list(range(len(dataset))) * rounds:
        dataset[item]
    return (time.process_time() - start) / (rounds * len(dataset)) * 1e3


def single_thread(worker: int) -> None:
    """One thread per worker, as data workers have."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)


def where_time_goes(dataset: SeverstalRawDataset) -> dict[str, float]:
    """Milliseconds per sample of each step of our path."""
    spent = dict.fromkeys(
        ("ms reading the JPEG", "ms decoding masks", "ms resizing the image", "ms resizing masks", "ms normalising"),
        0.0,
    )
    last = ModelInput(SIDE)
    rounds = 5
    for item in list(range(len(dataset))) * rounds:
        video, loader = dataset.get_video(item)
        clock = [time.perf_counter()]
        image = Image.open(video.frames[0].image_path).convert("RGB")
        clock.append(time.perf_counter())
        masks = [mask for _, mask in loader.load(0).items()]
        clock.append(time.perf_counter())
        small = resize_image(image, SIDE)
        clock.append(time.perf_counter())
        for mask in masks:
            resize_mask(mask, SIDE)
        clock.append(time.perf_counter())
        last.normalise(small)
        clock.append(time.perf_counter())
        for name, begin, end in zip(spent, clock, clock[1:]):
            spent[name] += (end - begin) * 1e3
    return {name: value / (rounds * len(dataset)) for name, value in spent.items()}


def mask_figures(path: Path) -> dict[str, float]:
    """Masks of the objects of 500 real strips: from our arrays, and from the csv's text by a naive per-run decoder."""
    with tempfile.TemporaryDirectory() as folder:
        rows = list(table(path))
        names = sorted({row["ImageId"] for row in rows})
        blank = Image.new("L", (1600, 256))
        for name in names:
            blank.save(Path(folder) / name)
        dataset = SeverstalRawDataset(KaggleReader(folder, path), training=False)
    texts = {name: [row["EncodedPixels"] for row in rows if row["ImageId"] == name] for name in names}
    random.Random(0).shuffle(names)

    def ours() -> Iterator[int]:
        for item in range(len(dataset)):
            yield sum(1 for _ in dataset.get_video(item)[1].load(0).items())

    def naive() -> Iterator[int]:
        for name in names:
            masks = []
            for text in texts[name]:
                labels, count = ndimage.label(naive_decode(text), np.ones((3, 3)))
                masks += [(labels == number).astype(np.uint8) for number in range(1, count + 1)]
            yield len(masks)

    def naive_classes() -> Iterator[int]:
        for name in names:
            yield sum(1 for text in texts[name] if naive_decode(text) is not None)

    speed = {}
    for name, loop in (("ours", ours), ("naive", naive), ("classes", naive_classes)):
        start = time.perf_counter()
        count = sum(loop())
        speed[name] = count / (time.perf_counter() - start)
    return {
        "object masks/s, this package": speed["ours"],
        "object masks/s, naive per-run decoder": speed["naive"],
        "ratio (at least 10)": speed["ours"] / speed["naive"],
        "class masks/s, naive, not split into objects": speed["classes"],
    }


def naive_decode(text: str) -> np.ndarray:
    """The decoder of countless notebooks: one slice assignment per run, uint8 [256, 1600]."""
    numbers = text.split()
    starts, lengths = (np.asarray(part, dtype=int) for part in (numbers[::2], numbers[1::2]))
    flat = np.zeros(256 * 1600, dtype=np.uint8)
    for start, end in zip(starts - 1, starts - 1 + lengths):
        flat[start:end] = 1
    return flat.reshape(1600, 256).T


if __name__ == "__main__":
    run_cli(main)
