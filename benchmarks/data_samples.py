"""Samples per second: our path against SAM 2's own `PNGRawDataset` and transforms, on the same real strips."""

import os
import shutil
import time
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm
from training.dataset.transforms import ComposeAPI, NormalizeAPI, RandomResizeAPI, ToTensorAPI
from training.dataset.vos_dataset import VOSDataset
from training.dataset.vos_raw_dataset import PNGRawDataset
from training.dataset.vos_sampler import EvalSampler
from training.utils.data_utils import collate_fn

from sam2_lora_ext.data.dataset import SeverstalRawDataset
from sam2_lora_ext.data.kaggle import KaggleReader
from sam2_lora_ext.data.pixels import ModelInput, resize_image, resize_mask
from sam2_lora_ext.data.sampler import ObjectSampler

SIDE = 1024
ROUNDS = 3


def sample_figures(data: Path, folder: Path, samples: int) -> dict[str, Any]:
    """Both paths in turns, so that both meet the same neighbours on the machine; the best of each counts.

    Args:
        data: the real Severstal strips.
        folder: where the strips are written in the layout that `PNGRawDataset` reads.
        samples: per loader and round.
    """
    ours, plugin, stock = both_paths(data, folder)
    rates: dict[str, list[float]] = {"plugin": [], "stock": []}
    loads: dict[str, list[float]] = {"plugin": [], "stock": []}
    costs: dict[str, list[float]] = {"plugin": [], "stock": []}
    for _ in tqdm(range(ROUNDS), desc="rounds", leave=False):
        for name, dataset in (("plugin", plugin), ("stock", stock)):
            speed, load = rate(dataset, samples)
            rates[name].append(speed)
            loads[name].append(load)
            costs[name].append(cost(dataset))
    found = {
        "rate": max(rates["plugin"]),
        "stock_rate": max(rates["stock"]),
        "worker_ms": min(loads["plugin"]),
        "stock_worker_ms": min(loads["stock"]),
        "cpu_ms": min(costs["plugin"]),
        "stock_cpu_ms": min(costs["stock"]),
    }
    parts = where_time_goes(ours)
    parts["rest_ms"] = max(0.0, found["cpu_ms"] - sum(parts.values()))
    shares = ", ".join(f"{value / sum(parts.values()):.0%}"[:-1] for value in parts.values())
    return found | parts | compare(plugin, stock) | {
        "ratio": found["rate"] / found["stock_rate"],
        "worker_ratio": found["stock_worker_ms"] / found["worker_ms"],
        "cpu_ratio": found["stock_cpu_ms"] / found["cpu_ms"],
        "shares": shares,
    }


def both_paths(data: Path, folder: Path) -> tuple[SeverstalRawDataset, VOSDataset, VOSDataset]:
    """The strips, and the data sets over them: ours, and stock's on a copy in `folder`."""
    with redirect_stdout(StringIO()):
        ours = SeverstalRawDataset(
            KaggleReader(data / "train_images", data / "train.csv"), training=False, include_clean=False
        )
        write_png_layout(ours, folder)
        normal = NormalizeAPI(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
        stock_steps = ComposeAPI([RandomResizeAPI(SIDE, True, square=True), ToTensorAPI(), normal])
        stock = VOSDataset([stock_steps], False, PNGRawDataset(folder / "img", folder / "gt"), EvalSampler(), 1)
        plugin = VOSDataset([ModelInput(SIDE)], False, ours, ObjectSampler(training=False), 1)
    return ours, plugin, stock


def compare(plugin: VOSDataset, stock: VOSDataset) -> dict[str, Any]:
    """The largest difference of a normalised pixel, and the most mask pixels that differ in an object."""
    image = mask = 0.0
    for item in range(len(plugin)):
        mine, theirs = plugin[item].frames[0], stock[item].frames[0]
        image = max(image, float((mine.data - theirs.data).abs().max()))
        masks = {obj.object_id: obj.segment for obj in theirs.objects}
        assert len(masks) == len(mine.objects)
        mask = max(mask, *(float((obj.segment != masks[k]).sum()) for k, obj in enumerate(mine.objects, 1)))
    return {"image_difference": image, "mask_difference": int(mask)}


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


def rate(dataset: VOSDataset, samples: int) -> tuple[float, float]:
    """Samples per second of one worker process, and CPU milliseconds of the worker per sample, without its start.

    The second holds what handing 12 MB over to another process costs, and is hardly moved by what the machine does.
    """
    order = [item % len(dataset) for item in range(samples + 5)]
    loader = DataLoader(
        dataset,
        sampler=order,
        num_workers=1,
        collate_fn=partial(collate_fn, dict_key="bench"),
        worker_init_fn=single_thread,
        multiprocessing_context="spawn",  # as SAM 2's training does
        prefetch_factor=2,
    )
    batches = iter(loader)
    for _ in range(5):
        next(batches)
    start, cpu = time.perf_counter(), children_cpu()
    for _ in range(samples - 2):
        next(batches)
    seconds, cpu = time.perf_counter() - start, children_cpu() - cpu
    assert sum(1 for _ in batches) == 2  # the worker was still there when its time was read
    return (samples - 2) / seconds, cpu / (samples - 2) * 1e3


def children_cpu() -> float:
    """CPU seconds of the child processes so far (Linux)."""
    pids = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return sum(int(field[11]) + int(field[12]) for field in fields) / os.sysconf("SC_CLK_TCK")


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
    """Milliseconds of CPU per sample of each step of our path."""
    spent = dict.fromkeys(("jpeg_ms", "masks_ms", "resize_ms", "resize_masks_ms", "normalise_ms"), 0.0)
    last = ModelInput(SIDE)
    rounds = 20
    for item in list(range(len(dataset))) * rounds:
        video, loader = dataset.get_video(item)
        clock = [time.process_time()]
        image = Image.open(video.frames[0].image_path).convert("RGB")
        clock.append(time.process_time())
        masks = [mask for _, mask in loader.load(0).items()]
        clock.append(time.process_time())
        small = resize_image(image, SIDE)
        clock.append(time.process_time())
        for mask in masks:
            resize_mask(mask, SIDE)
        clock.append(time.process_time())
        last.normalise(small)
        clock.append(time.process_time())
        for name, begin, end in zip(spent, clock, clock[1:]):
            spent[name] += (end - begin) * 1e3
    return {name: value / (rounds * len(dataset)) for name, value in spent.items()}
