"""The index of a full-size set: `python -m benchmarks.data_index FOLDER CACHE` builds one in a fresh process.

`benchmarks.data` calls it twice, so that the second time shows the cache.
"""

import csv
import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from sam2_lora_ext.data.cache import cached_index
from sam2_lora_ext.data.dataset import SeverstalRawDataset
from sam2_lora_ext.data.kaggle import KaggleReader
from sam2_lora_ext.utils.csv_text import csv_text

REPOSITORY = Path(__file__).resolve().parent.parent
IMAGES, MASKS = 12568, 7095  # of the full Severstal training set


def full_set(data: Path, folder: Path, images: int) -> None:
    """Writes a full-size set to `folder`: real annotations over one small strip (hard links)."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for row in table(data / "annotations_only_500.csv"):
        groups.setdefault(row["ImageId"], []).append((row["ClassId"], row["EncodedPixels"]))
    (folder / "train_images").mkdir(parents=True)
    small = folder / "strip.jpg"
    Image.new("RGB", (1600, 256), (90, 90, 90)).save(small)
    rows: list[tuple[str, str, str]] = []
    annotations = list(groups.values())
    for number in range(images):
        name = f"{number:08x}.jpg"
        os.link(small, folder / "train_images" / name)
        if len(rows) < MASKS * images / IMAGES:
            rows += [(name, class_id, rle) for class_id, rle in annotations[number % len(annotations)]]
    text = csv_text(["ImageId", "ClassId", "EncodedPixels"], rows)
    (folder / "train.csv").write_text(text, encoding="utf-8")


def index_figures(folder: Path) -> dict[str, float]:
    """Measures the set's index in two fresh processes: the first fills the cache, the second reads it."""
    command = [sys.executable, "-m", "benchmarks.data_index", str(folder), str(folder / "cache")]
    first, second = (
        json.loads(subprocess.run(command, check=True, capture_output=True, text=True, cwd=REPOSITORY).stdout)
        for _ in range(2)
    )
    return first | {
        "build_s": first["index_s"],
        "build_cpu_s": first["index_cpu"],
        "cached_s": second["index_s"],
        "cached_cpu_s": second["index_cpu"],
    }


def build_figures(folder: Path, cache: Path) -> dict[str, float]:
    """Measures one build in this process."""
    reader = KaggleReader(folder / "train_images", folder / "train.csv")
    before = reset_peak()
    start, cpu = time.perf_counter(), time.process_time()
    index = cached_index(reader, cache_dir=cache)
    index_s, index_cpu = time.perf_counter() - start, time.process_time() - cpu
    peak_mb = memory("VmHWM") - before
    start = time.perf_counter()
    dataset = SeverstalRawDataset(reader, cache_dir=cache)
    objects_s = time.perf_counter() - start
    start = time.perf_counter()
    text = pickle.dumps(dataset)
    pickle.loads(text)
    pickle_s = time.perf_counter() - start
    objects_mb = sum(value.nbytes for value in vars(dataset.objects).values() if isinstance(value, np.ndarray)) / 2**20
    return {
        "images": len(index),
        "masks": len(index.mask_class),
        "objects": len(dataset.objects),
        "index_s": index_s,
        "index_cpu": index_cpu,
        "objects_s": objects_s,
        "index_mb": index.nbytes / 2**20,
        "dataset_mb": index.nbytes / 2**20 + objects_mb,
        "peak_mb": peak_mb,
        "pickle_mb": len(text) / 2**20,
        "pickle_s": pickle_s,
    }


def reset_peak() -> float:
    """Resets the peak memory after the imports (Linux); returns the current memory in MB."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def memory(key: str) -> float:
    """The value of a line of /proc/self/status in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key + ":"))


def table(path: Path) -> Iterator[dict[str, str]]:
    """Rows of a Kaggle csv."""
    csv.field_size_limit(1 << 26)
    with open(path, newline="") as file:
        yield from csv.DictReader(file)


if __name__ == "__main__":
    print(json.dumps(build_figures(Path(sys.argv[1]), Path(sys.argv[2]))))
