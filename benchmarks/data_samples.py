"""Samples per second: our data set compared with SAM 2's own `PNGRawDataset` and transforms, on the same strips."""

import os
import shutil
import time
from collections.abc import Callable
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
from training.utils import data_utils

from sam2_lora_ext.data.collate import collate_fn
from sam2_lora_ext.data.dataset import SeverstalRawDataset
from sam2_lora_ext.data.kaggle import KaggleReader
from sam2_lora_ext.data.pixels import ModelInput, level_table, resize_image, resize_mask, write_normalised
from sam2_lora_ext.data.sampler import ObjectSampler

SIDE = 1024
ROUNDS = 3


def sample_figures(data: Path, folder: Path, samples: int) -> dict[str, Any]:
    """Measures both in turns, so that the load of the machine affects both alike; the best of each counts.

    Args:
        data: the real Severstal strips.
        folder: for the strips in the layout of `PNGRawDataset`.
        samples: per loader and round.
    """
    ours, plugin, stock = both_paths(data, folder)
    seen: dict[str, list[float]] = {}
    for _ in tqdm(range(ROUNDS), desc="rounds", leave=False):
        for prefix, dataset, collate in (("", plugin, collate_fn), ("stock_", stock, data_utils.collate_fn)):
            speed, load = rate(dataset, collate, samples)
            found = {"rate": speed, "worker_ms": load, "cpu_ms": cost(dataset, collate)}
            for name, value in found.items():
                seen.setdefault(prefix + name, []).append(value)
    best = {name: max(values) if name.endswith("rate") else min(values) for name, values in seen.items()}
    parts = where_time_goes(ours)
    parts["rest_ms"] = max(0.0, best["cpu_ms"] - sum(parts.values()))
    return (
        best
        | parts
        | compare(plugin, stock)
        | {
            "ratio": best["rate"] / best["stock_rate"],
            "worker_ratio": best["stock_worker_ms"] / best["worker_ms"],
            "cpu_ratio": best["stock_cpu_ms"] / best["cpu_ms"],
            "shares": ", ".join(f"{value / sum(parts.values()):.0%}"[:-1] for value in parts.values()),
        }
    )


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
        plugin = VOSDataset([ModelInput(SIDE, normalise=False)], False, ours, ObjectSampler(training=False), 1)
    return ours, plugin, stock


def compare(plugin: VOSDataset, stock: VOSDataset) -> dict[str, Any]:
    """The largest difference of a normalised pixel, and the largest number of differing mask pixels of an object."""
    image = mask = 0.0
    for item in range(len(plugin)):
        mine, theirs = collate_fn([plugin[item]], "bench"), data_utils.collate_fn([stock[item]], "bench")
        image = max(image, float((mine.img_batch - theirs.img_batch).abs().max()))
        order = theirs.metadata.unique_objects_identifier[0, :, 1].argsort()  # ours are sorted by their numbers
        mask = max(mask, float((mine.masks != theirs.masks[:, order]).sum(dim=(2, 3)).max()))
    return {"image_difference": image, "mask_difference": int(mask)}


def write_png_layout(dataset: SeverstalRawDataset, folder: Path) -> None:
    """The same strips and objects in the layout of SAM 2's `PNGRawDataset`: a folder and a palette PNG for each."""
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


def rate(dataset: VOSDataset, collate: Callable, samples: int) -> tuple[float, float]:
    """Samples per second of one worker process, and CPU milliseconds of the worker per sample, without its start.

    The CPU time includes the transfer of 12 MB to another process, and hardly depends on the load of the machine.
    """
    order = [item % len(dataset) for item in range(samples + 5)]
    loader = DataLoader(
        dataset,
        sampler=order,
        num_workers=1,
        collate_fn=partial(collate, dict_key="bench"),
        worker_init_fn=single_thread,
        multiprocessing_context="spawn",  # as in SAM 2's training
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


def cost(dataset: VOSDataset, collate: Callable, rounds: int = 4) -> float:
    """CPU milliseconds of a batch of one sample in this process, hardly affected by the load of the machine."""
    start = time.process_time()
    for item in list(range(len(dataset))) * rounds:
        collate([dataset[item]], "bench")
    return (time.process_time() - start) / (rounds * len(dataset)) * 1e3


def single_thread(worker: int) -> None:
    """One thread per worker, as data workers have."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)


def where_time_goes(dataset: SeverstalRawDataset) -> dict[str, float]:
    """CPU milliseconds per sample for each step of this package's path."""
    spent = dict.fromkeys(("jpeg_ms", "masks_ms", "resize_ms", "resize_masks_ms", "normalise_ms"), 0.0)
    table, rounds = level_table(), 20
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
        write_normalised(small, table, torch.empty(3, SIDE, SIDE).numpy())
        clock.append(time.process_time())
        for name, begin, end in zip(spent, clock, clock[1:]):
            spent[name] += (end - begin) * 1e3
    return {name: value / (rounds * len(dataset)) for name, value in spent.items()}
